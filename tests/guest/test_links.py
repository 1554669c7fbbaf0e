"""Connections of programs inside to sockets of their node: both directions, both ends, bounds."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tabane.errors import ProtocolError
from tabane.guest import links
from tabane.guest.frames import FIRST_LINK, LINK_WINDOW_BYTES, MAX_PAYLOAD, Frame, Kind
from tabane.guest.links import Links

FIRST = FIRST_LINK | 1
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Host:
    """A host's links, and what it says to the guest."""

    def __init__(self, **services: Path) -> None:
        self.said: list[Frame] = []
        self._more = asyncio.Event()
        self.links = Links(self._say, {f"{name}.sock": path for name, path in services.items()})

    def _say(self, kind: Kind, number: int, payload: bytes = b"") -> None:
        self.said.append(Frame(kind, number, payload))
        self._more.set()

    def hear(self, kind: int, number: int = FIRST, payload: bytes = b"") -> None:
        """The guest says that."""
        self.links.on_frame(Frame(kind, number, payload))

    async def wait_said(self, kind: Kind, number: int = FIRST) -> Frame:
        """The next of that kind, which is taken out."""
        async with asyncio.timeout(60):
            while True:
                for frame in self.said:
                    if (frame.kind, frame.channel) == (kind, number):
                        self.said.remove(frame)
                        return frame
                self._more.clear()
                await self._more.wait()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say at the end what was heard."""
    data = await reader.read()
    writer.write(data[::-1])
    writer.write_eof()


@asynccontextmanager
async def host_of(path: Path, serve: Serve = echo) -> AsyncIterator[Host]:
    """One whose node serves `hub.sock`."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_unix_server(handle, path / "hub")
    host = Host(hub=path / "hub", gone=path / "nobody")
    try:
        yield host
    finally:
        await host.links.aclose()
        server.close()
        await server.wait_closed()


async def test_each_side_says_all_it_has_and_then_ends(tmp_path: Path) -> None:
    async with host_of(tmp_path) as host:
        host.hear(Kind.DIAL, payload=b"hub.sock")
        host.hear(Kind.OUTPUT, payload=b"abc")
        host.hear(Kind.OUTPUT, payload=b"def")
        host.hear(Kind.END_OUTPUT)
        assert (await host.wait_said(Kind.INPUT)).payload == b"fedcba"
        await host.wait_said(Kind.END_INPUT)
        granted = [await host.wait_said(Kind.GRANT) for _ in range(2)]
        assert [grant.payload for grant in granted] == [struct.pack("<IB", 3, 0)] * 2
        host.hear(Kind.TAKEN, payload=struct.pack("<I", 6))
        while len(host.links) > 0:  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0)
        host.hear(Kind.ENDED, payload=bytes(4))
        assert host.said == []


async def test_what_comes_waits_for_the_guest(tmp_path: Path) -> None:
    """No more than a window is on its way to it."""

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(10 * LINK_WINDOW_BYTES))
        await writer.drain()

    async with host_of(tmp_path, pour) as host:
        host.hear(Kind.DIAL, payload=b"hub.sock")
        total = 0
        while total < LINK_WINDOW_BYTES:
            total += len((await host.wait_said(Kind.INPUT)).payload)
        assert total == LINK_WINDOW_BYTES
        host.hear(Kind.TAKEN, payload=struct.pack("<I", 100))
        assert len((await host.wait_said(Kind.INPUT)).payload) == 100
        host.hear(Kind.ENDED, payload=bytes(4))


async def test_what_the_guest_says_waits_for_the_node(tmp_path: Path) -> None:
    """Of what nobody takes, no more than its window and what the socket has room for is kept; a
    guest that does not wait is at fault."""
    reading = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reading.wait()
        while await reader.read(1 << 16):
            pass

    async with host_of(tmp_path, slow) as host:
        host.hear(Kind.DIAL, payload=b"hub.sock")
        for _ in range(LINK_WINDOW_BYTES // MAX_PAYLOAD):
            host.hear(Kind.OUTPUT, payload=bytes(MAX_PAYLOAD))
        with pytest.raises(ProtocolError, match="more than it was asked for"):
            host.hear(Kind.OUTPUT, payload=b"x")
        reading.set()


async def test_where_nobody_listens_it_is_closed(tmp_path: Path) -> None:
    async with host_of(tmp_path) as host:
        host.hear(Kind.DIAL, payload=b"gone.sock")
        await host.wait_said(Kind.CLOSE)
        host.hear(Kind.OUTPUT, payload=b"it did not know yet")
        host.hear(Kind.ENDED, payload=bytes(4))
        with pytest.raises(ProtocolError):
            host.hear(Kind.ENDED, payload=bytes(4))


async def test_where_the_node_has_left_it_is_closed(tmp_path: Path) -> None:
    """As on a socket of its own, a program that goes on talking finds that out."""

    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.transport.abort()

    async with host_of(tmp_path, leave) as host:
        host.hear(Kind.DIAL, payload=b"hub.sock")
        host.hear(Kind.OUTPUT, payload=b"x" * 1000)
        await host.wait_said(Kind.GRANT)
        while not any(frame.kind == Kind.CLOSE for frame in host.said):
            host.hear(Kind.OUTPUT, payload=b"x")
            await asyncio.sleep(0)


async def test_when_the_program_goes_so_does_its_session(tmp_path: Path) -> None:
    """What it said last is heard; the node's side sees the end."""
    heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.set_result(await reader.read())

    async with host_of(tmp_path, listen) as host:
        host.hear(Kind.DIAL, payload=b"hub.sock")
        host.hear(Kind.OUTPUT, payload=b"last words")
        host.hear(Kind.ENDED, payload=bytes(4))
        assert await asyncio.wait_for(heard, 60) == b"last words"


async def test_when_the_guest_is_lost_so_are_all(tmp_path: Path) -> None:
    gone = asyncio.Semaphore(0)

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        gone.release()

    async with host_of(tmp_path, listen) as host:
        for number in (FIRST, FIRST + 1):
            host.hear(Kind.DIAL, number, b"hub.sock")
            host.hear(Kind.OUTPUT, number, b"x")
            await host.wait_said(Kind.GRANT, number)
        host.links.on_lost()
        for _ in range(2):
            await asyncio.wait_for(gone.acquire(), 5)


@pytest.mark.parametrize(
    ("kind", "number", "payload"),
    [
        (Kind.DIAL, FIRST, b"hub.sock"),
        (Kind.DIAL, FIRST + 1, b"../agent.sock"),
        (Kind.DIAL, FIRST + 1, b"/run/docker.sock"),
        (Kind.DIAL, FIRST + 1, b""),
        (Kind.DIAL, 5, b"hub.sock"),
        (Kind.OUTPUT, FIRST + 1, b"x"),
        (Kind.OUTPUT, FIRST, b""),
        (Kind.TAKEN, FIRST, struct.pack("<I", 1)),
        (Kind.BEGUN, FIRST, b""),
        (Kind.COMPLAINT, FIRST, b"x"),
    ],
)
async def test_what_no_agent_says(tmp_path: Path, kind: int, number: int, payload: bytes) -> None:
    async with host_of(tmp_path) as host:
        host.hear(Kind.DIAL, payload=b"hub.sock")
        with pytest.raises(ProtocolError):
            host.hear(kind, number, payload)


async def test_there_are_no_more_than_an_agent_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the node's side has not done with count, too; one more is closed, not a fault."""
    monkeypatch.setattr(links, "MOST_LINKS", 2)
    monkeypatch.setattr(links, "MOST_CARRIED", 2)

    async def stay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        await asyncio.Event().wait()

    async with host_of(tmp_path, stay) as host:
        for number in (FIRST, FIRST + 1):
            host.hear(Kind.DIAL, number, b"hub.sock")
        with pytest.raises(ProtocolError, match="that it may not"):
            host.hear(Kind.DIAL, FIRST + 2, b"hub.sock")
        host.hear(Kind.ENDED, FIRST, bytes(4))
        host.hear(Kind.DIAL, FIRST + 3, b"hub.sock")
        await host.wait_said(Kind.CLOSE, FIRST + 3)
