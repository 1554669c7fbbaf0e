"""A command inside a container that runs: as the main process in all but its words.

User, groups, environment, capabilities and limits are those of the container's `config.json`, which
the engine is given again as a process description (`exec --process`); without one it would enter as
root in /. Whether the program is there is looked up first, since engines differ in how they say so.

The engine hands the program its streams and ends; the spawner, which inherits the program, tells
how that ends. So no engine stands between, which would copy what is said, or wait for what is left
behind with the streams in its hands.

Without a terminal these are pipes, and an init of its own stands above the program and adopts what
that leaves behind, so that all of it is found, and killed, when nobody waits for it any more. With
a terminal (see `terminal.py`) the program leads its own session, as everywhere: under an init, what
Ctrl-Z stops could not be continued by anyone.

What the end of an agent leaves of either is found by the pid files, and ended by the next agent.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import stat
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tabane.errors import EngineError, NotFound, UsageError
from tabane.model import ExitStatus, Value
from tabane.runtimes.api import Command, Conversation, Execution, Finished, Spawner, TerminalSize
from tabane.runtimes.bundle import INIT
from tabane.runtimes.ending import end_below, kill_below
from tabane.runtimes.lookup import find_command, is_file, resolve
from tabane.runtimes.process import start_ticks
from tabane.runtimes.streams import Sink, Source, Words
from tabane.supervise import Supervisor
from tabane.unix import open_nothing

NOT_EXECUTABLE, NOT_FOUND = 126, 127
"""Exit codes, as of a shell."""
ENGINE_TIMEOUT_S = 10.0
"""How long an engine whose command nobody wants any more may go on: one that asks a kernel of its
own that does not answer would never end."""
END_TIMEOUT_S = 4.0
"""How long the end of a program may take: the time that it has after it was hung up on, and then
under 0.1 s as a rule. One that is frozen ends once it is thawed."""
PREFIX = "exec-"
"""Of the files for one command, in the instance's directory."""
PID_SUFFIX, INSIDE_SUFFIX = ".pid", ".inside"
"""Of those with its pid, on the node and inside."""


class Place(Value, frozen=True):
    """Where a command runs: the container's name, the pid of a process with its files and its ids,
    the instance's directory, and the engine with its options."""

    container: str
    pid: int
    directory: Path
    engine: tuple[str, ...]
    tells_inside: bool = False
    """The engine can write down a command's pid inside, where the node has none for it."""
    init: tuple[str, ...] = (INIT, "-s", "--")
    """Stands above a program without a terminal; empty: what that leaves behind goes to the
    container's first process."""


class Said:
    """A `Conversation` that is over: what was to run could not."""

    def __init__(self, code: int, words: str) -> None:
        self.stdout = Words()
        self.stderr = Words(words.encode())
        self._code = code

    async def write(self, data: bytes) -> None: ...

    async def end_input(self) -> None: ...

    async def resize(self, size: TerminalSize) -> None: ...

    async def signal(self, number: int) -> None: ...

    async def wait(self) -> int:
        return self._code

    async def aclose(self) -> None: ...


Streams = tuple[Sink | None, Source, Source | None]
"""A program's stdin, stdout and stderr, at our ends; a terminal's stderr is its stdout."""


class Piped:
    """A `Conversation` over pipes. `code` returns the program's exit code, at its end; `end` ends
    all it does; `tell` passes a signal on; `forget` removes what was made for it."""

    def __init__(
        self,
        streams: Streams,
        *,
        code: Callable[[], Awaitable[int]],
        end: Callable[[], Awaitable[None]],
        tell: Callable[[int], Awaitable[None]],
        forget: Callable[[], Awaitable[None]],
    ) -> None:
        self._stdin, self.stdout, self.stderr = streams
        self._code = code
        self._end = end
        self._tell = tell
        self._forget = forget
        self._tasks = Supervisor("conversation", on_failure=lambda *_: None)
        self._ended = self._tasks.start("end", self._wait_end())

    async def _wait_end(self) -> int:
        """Whoever still has the other ends: what is there then is all."""
        try:
            return await self._code()
        finally:
            self.stdout.finish()
            if self.stderr is not None:
                self.stderr.finish()

    async def write(self, data: bytes) -> None:
        if self._stdin is not None:
            await self._stdin.write(data)

    async def end_input(self) -> None:
        if self._stdin is not None:
            self._stdin.close()

    async def resize(self, size: TerminalSize) -> None: ...

    async def signal(self, number: int) -> None:
        await self._tell(number)

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    async def aclose(self) -> None:
        await self.end_input()
        if not self._ended.done():
            await self._end()
        close_streams((self._stdin, self.stdout, self.stderr))
        await self._tasks.aclose()
        await self._forget()


def open_pipes(*, stdin: bool) -> tuple[tuple[int, int, int], tuple[Sink | None, Source, Source]]:
    """The program's ends, which the caller closes once it has them, and ours. `stdin`: or it has
    nothing to read."""
    give, ours = os.pipe() if stdin else (open_nothing(), -1)
    (said, say), (complained, complain) = os.pipe(), os.pipe()
    return (give, say, complain), (Sink(ours) if stdin else None, Source(said), Source(complained))


def close_streams(streams: Streams) -> None:
    """Idempotent."""
    for stream in streams:
        if stream is not None:
            stream.close()


async def start_piped(
    argv: tuple[str, ...], *, stdin: bool, env: dict[str, str] | None = None
) -> tuple[asyncio.subprocess.Process, Streams]:
    """A child, and our ends of its streams."""
    theirs, streams = open_pipes(stdin=stdin)
    give, say, complain = theirs
    try:
        child = await asyncio.create_subprocess_exec(
            *argv, stdin=give, stdout=say, stderr=complain, env=env
        )
    except BaseException:
        close_streams(streams)
        raise
    finally:
        for descriptor in theirs:
            os.close(descriptor)
    return child, streams


class Spawned:
    """A command in the spawner's books, which has begun."""

    def __init__(self, key: str, files: Files, spawner: Spawner) -> None:
        self._key = key
        self.files = files
        self._spawner = spawner
        self.pid = read_pid(files.pid) or 0
        self.began = start_ticks(self.pid)

    async def wait(self) -> int:
        """Its exit code, as of a shell. Raises `Closed` with the spawner's connection."""
        status = await self._spawner.exited(self._key)
        return 128 + status.signal if status.signal else status.code

    async def signal(self, number: int) -> None:
        await self._spawner.signal(self._key, number)

    async def end(self, hang_up: Callable[[], None] = lambda: None) -> None:
        """End the program and all that came of it. `hang_up` closes its terminal."""
        hang_up()
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await end_below(self.pid, self.began)
        except TimeoutError:
            kill_below(self.pid, self.began)

    async def forget(self) -> None:
        await self._spawner.forget(self._key)
        self.files.remove()


Ends = TypeVar("Ends")
Begin = Callable[[str, "Files", Spawner], Spawned]
"""Makes what is known of a command that has begun, of its key, its files and the spawner."""


async def spawn(
    place: Place,
    process: dict[str, Any],
    spawner: Spawner,
    *,
    run: Callable[[Files, str], Coroutine[Any, Any, Ends]],
    begin: Begin = Spawned,
    give_up: Callable[[Ends], object] = lambda _: None,
) -> tuple[Spawned, Ends]:
    """Begin what `process` describes: `run` has the spawner begin it under that name, and waits for
    the engine. When that fails, or nobody wants it any more, what there may be is ended, and
    `give_up` does away with what `run` returned."""
    files = Files(place.directory, tells_inside=place.tells_inside)
    files.description.write_bytes(msgspec.json.encode(process))
    key = key_of(place.container, files.name)
    tasks = Supervisor("engine", on_failure=lambda *_: None)
    running = tasks.start("engine", run(files, key))
    try:
        ends = await asyncio.shield(running)  # an engine cannot be stopped half-way
    except BaseException:
        await asyncio.wait([running], timeout=ENGINE_TIMEOUT_S)
        if not running.done():
            await spawner.signal(key, signal.SIGKILL)
            await asyncio.wait([running])
        has_begun = not running.cancelled() and running.exception() is None
        spawned = begin(key, files, spawner)
        if has_begun:
            give_up(running.result())
        await spawned.end()
        await spawned.forget()
        await tasks.aclose()
        raise
    return begin(key, files, spawner), ends


def key_of(container: str, name: str) -> str:
    """Of a command in the spawner's books."""
    return f"{container}/{name}"


def failed(problem: str, argv: tuple[str, ...], finished: Finished, words: str) -> EngineError:
    """Of an engine that could not begin a command; `words` are its own."""
    words = words.strip() or finished.status.describe()
    return EngineError(f"{problem}: {words}", argv=argv, status=finished.status.code, output=words)


async def converse(
    place: Place, execution: Execution, spawner: Spawner, begin: Begin = Spawned
) -> Conversation:
    """Begin to run a command without a terminal. Raises `EngineError`."""
    process = describe_process((place.directory / "config.json").read_bytes(), execution)
    if (problem := look_up(Path(f"/proc/{place.pid}/root"), process)) is not None:
        return problem
    process["args"] = (*place.init, *execution.argv)
    theirs, streams = open_pipes(stdin=execution.stdin)

    async def run(files: Files, key: str) -> None:
        argv = redirect(
            (*place.engine, "exec", "--detach", *files.options(), place.container), theirs
        )
        await spawner.spawn(Command(key, argv, pid_file=files.pid))
        finished = await spawner.finished(key)
        if finished.status != ExitStatus():
            streams[2].finish()
            words = finished.output + (await streams[2].read()).decode(errors="replace")
            what = f"{execution.argv[0]} could not be run in {place.container}"
            raise failed(what, argv, finished, words)

    try:
        _hand_over(theirs, place.pid, process["user"])
        spawned, _ = await spawn(place, process, spawner, run=run, begin=begin)
    except BaseException:
        close_streams(streams)
        raise
    finally:
        for descriptor in theirs:
            os.close(descriptor)
    return Piped(
        streams,
        code=spawned.wait,
        end=spawned.end,
        tell=spawned.signal,
        forget=spawned.forget,
    )


def _hand_over(pipes: tuple[int, int, int], pid: int, user: dict[str, Any]) -> None:
    """Make them the user's, who may then open them by name, as /dev/stderr."""
    try:
        maps = [Path(f"/proc/{pid}/{kind}_map").read_text().split() for kind in ("uid", "gid")]
    except FileNotFoundError:
        raise NotFound("the instance has ended") from None
    owner = int(maps[0][1]) + user["uid"], int(maps[1][1]) + user["gid"]
    for descriptor in pipes:
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            os.fchown(descriptor, *owner)


def redirect(argv: tuple[str, ...], streams: tuple[int, int, int]) -> tuple[str, ...]:
    """The command with descriptors of this process for its streams, whoever starts it."""
    stdin, stdout, stderr = (f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in streams)
    return ("/bin/sh", "-c", f'exec "$0" "$@" <{stdin} >{stdout} 2>{stderr}', *argv)


class Files:
    """Those of one command: its description, the pid that the engine writes, the one inside, a
    console's socket."""

    def __init__(self, directory: Path, name: str = "", *, tells_inside: bool = False) -> None:
        self.name = name or f"{PREFIX}{os.getpid()}-{next(_numbers)}"
        self.description = directory / f"{self.name}.json"
        self.pid = directory / f"{self.name}{PID_SUFFIX}"
        self.inside = directory / f"{self.name}{INSIDE_SUFFIX}"
        self.console = directory / f"{self.name}.sock"
        self._more = ("--internal-pid-file", str(self.inside)) if tells_inside else ()

    def options(self) -> tuple[str, ...]:
        return ("--pid-file", str(self.pid), "--process", str(self.description), *self._more)

    def remove(self) -> None:
        for path in (self.description, self.pid, self.inside, self.console):
            path.unlink(missing_ok=True)


_numbers = itertools.count()


def describe_process(config: bytes, execution: Execution) -> dict[str, Any]:
    """The main process's description of `config.json`, with what the command has of its own."""
    process: dict[str, Any] = msgspec.json.decode(config)["process"]
    process["args"] = execution.argv
    process["cwd"] = execution.workdir or process["cwd"]
    own = dict(entry.partition("=")[::2] for entry in (*process["env"], *execution.env))
    process["env"] = [f"{name}={value}" for name, value in own.items()]
    if (user := execution.user) is not None:
        process["user"] = {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups}
    if (size := execution.terminal) is not None:
        process["terminal"] = True
        process["consoleSize"] = {"height": size.rows, "width": size.columns}
    return process


def look_up(tree: Path, process: dict[str, Any]) -> Said | None:
    """What a shell would answer when there is no such program in `tree`, or none to execute. Raises
    `UsageError` when there is no such directory to run it in."""
    program, cwd = process["args"][0], process["cwd"]
    if (found := resolve(tree, cwd)) is None or not found.is_dir():
        raise UsageError(f"workdir: there is no directory {cwd} in the instance")
    env = dict(entry.partition("=")[::2] for entry in process["env"])
    if find_command(tree, program, env["PATH"], cwd) is not None:
        return None
    if is_file(tree, program, cwd):
        return Said(NOT_EXECUTABLE, f"{program}: cannot be executed\n")
    where = "" if "/" in program else f" (looked in {env['PATH']})"
    return Said(NOT_FOUND, f"{program}: not found{where}\n")


def read_pid(pid_file: Path) -> int | None:
    with suppress(FileNotFoundError, ValueError):
        return int(pid_file.read_text())
    return None


def left_behind(directory: Path, suffix: str = PID_SUFFIX) -> Iterator[tuple[str, int]]:
    """Names and pids of commands that agents before this one began and did not see end."""
    for path in directory.glob(f"{PREFIX}*{suffix}"):
        if (pid := read_pid(path)) is not None:
            yield path.stem, pid


def clear(directory: Path) -> None:
    """Remove the files of all commands."""
    for path in directory.glob(f"{PREFIX}*"):
        path.unlink(missing_ok=True)
