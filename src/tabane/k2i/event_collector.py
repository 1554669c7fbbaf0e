"""Passes the kernel's process events on to pid namespaces that it tells nothing: those of the nodes
of a local cluster (`python -m tabane.k2i.event_collector SOCKET`).

It runs outside of them. Who connects is told what happens in its own pid namespace and below, in
that namespace's pids; whose it is the kernel says (peer credentials), not the one who asks. A
process is a namespace's when its parent is, or when the namespace is among those it is in; its pid
there is in `NSpid` of its status, from its birth until it is reaped. One that was reaped before it
could be looked at has the pid None.

It keeps itself: a first process, which does nothing but wait, starts another one that collects, and
one more when that has ended otherwise than by TERM. So nodes are without events for some seconds if
it is killed, and until the next `tabane up` only if the first one is.

The first line of output is `ready PID START_TICKS`, of the first process, or why it cannot run.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from tabane.clock import SYSTEM
from tabane.errors import TabaneError
from tabane.k2i.event_sources import Connector, Greeting, event_of
from tabane.k2i.events import Event, Told
from tabane.k2i.procfs import GONE, start_ticks
from tabane.security.identity import peer_principal
from tabane.supervise import Supervisor
from tabane.unix import shortened

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
NS_GET_PARENT = 0xB702
WAITING_BYTES = 8 << 20
"""What waits for one reader, before it gets a gap instead."""
ENDING = {signal.SIGTERM, signal.SIGINT}
CANNOT = 3
"""Exit code of one that the kernel tells nothing, or that cannot listen."""
RESTART_S, MOST_PAUSE_S = 1.0, 60.0
"""Before it is started again: the first time, and at most."""
BEHIND = "events waited too long to be taken from the collector"

_encode = msgspec.json.Encoder().encode


class Place(NamedTuple):
    """A process in a namespace that is listened for: its id, and the pid there if known."""

    space: int
    pid: int | None


Look = Callable[[int], tuple[int, ...]]
"""Of a process its numbers for /proc: empty when it is gone."""


class Places:
    """Which processes are in which namespace, kept up to date with what the kernel tells."""

    def __init__(self, pids_of: Look, spaces_of: Look) -> None:
        """Of a process: its pids, the machine's first; its namespaces, its own first."""
        self._pids_of = pids_of
        self._spaces_of = spaces_of
        self._depths: dict[int, int] = {}
        self._places: dict[int, Place] = {}
        self._parents: dict[int, int | None] = {}
        """As they were told at a birth: at an end the kernel does not know the parent any more when
        that was quicker to reap."""

    def add(self, space: int, depth: int, pids: Iterable[int]) -> None:
        """Listen for a namespace with so many above it. `pids`: all that run on the machine."""
        self._depths[space] = depth
        for pid in pids:
            self._find(pid)

    def remove(self, space: int) -> None:
        self._depths.pop(space, None)
        gone = [pid for pid, place in self._places.items() if place.space == space]
        for pid in gone:
            del self._places[pid]
            self._parents.pop(pid, None)

    def take(self, told: Told) -> tuple[Place, int | None] | None:
        """Where it happened, and the parent's pid there; None when nobody listens for that."""
        parent = self._places.get(told.parent)
        if told.kind == "fork":
            place = self._find(told.pid, parent.space if parent else None)
            if place is not None and parent is not None and parent.space == place.space:
                self._parents[told.pid] = parent.pid
        elif told.kind == "exit":
            place = self._places.pop(told.pid, None)
            remembered = self._parents.pop(told.pid, None)
            if place is not None and parent is None:
                return place, remembered
        else:
            place = self._places.get(told.pid)
            if place is not None and place.pid is None:
                place = self._find(told.pid, place.space)
        if place is None:
            return None
        return place, parent.pid if parent and parent.space == place.space else None

    def _find(self, pid: int, space: int | None = None) -> Place | None:
        """Where a process is, which is in `space` if that is known."""
        pids = self._pids_of(pid)
        if space is None and len(pids) > 1:
            space = next((one for one in self._spaces_of(pid) if one in self._depths), None)
        if space is None:
            self._places.pop(pid, None)
            return None
        depth = self._depths[space]
        place = self._places[pid] = Place(space, pids[depth] if depth < len(pids) else None)
        return place


def pids_of(pid: int) -> tuple[int, ...]:
    """Of a process its pids in the machine's namespace and in each below that it is in."""
    try:
        status = Path(f"/proc/{pid}/status").read_bytes()
    except GONE:
        return ()
    return parse_pids(status)


def parse_pids(status: bytes) -> tuple[int, ...]:
    """The same, of a `status` file; none while it is being reaped: its numbers, given back
    already, are told as 0."""
    at = status.find(b"\nNSpid:\t")
    pids = tuple(map(int, status[at + 8 :].split(b"\n", 1)[0].split())) if at >= 0 else ()
    return () if 0 in pids else pids


def spaces_of(pid: int) -> tuple[int, ...]:
    """The pid namespaces of a process, its own first; none when it is gone."""
    try:
        return namespaces_of(pid)
    except GONE:
        return ()


def namespaces_of(pid: int) -> tuple[int, ...]:
    """The inode numbers of its pid namespace and of those above it, up to one's own. Raises one of
    `procfs.GONE`."""
    spaces: list[int] = []
    fd = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    while True:
        spaces.append(os.fstat(fd).st_ino)
        try:
            above = fcntl.ioctl(fd, NS_GET_PARENT)
        except PermissionError:
            return tuple(spaces)
        finally:
            os.close(fd)
        fd = above


class Collector:
    """Tells its clients what the connector tells."""

    def __init__(self, connector: Connector, tasks: Supervisor) -> None:
        self._connector = connector
        self._tasks = tasks
        self._places = Places(pids_of, spaces_of)
        self._clients: dict[asyncio.StreamWriter, int] = {}
        self._serving: set[asyncio.Task[None] | None] = set()
        self._behind: set[asyncio.StreamWriter] = set()

    async def listen(self, path: Path) -> asyncio.Server:
        """On a unix socket that only the owner may use."""
        path.unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            with shortened(path) as short:
                return await asyncio.start_unix_server(self._serve, short)
        finally:
            os.umask(mask)

    async def collect(self) -> None:
        """Until cancelled."""
        while True:
            told = await self._connector.read()
            events: dict[int, list[Event]] = {}
            for news in told:
                for space, event in self._translate(news):
                    events.setdefault(space, []).append(event)
            for client, space in list(self._clients.items()):
                if space in events:
                    self._send(client, events[space])

    async def aclose(self) -> None:
        """Hang up on all."""
        for client in self._clients:
            client.transport.abort()
        serving = [task for task in self._serving if task is not None]
        if serving:
            await asyncio.wait(serving)

    def _translate(self, told: Told) -> list[tuple[int, Event]]:
        if told.kind == "gap":
            return [(space, event_of(told, None, None)) for space in set(self._clients.values())]
        found = self._places.take(told)
        if found is None:
            return []
        place, parent = found
        return [(place.space, event_of(told, place.pid, parent))]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._serving.add(asyncio.current_task())
        try:
            who = peer_principal(writer.get_extra_info("socket"))
            spaces = namespaces_of(who.pid)
            greeting = Greeting()
            self._places.add(spaces[0], len(spaces) - 1, all_pids())
            self._clients[writer] = spaces[0]
        except GONE:
            greeting = Greeting("the collector cannot see who asks: is it in a namespace above?")
        writer.write(_encode(greeting) + b"\n")
        try:
            await reader.read()
        except OSError:
            pass
        finally:
            space = self._clients.pop(writer, None)
            self._behind.discard(writer)
            self._serving.discard(asyncio.current_task())
            if space is not None and space not in self._clients.values():
                self._places.remove(space)
            writer.close()

    def _send(self, client: asyncio.StreamWriter, events: list[Event]) -> None:
        if client.transport.get_write_buffer_size() > WAITING_BYTES:
            self._behind.add(client)
            return
        if client in self._behind:
            self._behind.discard(client)
            events = [Event(kind="gap", at=events[0].at, reason=BEHIND), *events]
        for start in range(0, len(events), 100):
            client.write(_encode(events[start : start + 100]) + b"\n")


def enter_first_network() -> None:
    """The kernel tells only who is in the machine's first network namespace, where its own threads
    are (the first is 2). Where this is refused, so is listening, with a better reason."""
    with suppress(OSError), open("/proc/2/ns/net") as namespace:  # noqa: PTH123
        ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET)


def all_pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def say(text: str) -> None:
    """To who started it, who may be gone by now."""
    with suppress(BrokenPipeError):
        os.write(1, text.encode() + b"\n")
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)


async def serve(path: Path) -> None:
    """Until TERM. Raises `Unavailable` when the kernel does not tell."""
    loop = asyncio.get_running_loop()
    told_to_end = asyncio.Event()
    for number in ENDING:
        loop.add_signal_handler(number, told_to_end.set)
    connector = Connector()
    async with Supervisor("collector") as tasks:
        collector = Collector(connector, tasks)
        server = await collector.listen(path)
        tasks.keep("collect", collector.collect)
        say(f"ready {os.getppid()} {start_ticks(os.getppid())}")
        await told_to_end.wait()
        server.close()
        await collector.aclose()
    connector.close()


def collect(path: Path) -> int:
    """The exit code."""
    try:
        asyncio.run(serve(path))
    except TabaneError as error:
        say(error.message)
        return CANNOT
    except OSError as error:
        say(f"the collector cannot listen on {path}: {error.strerror}")
        return CANNOT
    return 0


def keep(work: Callable[[], int]) -> int:
    """Have a child do it, and another one when that ends otherwise than with 0 or `CANNOT`. Returns
    what it ended with; in a child, what `work` returned. TERM ends it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {*ENDING, signal.SIGCHLD})
    pause_s = RESTART_S
    while True:
        began = SYSTEM.now()
        child = os.fork()
        if child == 0:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            return work()
        code, told = _wait(child)
        if told or code in (0, CANNOT):
            return code
        if SYSTEM.now() - began > MOST_PAUSE_S:
            pause_s = RESTART_S
        if signal.sigtimedwait(ENDING, pause_s):
            return 0
        pause_s = min(2 * pause_s, MOST_PAUSE_S)


def _wait(child: int) -> tuple[int, bool]:
    """How it ended, and whether it was told to."""
    told = False
    while True:
        if signal.sigwait({*ENDING, signal.SIGCHLD}) != signal.SIGCHLD:
            told = True
            os.kill(child, signal.SIGTERM)
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status), told


def main(argv: list[str]) -> int:
    enter_first_network()
    return keep(lambda: collect(Path(argv[0])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
