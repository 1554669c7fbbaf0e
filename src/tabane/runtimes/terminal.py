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

import msgspec

from tabane.errors import EngineError
from tabane.model import ExitStatus
from tabane.runtimes.api import Command, Conversation, Execution, Spawner, TerminalSize
from tabane.runtimes.ending import end_session
from tabane.runtimes.inside import Files, Place, describe_process, look_up, read_pid
from tabane.runtimes.process import start_ticks
from tabane.runtimes.streams import Sink, Source, wait_readable
from tabane.supervise import Supervisor

END_OF_INPUT = b"\x04"
LARGEST_MESSAGE = 4096
"""The engine's, which names the terminal beside its descriptor."""


class Terminal:
    """A `Conversation` over a terminal. `members` tells the container's processes."""

    stderr = None

    def __init__(
        self,
        master: int,
        key: str,
        leader: tuple[int, int],
        spawner: Spawner,
        members: Callable[[], list[int]],
        forget: Callable[[], None],
    ) -> None:
        self._sink = Sink(os.dup(master))
        self.stdout = Source(master)
        self._master = master
        self._key = key
        self._leader = leader
        self._spawner = spawner
        self._members = members
        self._forget = forget
        self._is_open = True
        self._tasks = Supervisor("terminal", on_failure=lambda *_: None)
        self._ended = self._tasks.start("end", self._wait_end())

    async def _wait_end(self) -> int:
        try:
            status = await self._spawner.exited(self._key)
        finally:
            self.stdout.finish()
        return 128 + status.signal if status.signal else status.code

    async def write(self, data: bytes) -> None:
        await self._sink.write(data)

    async def end_input(self) -> None:
        await self._sink.write(END_OF_INPUT)

    async def resize(self, size: TerminalSize) -> None:
        if self._is_open:
            set_size(self._master, size)

    async def signal(self, number: int) -> None:
        await self._spawner.signal(self._key, number)

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    async def aclose(self) -> None:
        if not self._ended.done():
            await end_session(*self._leader, self._members, self._hang_up)
        self._hang_up()
        await self._tasks.aclose()
        await self._spawner.forget(self._key)
        self._forget()

    def _hang_up(self) -> None:
        self._is_open = False
        self._sink.close()
        self.stdout.close()


def set_size(terminal: int, size: TerminalSize) -> None:
    """Its programs are told by the kernel (WINCH)."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", size.rows, size.columns, 0, 0))


async def converse(
    place: Place, execution: Execution, spawner: Spawner, members: Callable[[], list[int]]
) -> Conversation:
    """Begin to run a command with a terminal. Raises `EngineError`."""
    assert execution.terminal is not None
    process = describe_process((place.directory / "config.json").read_bytes(), execution)
    if (problem := look_up(Path(f"/proc/{place.pid}/root"), process)) is not None:
        return problem
    files = Files(place.directory)
    files.description.write_bytes(msgspec.json.encode(process))
    key = key_of(place.container, files.name)
    beginning = Supervisor("console", on_failure=lambda *_: None)
    try:
        begin = beginning.start("begin", _begin(place, files, key, spawner, execution.terminal))
        master = await asyncio.shield(begin)  # an engine cannot be stopped half-way
    except BaseException:
        await _give_up(begin, key, files, spawner, members)
        await beginning.aclose()
        raise
    leader = read_pid(files.pid) or 0
    return Terminal(master, key, (leader, start_ticks(leader)), spawner, members, files.remove)


def key_of(container: str, name: str) -> str:
    """Of a command in the spawner's books."""
    return f"{container}/{name}"


async def _begin(place: Place, files: Files, key: str, spawner: Spawner, size: TerminalSize) -> int:
    """The terminal, once the engine has ended."""
    directory = os.open(place.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with socket.socket(socket.AF_UNIX) as console:
        try:
            # both of us reach it by this name, which is never too long for a socket
            path = f"/proc/{os.getpid()}/fd/{directory}/{files.console.name}"
            console.bind(path)
            console.listen(1)
            console.setblocking(False)
            options = ("--tty", "--detach", "--console-socket", path, *files.options())
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
    words = finished.output.strip() or finished.status.describe()
    problem = f"no terminal could be opened in {place.container}: {words}"
    raise EngineError(problem, argv=argv, status=finished.status.code, output=words)


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


async def _give_up(
    begin: asyncio.Task[int],
    key: str,
    files: Files,
    spawner: Spawner,
    members: Callable[[], list[int]],
) -> None:
    """Nobody wants it any more, or it failed: nothing may be left of it."""
    with suppress(Exception):
        os.close(await begin)
    if (leader := read_pid(files.pid)) is not None:
        await end_session(leader, start_ticks(leader), members)
    await spawner.forget(key)
    files.remove()
