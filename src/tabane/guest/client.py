"""The host's side of one guest's agent: questions, and conversations with what runs inside.

A guest is not trusted. It can be silent (every question has a deadline), lie (what it says is only
ever shown, or believed about itself) and send what it likes: what is no frame, what nobody asked
for, and what is beyond the window that its conversation was granted ends the connection, and is a
fault: an agent of ours does none of that.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType

from tabane.errors import (
    Busy,
    Closed,
    EngineError,
    ProtocolError,
    TabaneError,
    TimedOut,
    UsageError,
)
from tabane.guest.frames import (
    FIRST_LINK,
    NONCE_BYTES,
    VERSION,
    WINDOW_BYTES,
    Frame,
    FrameReader,
    Kind,
    encode_frame,
    encode_hello,
    parse_welcome,
)
from tabane.guest.links import Links
from tabane.guest.streams import Incoming, Outgoing
from tabane.runtimes.api import TerminalSize
from tabane.supervise import Supervisor
from tabane.unix import connect_unix

READ_BYTES = 64 << 10
ANSWER_S = 5.0
"""How long a guest may take to answer. Under emulation it answers in some milliseconds."""
MAX_UNSENT_BYTES = 8 << 20
"""Of what a guest does not take, kept for it: more than the windows of all it can have open."""
MOST_BEFORE_BYTES = 4 << 20
"""Before the welcome: more than what was on its way to another host."""
MOST_TALKS = 64
"""Twice what an agent takes: half of them were given up, and it has not said that they ended."""
MOST_LATE = 1024
"""Questions that nobody waits for any more, whose answers may still come."""
END_S = 4.0
"""How long the end of what nobody wants may take: the guest kills after 2 s."""
RETRY_S = 0.002
END_OF_INPUT = b"\x04"
ERRORS: dict[bytes, type[TabaneError]] = {b"u": UsageError, b"b": Busy}
"""By the first byte of what is refused."""
Services = Mapping[str, Path]
"""By the name that a guest has for each (see `tabane.guest.links`)."""
NOTHING: Services = MappingProxyType({})
OnFault = Callable[[ProtocolError], None]


async def connect(
    path: Path, services: Services = NOTHING, on_fault: OnFault = lambda _: None
) -> Guest:
    """Wait until the agent behind the socket at `path` answers; never by itself otherwise.

    `services`: sockets of the node that programs inside may reach. `on_fault` is told of what the
    guest does, once it has answered, that no agent does. Raises `Closed` when the machine ends
    meanwhile.
    """
    return await greet(await dial(path), services, on_fault)


async def dial(path: Path) -> socket.socket:
    """A connection to the socket at `path`, as soon as it is there."""
    while True:
        with suppress(FileNotFoundError, ConnectionRefusedError):
            return connect_unix(path)
        await asyncio.sleep(RETRY_S)  # the machine's process makes it, and tells nobody


async def greet(
    sock: socket.socket, services: Services = NOTHING, on_fault: OnFault = lambda _: None
) -> Guest:
    """The agent at the other end of a connected socket, which it takes over."""
    sock.setblocking(False)
    guest = Guest(*await asyncio.open_unix_connection(sock=sock), services, on_fault)
    try:
        await guest.greet()
    except BaseException:
        await guest.aclose()
        raise
    return guest


class Guest:
    """A connection to an agent. `aclose` it, whatever happens; the guest goes on."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        services: Services,
        on_fault: OnFault,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._nonce = os.urandom(NONCE_BYTES)
        self._frames = FrameReader()
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[bytes]] = {}
        self._late: dict[int, None] = {}
        self._talks: dict[int, Talk] = {}
        self._links = Links(self.say, services)
        loop = asyncio.get_running_loop()
        self._welcome: asyncio.Future[int] = loop.create_future()
        self._over: asyncio.Future[None] = loop.create_future()
        self._before = 0
        """Bytes that came before the welcome."""
        self._on_fault = on_fault
        self.is_open = True
        self.end: str = ""
        """What it said of the end of the first of its programs to end, while others are ended."""
        self._tasks = Supervisor("guest")
        self._hearing = self._tasks.start("hear", self._hear())

    async def greet(self) -> None:
        """Say hello, and wait for the welcome, which comes when the app's program runs."""
        self._writer.write(encode_hello(self._nonce))
        version = await asyncio.shield(self._welcome)
        if version != VERSION:
            raise EngineError(f"the guest's agent speaks version {version}, not {VERSION}")

    async def aclose(self) -> None:
        """Leave. What was begun inside is given up by the agent. Idempotent."""
        self.abort()
        self._hearing.cancel()
        await self._tasks.aclose()
        await self._links.aclose()
        with suppress(OSError):
            await self._writer.wait_closed()

    def abort(self) -> None:
        """Leave at once. Idempotent."""
        self._lose(Closed("the connection to the guest is closed"))

    def _lose(self, error: Exception) -> None:
        self.is_open = False
        if isinstance(error, ProtocolError):
            self._on_fault(error)
        if not self._over.done():
            self._over.set_result(None)
        self._writer.transport.abort()
        if not self._welcome.done():
            self._welcome.set_exception(error)
            self._welcome.exception()  # somebody may wait for it or not
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)
        self._answers.clear()
        for talk in self._talks.values():
            talk.on_lost(error)
        self._talks.clear()
        self._links.on_lost()

    async def over(self) -> None:
        """Wait until the connection is lost, or one of its programs has ended (`end`)."""
        await asyncio.shield(self._over)

    # What comes

    async def _hear(self) -> None:
        try:
            while data := await self._reader.read(READ_BYTES):
                self._take(data)
            self._lose(Closed("the guest's machine has ended"))
        except (OSError, ProtocolError) as error:
            self._lose(error if isinstance(error, ProtocolError) else Closed(str(error)))
        finally:
            if self.is_open:
                self.abort()

    def _take(self, data: bytes) -> None:
        for frame in self._parse(data):
            if self._welcome.done():
                self._on_frame(frame)
            elif frame.kind == Kind.WELCOME:
                version, nonce = parse_welcome(frame.payload)
                if nonce == self._nonce:
                    self._welcome.set_result(version)

    def _parse(self, data: bytes) -> list[Frame]:
        """Before the welcome there may be what was said to another host, and broken off."""
        if not self._welcome.done():
            self._before += len(data)
            if self._before > MOST_BEFORE_BYTES:
                raise ProtocolError("the guest talks on and on, and does not answer")
        while True:
            try:
                return self._frames.feed(data)
            except ProtocolError:
                if self._welcome.done():
                    raise
                data = b""

    def _on_frame(self, frame: Frame) -> None:
        """Raises `ProtocolError` for what nobody asked for."""
        number = frame.channel
        if number >= FIRST_LINK:
            self._links.on_frame(frame)
        elif frame.kind in (Kind.ANSWER, Kind.BEGUN, Kind.REFUSED):
            self._on_answer(frame)
        elif (talk := self._talks.get(number)) is not None:
            talk.on_frame(frame)
            if frame.kind == Kind.ENDED:
                del self._talks[number]
        elif (number, frame.kind) == (0, Kind.ENDED) and not self.end:
            self._on_end(frame.payload)
        else:
            raise ProtocolError("the guest says something in a conversation that there is not")

    def _on_answer(self, frame: Frame) -> None:
        answer = self._answers.pop(frame.channel, None)
        if answer is None and frame.channel not in self._late:
            raise ProtocolError("the guest answers what nobody asked")
        self._late.pop(frame.channel, None)
        if frame.kind == Kind.REFUSED:
            self._talks.pop(frame.channel, None)
        if answer is None or answer.done():
            return
        if frame.kind == Kind.REFUSED:
            answer.set_exception(_refusal(frame.payload))
        else:
            answer.set_result(frame.payload)

    def _on_end(self, line: bytes) -> None:
        self.end = line.decode(errors="replace").strip()
        if not self._over.done():
            self._over.set_result(None)

    # What is said

    async def call(self, kind: Kind, payload: bytes = b"", *, timeout_s: float = ANSWER_S) -> bytes:
        """Ask, and wait for the answer. Raises what it is refused with, `TimedOut`, `Closed`."""
        return await self._ask(next(self._ids), kind, payload, timeout_s)

    async def wait_listening(self, port: int) -> None:
        """Return when a socket inside takes connections to `port` from outside."""
        number = next(self._ids)
        try:
            await self._ask(number, Kind.LISTEN, struct.pack("<H", port), None)
        except asyncio.CancelledError:
            self.say(Kind.CLOSE, number)
            raise

    async def converse(self, kind: Kind, payload: bytes, *, has_terminal: bool = False) -> Talk:
        """Begin what `kind` says (EXEC, PUT, GET, LIST). Raises what it is refused with."""
        if len(self._talks) >= MOST_TALKS:
            raise Busy("the guest has too many conversations: end some")
        number = next(self._ids)
        talk = self._talks[number] = Talk(self, number, has_terminal=has_terminal)
        try:
            await self._ask(number, kind, payload, ANSWER_S)
        except BaseException:
            talk.leave()
            raise
        return talk

    async def _ask(self, number: int, kind: Kind, payload: bytes, timeout_s: float | None) -> bytes:
        future = asyncio.get_running_loop().create_future()
        self._answers[number] = future
        try:
            self.say(kind, number, payload, must=True)
            async with asyncio.timeout(timeout_s):
                return bytes(await future)
        except TimeoutError:
            raise TimedOut(f"the guest did not answer within {timeout_s:g} s") from None
        finally:
            if self._answers.pop(number, None) is not None:
                self._give_up(number)

    def _give_up(self, number: int) -> None:
        """Nobody waits for that answer any more."""
        self._late[number] = None
        if len(self._late) > MOST_LATE:
            del self._late[next(iter(self._late))]

    def say(self, kind: Kind, number: int, payload: bytes = b"", *, must: bool = False) -> None:
        """Send a frame; it is small, or within a window. `must`: raises `Closed` when none can be
        sent, which else is not said."""
        if self.is_open:
            self._writer.write(encode_frame(kind, number, payload))
            if self._writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
                self._lose(ProtocolError("the guest takes nothing of what it is told"))
        elif must:
            raise Closed("the connection to the guest is closed")


def _refusal(payload: bytes) -> Exception:
    words = payload[1:].decode(errors="replace")
    return ERRORS.get(payload[:1], EngineError)(words or "the guest refuses it")


class Talk:
    """A `Conversation` with something in the guest."""

    def __init__(self, guest: Guest, number: int, *, has_terminal: bool) -> None:
        self._guest = guest
        self._number = number
        self._has_terminal = has_terminal
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._is_closed = False
        self._input_ended = False
        self._input = Outgoing(WINDOW_BYTES, partial(guest.say, Kind.INPUT, number))
        self.stdout = Incoming(WINDOW_BYTES, partial(self._grant, 0))
        self._errors = Incoming(WINDOW_BYTES, partial(self._grant, 1))

    @property
    def stderr(self) -> Incoming | None:
        return None if self._has_terminal else self._errors

    def on_frame(self, frame: Frame) -> None:
        """Take what the guest says about it. Raises `ProtocolError`."""
        match frame.kind:
            case Kind.OUTPUT:
                self.stdout.put(frame.payload)
            case Kind.COMPLAINT:
                self._errors.put(frame.payload)
            case Kind.TAKEN:
                self._input.take(frame.payload)
            case Kind.ENDED if len(frame.payload) == 4:
                self._end(lambda: self._ended.set_result(frame.payload[0]))
            case _:
                raise ProtocolError(f"the guest said {frame.kind} in a conversation")

    def on_lost(self, error: Exception) -> None:
        """The guest is gone, or the connection to it."""

        def fail() -> None:
            self._ended.set_exception(error)
            self._ended.exception()

        self._end(fail)

    def _end(self, tell: Callable[[], None]) -> None:
        if not self._ended.done():
            tell()
        self._input.end()
        for stream in (self.stdout, self._errors):
            stream.finish()

    def _grant(self, which: int, count: int) -> None:
        if not self._ended.done():
            self._guest.say(Kind.GRANT, self._number, struct.pack("<IB", count, which))

    async def write(self, data: bytes) -> None:
        await self._input.write(data)

    async def end_input(self) -> None:
        if self._has_terminal:
            await self.write(END_OF_INPUT)
        elif not self._input_ended:
            self._input_ended = True
            self._guest.say(Kind.END_INPUT, self._number)

    async def resize(self, size: TerminalSize) -> None:
        if self._has_terminal:
            self._guest.say(Kind.RESIZE, self._number, struct.pack("<HH", size.rows, size.columns))

    async def signal(self, number: int) -> None:
        self._guest.say(Kind.SIGNAL, self._number, struct.pack("<I", number))

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    def leave(self) -> None:
        """Nobody wants it any more: what comes is dropped, until the guest says that it has ended.
        Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._guest.say(Kind.CLOSE, self._number)
        self._input.end()
        for stream in (self.stdout, self._errors):
            stream.drop()

    async def aclose(self) -> None:
        self.leave()
        with suppress(TimeoutError, Closed, ProtocolError):
            async with asyncio.timeout(END_S):
                await asyncio.shield(self._ended)
