"""A command inside with a terminal of its own.

The engine makes the terminal in the container's own /dev/pts, sends its other side over a socket
(`--console-socket`) and ends; the spawner, which inherits the program, tells how that ends. So no
engine stands between, and the agent's descriptor is the only one: when the agent dies, the kernel
hangs up.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tabane.errors import EngineError
from tabane.model import ExitStatus
from tabane.runtimes.api import Command, Conversation, Execution, Spawner, TerminalSize
from tabane.runtimes.ending import end_session
from tabane.runtimes.inside import (
    END_TIMEOUT_S,
    Begin,
    Files,
    Place,
    Spawned,
    describe_process,
    failed,
    look_up,
    spawn,
)
from tabane.runtimes.streams import Sink, Source, wait_readable
from tabane.supervise import Supervisor

END_OF_INPUT = b"\x04"
LARGEST_MESSAGE = 4096
"""The engine's, which names the terminal beside its descriptor."""
LONGEST_SOCKET = 107
"""Of the name of one (unix(7))."""


class Leader(Spawned):
    """A command that leads a session. `members` tells the container's processes."""

    def __init__(
        self, key: str, files: Files, spawner: Spawner, *, members: Callable[[], list[int]]
    ) -> None:
        super().__init__(key, files, spawner)
        self._members = members

    async def end(self, hang_up: Callable[[], None] = lambda: None) -> None:
        with suppress(TimeoutError):  # all has been killed by then
            async with asyncio.timeout(END_TIMEOUT_S):
                await end_session(self.pid, self.began, self._members, hang_up)


class Terminal:
    """A `Conversation` over a terminal."""

    stderr = None

    def __init__(self, master: int, spawned: Spawned) -> None:
        self._sink = Sink(os.dup(master))
        self.stdout = Source(master)
        self._master = master
        self._spawned = spawned
        self._is_open = True
        self._tasks = Supervisor("terminal", on_failure=lambda *_: None)
        self._ended = self._tasks.start("end", self._wait_end())

    async def _wait_end(self) -> int:
        try:
            return await self._spawned.wait()
        finally:
            self.stdout.finish()

    async def write(self, data: bytes) -> None:
        await self._sink.write(data)

    async def end_input(self) -> None:
        await self._sink.write(END_OF_INPUT)

    async def resize(self, size: TerminalSize) -> None:
        if self._is_open:
            set_size(self._master, size)

    async def signal(self, number: int) -> None:
        await self._spawned.signal(number)

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    async def aclose(self) -> None:
        if not self._ended.done():
            await self._spawned.end(self._hang_up)
        self._hang_up()
        await self._tasks.aclose()
        await self._spawned.forget()

    def _hang_up(self) -> None:
        self._is_open = False
        self._sink.close()
        self.stdout.close()


def set_size(terminal: int, size: TerminalSize) -> None:
    """Its programs are told by the kernel (WINCH)."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", size.rows, size.columns, 0, 0))


async def converse(
    place: Place, execution: Execution, spawner: Spawner, begin: Begin
) -> Conversation:
    """Begin to run a command with a terminal; `begin` makes what can end its whole session. Raises
    `EngineError`."""
    assert execution.terminal is not None
    size = execution.terminal
    process = describe_process((place.directory / "config.json").read_bytes(), execution)
    if (problem := look_up(Path(f"/proc/{place.pid}/root"), process)) is not None:
        return problem

    async def run(files: Files, key: str) -> int:
        return await _begin(place, files, key, spawner, size)

    spawned, master = await spawn(place, process, spawner, run=run, begin=begin, give_up=os.close)
    return Terminal(master, spawned)


async def _begin(place: Place, files: Files, key: str, spawner: Spawner, size: TerminalSize) -> int:
    """The terminal, once the engine has ended."""
    directory = os.open(place.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with socket.socket(socket.AF_UNIX) as console:
        try:
            path = str(files.console)
            if len(path) > LONGEST_SOCKET:
                # root reaches it by this name, too, which is never too long for a socket
                path = f"/proc/{os.getpid()}/fd/{directory}/{files.console.name}"
            console.bind(path)
            os.chown(files.console, *_owner_of(place))
            console.listen(1)
            console.setblocking(False)
            options = ("--detach", "--console-socket", path, *files.options())
            argv = (*place.engine, "exec", *options, place.container)
            async with Supervisor("console", on_failure=lambda *_: None) as tasks:
                taking = tasks.start("terminal", _take_terminal(console, size))
                await spawner.spawn(Command(key, argv, pid_file=files.pid))
                finished = await spawner.finished(key)
                if finished.status == ExitStatus():
                    master: int = await taking  # it was sent before the engine ended
                    return master
        finally:
            os.close(directory)
    if taking.done() and not taking.cancelled() and taking.exception() is None:
        os.close(taking.result())
    problem = f"no terminal could be opened in {place.container}"
    raise failed(problem, argv, finished, finished.output)


def _owner_of(place: Place) -> tuple[int, int]:
    """Who connects to the console's socket: an engine may run as the instance's own root."""
    found = place.directory.stat()
    return found.st_uid, found.st_gid


async def _take_terminal(console: socket.socket, size: TerminalSize) -> int:
    """Give it its size at once: not every engine does, and the program is about to start."""
    loop = asyncio.get_running_loop()
    connection, _ = await loop.sock_accept(console)
    with connection:
        connection.setblocking(False)
        await wait_readable(connection.fileno())
        _, descriptors, _, _ = socket.recv_fds(connection, LARGEST_MESSAGE, 1)
    if not descriptors:
        raise EngineError("the engine sent no terminal")
    set_size(descriptors[0], size)
    return descriptors[0]
