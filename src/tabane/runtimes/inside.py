"""A command inside a container that runs: as the main process in all but its words.

User, groups, environment, capabilities and limits are those of the container's `config.json`, which
the engine is given again as a process description (`exec --process`); without one it would enter as
root in /. Whether the program is there is looked up first, since engines differ in how they say so.

Without a terminal the engine stays in the foreground and hands its pipes on. An init of its own
stands above the program and adopts what that leaves behind, so that all of it is found, and killed,
when nobody waits for it any more. With a terminal (see `terminal.py`) the program leads its own
session, as everywhere: under an init, what Ctrl-Z stops could not be continued by anyone.

What the end of an agent leaves of either is found by the pid files, and ended by the next agent.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from tabane.model import Value
from tabane.runtimes.api import Conversation, Execution, TerminalSize
from tabane.runtimes.bundle import INIT
from tabane.runtimes.ending import end_below, kill_below
from tabane.runtimes.lookup import find_command, is_file
from tabane.runtimes.streams import Sink, Source, Words
from tabane.supervise import Supervisor

NOT_EXECUTABLE, NOT_FOUND = 126, 127
"""Exit codes, as of a shell."""
ENGINE_TIMEOUT_S = 4.0
"""How long an engine may take to begin, and to see the end of what it began: under 0.1 s as a
rule, and the time that a program has after it was hung up on."""
POLL_S = 0.002
PREFIX = "exec-"
"""Of the files for one command, in the instance's directory."""


class Place(Value, frozen=True):
    """Where a command runs: the container's name, its init's pid, the instance's directory, and the
    engine with its options."""

    container: str
    pid: int
    directory: Path
    engine: tuple[str, ...]


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


class Piped:
    """A `Conversation` with a child of this process over pipes. `end` ends what it does, and makes
    it end; `tell` passes a signal on; `forget` removes what was made for it."""

    def __init__(
        self,
        child: asyncio.subprocess.Process,
        streams: tuple[Sink | None, Source, Source],
        *,
        end: Callable[[], Awaitable[None]],
        tell: Callable[[int], Awaitable[None]],
        forget: Callable[[], None] = lambda: None,
    ) -> None:
        self._child = child
        self._stdin, self.stdout, self.stderr = streams
        self._end = end
        self._tell = tell
        self._forget = forget
        self._tasks = Supervisor("conversation")
        self._ended = self._tasks.start("end", self._wait_end())

    async def _wait_end(self) -> int:
        code = await self._child.wait()
        self.stdout.finish()
        self.stderr.finish()
        return code if code >= 0 else 128 - code

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
            await asyncio.shield(self._ended)
        self.stdout.close()  # not before: runc dies of it, and leaves behind what it began
        self.stderr.close()
        await self._tasks.aclose()
        self._forget()


async def start_piped(
    argv: tuple[str, ...], *, stdin: bool, env: dict[str, str] | None = None
) -> tuple[asyncio.subprocess.Process, tuple[Sink | None, Source, Source]]:
    """A child, and our ends of its streams."""
    pipes = [os.pipe() for _ in range(3)]
    (give, _), (_, say), (_, complain) = pipes
    ours = [pipes[0][1], pipes[1][0], pipes[2][0]]
    try:
        child = await asyncio.create_subprocess_exec(
            *argv,
            stdin=give if stdin else asyncio.subprocess.DEVNULL,
            stdout=say,
            stderr=complain,
            env=env,
        )
    except BaseException:
        for descriptor in ours:
            os.close(descriptor)
        raise
    finally:
        for descriptor in (give, say, complain):
            os.close(descriptor)
    sink = Sink(ours[0])
    if not stdin:
        sink.close()
    return child, (sink if stdin else None, Source(ours[1]), Source(ours[2]))


async def converse(place: Place, execution: Execution) -> Conversation:
    """Begin to run a command without a terminal."""
    process = describe_process((place.directory / "config.json").read_bytes(), execution)
    if (problem := look_up(Path(f"/proc/{place.pid}/root"), process)) is not None:
        return problem
    process["args"] = (INIT, "-s", "--", *execution.argv)
    files = Files(place.directory)
    files.description.write_bytes(msgspec.json.encode(process))
    argv = (*place.engine, "exec", *files.options(), place.container)
    try:
        child, streams = await start_piped(argv, stdin=execution.stdin)
    except BaseException:
        files.remove()
        raise
    return Piped(
        child,
        streams,
        end=lambda: _end(child, files.pid),
        tell=lambda number: _signal(child, files.pid, number),
        forget=files.remove,
    )


class Files:
    """Those of one command: its description, the pid that the engine writes, a console's socket."""

    def __init__(self, directory: Path) -> None:
        self.name = f"{PREFIX}{os.getpid()}-{next(_numbers)}"
        self.description = directory / f"{self.name}.json"
        self.pid = directory / f"{self.name}.pid"
        self.console = directory / f"{self.name}.sock"

    def options(self) -> tuple[str, ...]:
        return ("--pid-file", str(self.pid), "--process", str(self.description))

    def remove(self) -> None:
        for path in (self.description, self.pid, self.console):
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
    """What a shell would answer when there is no such program in `tree`, or none to execute."""
    program, cwd = process["args"][0], process["cwd"]
    env = dict(entry.partition("=")[::2] for entry in process["env"])
    if find_command(tree, program, env["PATH"], cwd) is not None:
        return None
    if is_file(tree, program, cwd):
        return Said(NOT_EXECUTABLE, f"{program}: cannot be executed\n")
    where = "" if "/" in program else f" (looked in {env['PATH']})"
    return Said(NOT_FOUND, f"{program}: not found{where}\n")


async def _end(child: asyncio.subprocess.Process, pid_file: Path) -> None:
    """End what an engine began, and its engine. One that is just beginning is waited for: it
    cannot be killed half-way, its helpers would go on without it."""
    async with Supervisor("end") as tasks:
        engine = tasks.start("engine", child.wait())
        try:
            async with asyncio.timeout(ENGINE_TIMEOUT_S):
                while not engine.done() and (pid := read_pid(pid_file)) is None:
                    await asyncio.wait({engine}, timeout=POLL_S)
                if not engine.done() and pid is not None:
                    await end_below(pid)
                await asyncio.shield(engine)
        except TimeoutError:  # as when it is frozen: once it is thawed it ends
            if (pid := read_pid(pid_file)) is not None:
                kill_below(pid)
            child.kill()
        await engine


def read_pid(pid_file: Path) -> int | None:
    with suppress(FileNotFoundError, ValueError):
        return int(pid_file.read_text())
    return None


async def _signal(child: asyncio.subprocess.Process, pid_file: Path, number: int) -> None:
    """To the program's init, which passes it on. An engine may write its pid later than the program
    says its first words."""
    while (pid := read_pid(pid_file)) is None and child.returncode is None:  # noqa: ASYNC110
        await asyncio.sleep(POLL_S)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def left_behind(directory: Path) -> Iterator[tuple[str, int]]:
    """Names and pids of commands that agents before this one began and did not see end."""
    for path in directory.glob(f"{PREFIX}*.pid"):
        if (pid := read_pid(path)) is not None:
            yield path.stem, pid


def clear(directory: Path) -> None:
    """Remove the files of all commands."""
    for path in directory.glob(f"{PREFIX}*"):
        path.unlink(missing_ok=True)
