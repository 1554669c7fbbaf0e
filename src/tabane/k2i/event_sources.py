"""Where process events come from, best first.

- `Connector`: the kernel's own, which tells only who is root in the first pid and network
  namespaces of the machine;
- `Collected`: a collector (`tabane.k2i.event_collector`) that runs there and passes on what
  concerns one's own pid namespace;
- `Compared`: two looks at the process table. What comes and goes between them is missed.

Each is opened, then gives lists of events until it is closed. Opening raises `Unavailable`, whose
message says why it is not to be had.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Protocol

import msgspec

from tabane.clock import SYSTEM, Clock, sleep_until
from tabane.errors import Unavailable
from tabane.k2i.events import (
    CN_IDX_PROC,
    Event,
    Told,
    decode_name,
    encode_listen,
    exit_of,
    parse_told,
)
from tabane.k2i.process import Process
from tabane.k2i.procfs import stat_of
from tabane.unix import shortened

NETLINK_CONNECTOR = 11
SO_RCVBUFFORCE = 33
BUFFER_BYTES = 8 << 20
"""Some ten thousand events: the kernel counts about 800 bytes for each."""
DATAGRAM_BYTES = 4096
BATCH = 512
"""Events taken in one go, so that others have their turn."""
LINE_BYTES = 1 << 16
LOOK_S = 1.0
GREET_S = 2.0
"""For a collector's first line: it may be stopped, or very busy."""
LOST = "the kernel had more to tell than was taken in time"


class Source(Protocol):
    """`name` is `kernel`, `collector` or `looks`; only the last misses what is short-lived."""

    name: str

    def __aiter__(self) -> AsyncIterator[list[Event]]: ...

    def close(self) -> None:
        """Idempotent."""


Open = Callable[[], Awaitable[Source]]


class Connector:
    """The kernel's process events, as `Told` in the pids of the machine. Needs an event loop."""

    def __init__(self) -> None:
        """Raises `Unavailable`."""
        self._sock = _listen()
        self._ready = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._sock, self._ready.set)

    async def read(self) -> list[Told]:
        """What was told since; one of kind `gap` stands where some is missing."""
        while True:
            await self._ready.wait()
            told = self._take()
            if told:
                await asyncio.sleep(0)
                return told

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()

    def _take(self) -> list[Told]:
        told: list[Told] = []
        for _ in range(BATCH):
            try:
                data = self._sock.recv(DATAGRAM_BYTES)
            except BlockingIOError:
                self._ready.clear()
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                told.append(Told("gap"))
                continue
            news = parse_told(data)
            if news is not None and news.kind != "ack":
                told.append(news)
        return told


def _listen() -> socket.socket:
    try:
        sock = socket.socket(
            socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, NETLINK_CONNECTOR
        )
    except OSError as error:
        raise Unavailable(f"the kernel tells no process events here: {error.strerror}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        if os.geteuid() == 0:
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
        sock.bind((0, CN_IDX_PROC))
        sock.send(encode_listen())
        _check_accepted(sock)
    except OSError as error:
        sock.close()
        raise Unavailable(f"the kernel refuses to tell process events: {error.strerror}") from None
    except Unavailable:
        sock.close()
        raise
    return sock


def _check_accepted(sock: socket.socket) -> None:
    """The kernel answers while the request is sent; to other pid namespaces it does not."""
    while True:
        try:
            news = parse_told(sock.recv(DATAGRAM_BYTES))
        except BlockingIOError:
            raise Unavailable(
                "the kernel tells process events only in the machine's first pid and network "
                "namespaces"
            ) from None
        if news is not None and news.kind == "ack":
            if news.number:
                reason = os.strerror(news.number)
                raise Unavailable(f"the kernel refuses to tell process events: {reason}")
            return


class KernelEvents:
    """The machine's events from the kernel."""

    name = "kernel"

    def __init__(self, connector: Connector, root: Path) -> None:
        self._connector = connector
        self._root = root

    @classmethod
    async def open(cls, root: Path = Path("/proc")) -> KernelEvents:
        """Raises `Unavailable`."""
        return cls(Connector(), root)

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        while True:
            told = await self._connector.read()
            yield [event_of(news, news.pid, news.parent, self._root) for news in told]

    def close(self) -> None:
        self._connector.close()


def event_of(told: Told, pid: int | None, parent: int | None, root: Path = Path("/proc")) -> Event:
    """As an event of a node where the process is `pid` and its parent `parent`. Reads what the
    kernel does not tell, if the process is still there."""
    at = told.at_ns / 1e9
    if told.kind == "gap":
        return Event(kind="gap", at=SYSTEM.now(), reason=LOST)
    if told.kind == "exit":
        code, ended_by = exit_of(told.number)
        return Event(kind="exit", at=at, pid=pid, ppid=parent, code=code, signal=ended_by)
    stat = stat_of(told.pid, root)
    start_ticks, name = (stat.starttime, stat.comm) if stat else (None, "")
    if told.kind == "comm":
        name = decode_name(told.name)
    return Event(
        kind=told.kind,
        at=at,
        pid=pid,
        ppid=parent if told.kind == "fork" else None,
        start_ticks=start_ticks,
        name=name,
        uid=told.number if told.kind in ("uid", "gid") else None,
    )


class Collected:
    """The events of one's own pid namespace, from a collector outside of it."""

    name = "collector"

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, path: Path) -> Collected:
        """Raises `Unavailable`, also when the collector itself is not told."""
        try:
            with shortened(path) as short:
                reader, writer = await asyncio.open_unix_connection(short, limit=LINE_BYTES)
        except OSError as error:
            why = error.strerror or error
            raise Unavailable(f"no collector of process events at {path}: {why}") from None
        source = cls(reader, writer)
        try:
            async with asyncio.timeout(GREET_S):
                greeting = msgspec.json.decode(await reader.readline(), type=Greeting)
        except (OSError, ValueError, msgspec.DecodeError) as error:
            source.close()
            how = "does not answer" if isinstance(error, TimeoutError) else "hung up"
            raise Unavailable(f"the collector at {path} {how}") from None
        except BaseException:
            source.close()
            raise
        if greeting.refused:
            source.close()
            raise Unavailable(greeting.refused)
        return source

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        decode = msgspec.json.Decoder(list[Event]).decode
        while line := await self._reader.readline():
            yield decode(line)

    def close(self) -> None:
        self._writer.close()


class Greeting(msgspec.Struct, frozen=True):
    """The first line of a collector; each that follows is a list of events."""

    refused: str = ""


class Compared:
    """Births and deaths as two looks at the table, `LOOK_S` apart, show them."""

    name = "looks"

    def __init__(self, look: Callable[[], list[Process]], clock: Clock = SYSTEM) -> None:
        """`look` blocks: it is done on a thread."""
        self._look = look
        self._clock = clock
        self._before: list[Process] | None = None

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        while True:
            at = self._clock.now()
            now = await asyncio.to_thread(self._look)
            before, self._before = self._before, now
            events = compare(before, now, at) if before is not None else []
            if events:
                yield events
            await sleep_until(self._clock, at + LOOK_S)

    def close(self) -> None:
        """Nothing to do."""


def compare(before: Iterable[Process], now: Iterable[Process], at: float) -> list[Event]:
    """The events that make one table the other: deaths, then births and new names."""
    old = {(process.pid, process.start_ticks): process for process in before}
    new = {(process.pid, process.start_ticks): process for process in now}

    def event(kind: str, process: Process, ppid: int | None = None) -> Event:
        return Event(
            kind=kind,
            at=at,
            pid=process.pid,
            ppid=ppid,
            start_ticks=process.start_ticks,
            name=process.name,
            uid=process.uid if kind == "uid" else None,
        )

    events = [event("exit", old[key], old[key].ppid) for key in old.keys() - new.keys()]
    for key, process in new.items():
        known = old.get(key)
        if known is None:
            events.append(event("fork", process, process.ppid))
        elif known.command != process.command and process.state != "Z":
            events.append(event("exec", process))
        elif known.name != process.name:
            events.append(event("comm", process))
        if known is not None and known.uid != process.uid:
            events.append(event("uid", process))
    return events
