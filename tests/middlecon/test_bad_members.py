"""Bad and slow members, spoken in bytes: the offender is told and cut off, others never notice."""

from __future__ import annotations

import asyncio
import struct

import pytest

from tabane.errors import (
    Closed,
    NotFound,
    TimedOut,
)
from tabane.middlecon import Cause, Limits
from tabane.middlecon.frames import MAGIC, Decoder, JoinFlag, Kind, encode_frame
from tabane.middlecon.session import Hello, Welcome, encode_hello, encode_welcome


class Raw:
    """A member that speaks bytes."""

    def __init__(self, cluster) -> None:
        self._path = cluster.url().removeprefix("unix://")

    async def __aenter__(self):
        self._reader, self._writer = await asyncio.open_unix_connection(self._path)
        return self

    async def __aexit__(self, *_) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def tell(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def hello(self, name: str = "raw") -> None:
        await self.tell(encode_hello(Hello(name, "run")))
        await self._reader.readexactly(len(MAGIC))

    async def rest(self) -> bytes:
        async with asyncio.timeout(60):
            return await self._reader.read()

    async def frames(self):
        data = await self.rest()
        return Decoder().feed(data.removeprefix(MAGIC))


@pytest.fixture
def raw(cluster):
    return Raw(cluster)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", 1 << 31) + bytes(40),
        encode_frame(Kind.ACK, id=1)[:-1] + b"\xff" * 30,
        encode_frame(99),
        encode_frame(Kind.JOIN, name="a\x00b"),
        encode_frame(Kind.STATE, value=1, data=b"\xff"),
        encode_frame(Kind.HELLO),
        encode_frame(Kind.MEMBER, name="forged"),
    ],
)
async def test_who_breaks_the_protocol_is_told_and_cut_off_and_others_never_notice(
    cluster, raw, data
):
    await cluster.hub()
    x = await cluster.client("x")
    async with raw:
        await raw.hello()
        await raw.tell(data)
        frames = await raw.frames()
    assert frames[-1].kind == Kind.ERROR and frames[-1].name == "protocol"
    assert await x.join("r") and x.connected


async def test_versions_that_do_not_fit_are_named(cluster, raw):
    await cluster.hub()
    async with raw:
        await raw.tell(encode_hello(Hello("x", "run", versions=(9,))))
        (error,) = await raw.frames()
    assert b"versions [9]" in error.data


@pytest.mark.parametrize(
    ("first", "answer"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 400 "),
        ("こんにちは\n".encode(), b"This is a middlecon hub"),
    ],
)
async def test_text_is_refused_with_text(cluster, raw, first, answer):
    await cluster.hub(chat=False)
    async with raw:
        await raw.tell(first)
        assert (await raw.rest()).startswith(answer)


async def test_who_says_no_hello_is_cut_off(cluster, raw):
    await cluster.hub(heartbeat_s=0.03, chat=False)
    async with raw:
        (error,) = await raw.frames()
    assert b"nobody said hello" in error.data


async def test_a_silent_member_is_pinged_and_then_lost(cluster, raw, eventually):
    hub = await cluster.hub(heartbeat_s=0.09)
    quiet = await cluster.client("quiet")
    async with raw:
        await raw.hello()
        frames = await raw.frames()
    assert [f.kind for f in frames if f.kind == Kind.PING]
    assert quiet.connected and hub.members == {"quiet": "hub"}


async def test_a_client_notices_a_silent_hub(cluster, tmp_path, eventually):
    writers = []

    def greet(reader, writer):
        writers.append(writer)
        writer.write(MAGIC + encode_welcome(Welcome("mute", "run", heartbeat_s=0.01)))

    server = await asyncio.start_unix_server(greet, f"{tmp_path}/mute")
    x = await cluster.client("x", url=f"unix://{tmp_path}/mute")
    await eventually(lambda: "silent" in x.trouble)
    await x.aclose()
    server.close()
    for writer in writers:
        writer.close()
        await writer.wait_closed()


async def test_who_never_reads_fails_then_is_cut_off_and_others_never_notice(cluster, raw):
    hub = await cluster.hub(limits=Limits(queue_bytes=1 << 20))
    x, y = await cluster.client("x"), await cluster.client("y")
    y.on_message(lambda message: b"here")
    async with raw:
        await raw.hello("deaf")
        raw._reader._transport.pause_reading()
        while "deaf" in hub.members:
            x.send_nowait("deaf", bytes(200_000))
            assert await x.call("y", b"") == b"here"
        with pytest.raises(NotFound):
            await x.call("deaf", b"")


async def test_members_with_too_much_waiting_are_named_as_overloaded(cluster, raw):
    await cluster.hub(limits=Limits(queue_bytes=1 << 20))
    x = await cluster.client("x")
    room = await x.join("r")
    async with raw:
        await raw.hello("deaf")
        await raw.tell(encode_frame(Kind.JOIN, name="r", flags=JoinFlag.MEMBER))
        raw._reader._transport.pause_reading()
        while not (receipt := await room.say(bytes(400_000), timeout_s=0.01)).failed:
            pass
        while receipt.failed["deaf"].cause is Cause.TIMED_OUT:
            receipt = await room.say(bytes(400_000), timeout_s=0.01)
    assert receipt.failed["deaf"].cause is Cause.OVERLOADED


async def test_closing_in_the_middle_of_messages_is_quiet(cluster, caplog):
    await cluster.hub()
    x, y = await cluster.client("x"), await cluster.client("y")

    @y.on_message
    async def hang(message):
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)

    calls = [asyncio.ensure_future(x.call("y", b"")) for _ in range(50)]
    with pytest.raises(TimedOut):
        await x.call("y", b"", timeout_s=0.01)
    closing = asyncio.ensure_future(y.aclose())
    while not closing.done():
        try:
            x.send_nowait("y", b"late")
        finally:
            await asyncio.sleep(0)
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(result) for result in results} == {Closed}
    await y.aclose()
    assert caplog.text == ""
