"""People at `nc` on real sockets, and programs beside them."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import struct

import pytest

from tabane.errors import Conflict, Refused
from tabane.middlecon import Cause, Limits, connect
from tabane.middlecon.chat import LOBBY
from tabane.middlecon.frames import MAGIC, Kind, encode_frame
from tabane.middlecon.session import Hello, encode_hello

QUICK = Limits(silence_s=0.01)


class Talker:
    """A person: text out, text in."""

    def __init__(self, reader, writer) -> None:
        self.reader, self.writer = reader, writer
        host, port = writer.get_extra_info("sockname")[:2]
        self.name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def line(self) -> str:
        async with asyncio.timeout(60):
            return (await self.reader.readline()).decode()

    async def rest(self) -> bytes:
        async with asyncio.timeout(60):
            return await self.reader.read()


class Lounge:
    """A hub on TCP and the people that dial it."""

    def __init__(self, cluster, eventually) -> None:
        self.cluster = cluster
        self._eventually = eventually
        self._talkers = []

    async def open(self, name="hub", host="127.0.0.1", **options):
        options.setdefault("limits", QUICK)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.bind((host, 0))
        self.host, self.port = sock.getsockname()[:2]
        unix = self.cluster.url(name)
        self.hub = await self.cluster.hub(name, listen=[sock, unix], **options)
        return self.hub

    async def dial(self) -> Talker:
        talker = Talker(*await asyncio.open_connection(self.host, self.port, limit=1 << 20))
        self._talkers.append(talker)
        return talker

    async def listener(self) -> Talker:
        """One that has become a person by silence."""
        talker = await self.dial()
        await self._eventually(lambda: talker.name in self.hub.people)
        return talker

    async def close(self) -> None:
        for talker in self._talkers:
            talker.writer.close()
            try:
                await talker.writer.wait_closed()
            except ConnectionError:
                pass


@pytest.fixture
async def lounge(cluster, eventually):
    lounge = Lounge(cluster, eventually)
    yield lounge
    await lounge.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_silent_ones_hear_and_nobody_hears_himself(lounge, host):
    await lounge.open(host=host)
    a, b = await lounge.listener(), await lounge.listener()
    c = await lounge.dial()
    await c.say("こんにちは\r\n".encode())
    assert await a.line() == await b.line() == f"{c.name}: こんにちは\r\n"
    await b.say(b"hi\n\n")
    assert await a.line() == await c.line() == f"{b.name}: hi\n"
    assert await a.line() == await c.line() == f"{b.name}: \n"
    c.writer.write(b"last")
    c.writer.write_eof()
    assert await a.line() == await b.line() == f"{c.name}: last\n"
    assert await c.rest() == b""


async def test_what_is_not_utf8_is_answered_and_the_session_stays(lounge):
    await lounge.open()
    a, b = await lounge.listener(), await lounge.listener()
    await a.say(b"\xc3(\n")
    assert await a.line() == "You didn't send valid UTF-8.\n"
    await a.say("ö".encode()[:1])
    await a.say("ö".encode()[1:] + b"\nx" + b"x" * 70_000 + b"\nend\n")
    assert await b.line() == f"{a.name}: ö\n"
    assert await b.line() == f"{a.name}: {'x' * 65_536}\n"
    assert await b.line() == f"{a.name}: end\n"
    assert "more than 65536 bytes" in await a.line()


async def test_a_program_and_people_hear_each_other(lounge, cluster):
    await lounge.open()
    a, b = await lounge.listener(), await lounge.listener()
    x, y = await cluster.client("x"), await cluster.client("y")
    room, _ = await x.join(LOBBY), (await y.join(LOBBY)).on_message(lambda message: b"ok")
    heard = asyncio.Queue()
    room.on_message(lambda message: heard.put_nowait((message.sender, message.data)))
    receipt = await room.say(b"one\ntwo\n")
    assert (receipt.acknowledged, receipt.told, receipt.complete) == (("y",), 2, True)
    for talker in (a, b):
        assert [await talker.line(), await talker.line()] == ["x: one\n", "x: two\n"]
    replies = await room.ask(b"three")
    assert (replies.answers, replies.told) == ({"y": b"ok"}, 2)
    await room.cast(b"four")
    assert [await a.line(), await a.line()] == ["x: three\n", "x: four\n"]
    await b.say("やあ\r\n".encode())
    async with asyncio.timeout(60):
        assert await heard.get() == (b.name, "やあ\r".encode())
    with pytest.raises(Refused, match="in the room lobby"):
        await x.call("people@hub", b"")
    with pytest.raises(Conflict):
        await connect(cluster.url(), name="people@hub", timeout_s=0)


async def test_one_who_was_silent_and_then_says_hello_is_a_program(lounge, cluster, eventually):
    hub = await lounge.open()
    a, late = await lounge.listener(), await lounge.listener()
    await a.say(b"heard by all\n")
    assert await late.line() == f"{a.name}: heard by all\n"
    await late.say(MAGIC[:1])
    await eventually(lambda: late.name not in hub.people)
    await a.say(b"for people\n")
    hello = encode_hello(Hello("late", "run"))
    await late.say(hello[1:] + encode_frame(Kind.JOIN, name=LOBBY, flags=1))
    async with asyncio.timeout(60):
        assert await late.reader.readexactly(len(MAGIC)) == MAGIC
    await eventually(lambda: "late" in hub.members)
    assert hub.people == [a.name]


async def test_a_client_skips_what_it_heard_before_it_was_welcome(cluster, lounge, tmp_path):
    """A client whose HELLO comes late: the delay is a pipe that holds it back."""
    await lounge.open()
    a = await lounge.listener()
    pipes = []

    async def hold_back(reader, writer):
        talker = await lounge.listener()
        await a.say(b"noise\n")
        line = await talker.line()
        writer.write(line.encode())

        async def copy(source, sink):
            while data := await source.read(1 << 16):
                sink.write(data)
            sink.close()

        pipes.append(
            (writer, asyncio.gather(copy(reader, talker.writer), copy(talker.reader, writer)))
        )

    server = await asyncio.start_unix_server(hold_back, f"{tmp_path}/slow")
    async with await connect(f"unix://{tmp_path}/slow", name="x") as x:
        assert (await (await x.join(LOBBY)).say(b"here")).told == 1
    assert await a.line() == "x: here\n"
    for writer, copies in pipes:
        await copies
        await writer.wait_closed()
    server.close()


@pytest.mark.parametrize("chat", [True, False])
async def test_http_is_refused_first_and_late(lounge, chat):
    await lounge.open(chat=chat)
    early = await lounge.dial()
    await early.say(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await early.rest()).startswith(b"HTTP/1.1 400 Bad Request\r\n")
    if chat:
        a, late = await lounge.listener(), await lounge.listener()
        await late.say(b"POS")
        await late.say(b"T / HTTP/1.1\r\n")
        assert (await late.rest()).startswith(b"HTTP/1.1 400 Bad Request\r\n")
        await (await lounge.dial()).say(b"hello\n")
        assert (await a.line()).endswith(": hello\n")


async def test_chat_is_off_with_a_token_unless_it_is_wanted(lounge):
    await lounge.open(token="secret")
    stranger = await lounge.dial()
    await stranger.say(b"hello\n")
    assert (await stranger.rest()).startswith(b"This is a middlecon hub")
    await lounge.open("other", token="secret", chat=True)
    assert await lounge.listener()


async def test_one_who_does_not_read_loses_lines_and_then_the_session(lounge, eventually):
    limits = Limits(silence_s=0.01, queue_bytes=1 << 20)
    hub = await lounge.open(limits=limits, heartbeat_s=0.06)
    a, b, deaf = [await lounge.listener() for _ in range(3)]
    deaf.reader._transport.pause_reading()
    line = b"x" * 60_000 + b"\n"
    async with asyncio.timeout(60):
        while deaf.name in hub.people:
            await a.say(line)
            assert len(await b.line()) == len(a.name) + 2 + len(line)
    assert hub.people == [a.name, b.name]


async def test_a_hub_takes_no_more_people_than_sessions(lounge):
    hub = await lounge.open(limits=Limits(silence_s=0.01, sessions=2))
    a = await lounge.listener()
    b = await lounge.dial()
    await b.say(b"hello\n")
    assert await b.rest() == b"This hub has 2 sessions, the most it takes.\n"
    assert hub.people == [a.name]


async def test_random_bytes_harm_nobody(lounge):
    await lounge.open()
    a, b = await lounge.listener(), await lounge.listener()
    for seed in range(20):
        noise = struct.pack(">I", seed * 2654435761 % 2**32) * 300
        rude = await lounge.dial()
        await rude.say(noise)
        rude.writer.transport.abort()
    await a.say(b"still here\n")
    while (line := await b.line()) != f"{a.name}: still here\n":
        assert line


async def test_people_on_a_unix_socket_are_named_by_their_process(lounge, cluster):
    await lounge.open()
    a = await lounge.listener()
    _, writer = await asyncio.open_unix_connection(cluster.url().removeprefix("unix://"))
    writer.write(b"hi\n")
    assert await a.line() == f"unix:{os.getpid()}: hi\n"
    writer.close()
    await writer.wait_closed()


async def test_the_lobby_spans_linked_hubs(lounge, cluster, eventually):
    far = await lounge.open("far", chat=True)
    b = await lounge.listener()
    near = await lounge.open("near", chat=True)
    a = await lounge.listener()
    near.link("far", cluster.url("far"))
    await eventually(lambda: near.peers.get("far") and far.peers.get("near"))
    await a.say(b"hi\n")
    assert await b.line() == f"{a.name}: hi\n"
    await b.say(b"hi you\n")
    assert await a.line() == f"{b.name}: hi you\n"
    x, y = await cluster.client("x", "near"), await cluster.client("y", "far")
    room, theirs = await x.join(LOBBY), await y.join(LOBBY)
    theirs.on_message(lambda message: None)
    await eventually(lambda: {"x", "y"} <= room.members.keys())
    receipt = await room.say(b"all")
    assert (receipt.acknowledged, receipt.told) == (("y",), 2)
    assert await a.line() == await b.line() == "x: all\n"
    b.writer.close()
    await eventually(lambda: not far.people)
    await eventually(lambda: "people@far" not in near.members)
    assert (await room.say(b"again")).told == 1
    await far.aclose()
    receipt = await room.say(b"gone")
    assert receipt.failed["y"].cause is Cause.UNREACHABLE and receipt.told == 1


async def nc(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        "nc", *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )


@pytest.mark.real
async def test_two_at_nc(lounge, eventually):
    hub = await lounge.open()
    listening = await nc("127.0.0.1", str(lounge.port))
    await eventually(lambda: len(hub.people) == 1)
    done = await nc("-N", "127.0.0.1", str(lounge.port))
    async with asyncio.timeout(60):
        assert await done.communicate("やあ\nbye".encode()) == (b"", None)
        lines = [(await listening.stdout.readline()).decode() for _ in range(2)]
        listening.stdin.close()
        listening.terminate()
        await listening.wait()
    assert [re.sub(r"^127\.0\.0\.1:\d+", "A", line) for line in lines] == ["A: やあ\n", "A: bye\n"]
    await eventually(lambda: hub.people == [])
