"""Connections of programs inside to sockets of their node, carried by the agent.

The guest says which of its sockets somebody connected to (DIAL), and numbers what follows. It knows
them by name only: which socket of the node's that is, and so as whom it speaks, is the host's word.
Each has a window in both directions, and each side may end what it says before the other does. A
link's last frame is the guest's ENDED; until then it counts.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from tabane.errors import ProtocolError
from tabane.guest.frames import FIRST_LINK, LINK_WINDOW_BYTES, MAX_PAYLOAD, Frame, Kind
from tabane.guest.streams import Incoming, Outgoing
from tabane.supervise import Supervisor
from tabane.unix import connect_unix

MOST_LINKS = 96
"""Of one guest at a time, as its agent has them: more than the node's own sockets take."""
MOST_CARRIED = 2 * MOST_LINKS
"""With those that the guest has done with, and whose last bytes the node's side has not taken."""
LINGER_S = 4.0
"""How long that may take."""


class Say(Protocol):
    def __call__(self, kind: Kind, number: int, payload: bytes = b"") -> None: ...


class Links:
    """Of one guest. `services`: by name, the sockets it may reach, which are the instance's own."""

    def __init__(self, say: Say, services: Mapping[str, Path]) -> None:
        self._say = say
        self._services = services
        self._links: dict[int, Link] = {}
        self._tasks = Supervisor("links")

    def on_frame(self, frame: Frame) -> None:
        """Raises `ProtocolError`."""
        link = self._links.get(frame.channel)
        if frame.kind == Kind.DIAL:
            self._dial(frame)
        elif link is None:
            raise ProtocolError("the guest says something in a conversation that there is not")
        elif frame.kind == Kind.ENDED:
            del self._links[frame.channel]
            link.on_ended()
        else:
            link.on_frame(frame)

    def _dial(self, frame: Frame) -> None:
        number, name = frame.channel, frame.payload.decode(errors="replace")
        if number < FIRST_LINK or number in self._links or len(self._links) >= MOST_LINKS:
            raise ProtocolError("the guest opens a connection that it may not")
        if name not in self._services:
            raise ProtocolError(f"the guest asks for {name[:40]!r}, which its app has not")
        link = self._links[number] = Link(self._say, number)
        if len(self) < MOST_CARRIED:
            self._tasks.start(f"link {number}", link.carry(self._services[name]))
        else:
            self._say(Kind.CLOSE, number)

    def __len__(self) -> int:
        """How many the node's side has not done with."""
        return len(self._tasks)

    def on_lost(self) -> None:
        """The guest is gone, or the connection to it."""
        for link in self._links.values():
            link.on_ended()
        self._links.clear()

    async def aclose(self) -> None:
        await self._tasks.aclose()


class Link:
    """One connection."""

    def __init__(self, say: Say, number: int) -> None:
        self._say = partial(say, number=number)
        self._inward = Outgoing(LINK_WINDOW_BYTES, lambda data: say(Kind.INPUT, number, data))
        self._outward = Incoming(LINK_WINDOW_BYTES, self._grant)
        self._reading: asyncio.Task[None] | None = None
        self._limit = asyncio.timeout(None)
        self._is_over = False

    def on_frame(self, frame: Frame) -> None:
        match frame.kind:
            case Kind.OUTPUT:
                self._outward.put(frame.payload)
            case Kind.END_OUTPUT:
                self._outward.finish()
            case Kind.TAKEN:
                self._inward.take(frame.payload)
            case _:
                raise ProtocolError(f"the guest said {frame.kind} on a connection")

    def on_ended(self) -> None:
        """The program inside has closed it. What it said before is still delivered."""
        self._is_over = True
        self._outward.finish()
        self._inward.end()
        if self._reading is not None:
            self._read_no_more(self._reading)

    def _read_no_more(self, reading: asyncio.Task[None]) -> None:
        reading.cancel()
        self._limit.reschedule(asyncio.get_running_loop().time() + LINGER_S)

    def _grant(self, count: int) -> None:
        if not self._is_over:
            self._say(Kind.GRANT, payload=struct.pack("<IB", count, 0))

    async def carry(self, path: Path) -> None:
        """Until both have ended, or one is broken."""
        try:
            sock = connect_unix(path, 0)
            reader, writer = await asyncio.open_unix_connection(sock=sock, limit=MAX_PAYLOAD)
            writer.transport.set_write_buffer_limits(MAX_PAYLOAD)
            try:
                if await self._carry(reader, writer):
                    return
            finally:
                writer.transport.abort()
        except OSError:
            pass  # the program inside finds it closed, as if it had connected there itself
        if not self._is_over:
            self._say(Kind.CLOSE)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Returns whether both sides were ended in order."""
        try:
            async with self._limit, Supervisor("link", on_failure=lambda *_: None) as tasks:
                self._reading = tasks.start("inward", self._carry_inward(reader))
                writing = tasks.start("outward", self._carry_outward(writer))
                if self._is_over:
                    self._read_no_more(self._reading)
                both = {self._reading, writing}
                await asyncio.wait(both, return_when=asyncio.FIRST_EXCEPTION)
                return all(
                    one.done() and (one.cancelled() or one.exception() is None) for one in both
                )
        except TimeoutError:
            return True  # the node's side takes nothing, and the guest's has gone
        finally:
            self._reading = None

    async def _carry_inward(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(MAX_PAYLOAD):
            await self._inward.write(data)
        self._say(Kind.END_INPUT)

    async def _carry_outward(self, writer: asyncio.StreamWriter) -> None:
        while block := await self._outward.read():
            writer.write(block)
            await writer.drain()
        writer.write_eof()
