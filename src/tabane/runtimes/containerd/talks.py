"""Commands inside, through containerd: `Tasks.Exec`, with our own pipes for its streams.

The shim opens the pipes by the names that this process's descriptors have in /proc, and copies
between them and the program's; so it needs no files, and what was said before the program's end may
come a moment after that is told (`_wait_said`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from tabane.errors import NotFound, TabaneError
from tabane.runtimes.api import Conversation, Execution, TerminalSize
from tabane.runtimes.containerd.client import Client
from tabane.runtimes.containerd.messages import PROCESS_URL, make
from tabane.runtimes.inside import (
    PREFIX,
    Files,
    Piped,
    Streams,
    close_streams,
    open_pipes,
    read_pid,
)
from tabane.runtimes.process import start_ticks
from tabane.runtimes.streams import Source
from tabane.supervise import Supervisor

END_OF_INPUT = b"\x04"
QUIET_S = 0.1
"""A shim that says nothing for so long after the program's end has said all: what still holds the
program's outputs is what it left behind."""
POLL_S = 0.002

End = Callable[[], Awaitable[None]]
"""Ends a command with all it started."""


class Task:
    """The process of a container that has the name of `files` in containerd's books."""

    def __init__(self, client: Client, container: str, files: Files) -> None:
        self._client = client
        self._files = files
        self._ids: dict[str, Any] = {"container_id": container, "exec_id": files.name}
        self.pid = read_pid(files.pid) or 0
        self.began = start_ticks(self.pid)

    async def begin(self, process: dict[str, Any], paths: Sequence[str]) -> None:
        """Run what `process` describes with these streams (empty: none)."""
        self._files.pid.touch()  # by which the next agent knows it
        spec = make("Any", type_url=PROCESS_URL, value=msgspec.json.encode(process))
        streams: dict[str, Any] = dict(zip(("stdin", "stdout", "stderr"), paths, strict=True))
        terminal = bool(process.get("terminal"))
        await self._client.call("exec", **self._ids, **streams, spec=spec, terminal=terminal)
        self.pid = (await self._client.call("start", **self._ids)).pid
        self.began = start_ticks(self.pid)
        self._files.pid.write_text(str(self.pid))

    async def wait(self) -> int:
        """Its exit code, as of a shell. Raises `Closed` with containerd."""
        return int((await self._client.call("wait", **self._ids, timeout_s=None)).exit_status)

    async def signal(self, number: int) -> None:
        with suppress(NotFound):
            await self._client.call("kill", **self._ids, signal=number)

    async def resize(self, size: TerminalSize) -> None:
        await self._client.call("resize", **self._ids, width=size.columns, height=size.rows)

    async def end_input(self) -> None:
        with suppress(TabaneError):  # it has ended
            await self._client.call("close_io", **self._ids, stdin=True)

    async def delete(self) -> None:
        with suppress(TabaneError):  # with containerd gone, or the instance, so is this
            await self._client.call("delete_process", **self._ids)
        self._files.remove()


def left_behind(client: Client, container: str, directory: Path) -> list[Task]:
    """Commands that agents before this one began and did not see end."""
    found = (Files(directory, path.stem) for path in directory.glob(f"{PREFIX}*.pid"))
    return [Task(client, container, files) for files in found]


async def begin(
    task: Task, process: dict[str, Any], execution: Execution, end: End
) -> Conversation:
    """Run a command. Raises `EngineError`."""
    theirs, streams = open_pipes(stdin=execution.stdin)
    paths = [f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in theirs]
    paths[0] = paths[0] if execution.stdin else ""
    size = execution.terminal
    kept: Streams = streams
    if size is not None:
        paths[2] = ""
        kept = (*streams[:2], None)
        streams[2].close()
    tasks = Supervisor("exec", on_failure=lambda *_: None)
    beginning = tasks.start("begin", task.begin(process, paths))
    try:
        await asyncio.shield(beginning)  # a shim cannot be stopped half-way
        if size is not None:
            await task.resize(size)
    except BaseException:
        await asyncio.wait([beginning])
        if task.pid:
            await end()
        await task.delete()
        close_streams(kept)
        raise
    finally:
        for descriptor in theirs:
            os.close(descriptor)
        await tasks.aclose()
    return (Talk if size is None else TerminalTalk)(task, kept, end)


class Talk(Piped):
    """A `Conversation` with a task."""

    def __init__(self, task: Task, streams: Streams, end: End) -> None:
        self._task = task
        self._outputs = [stream for stream in streams[1:] if stream is not None]
        super().__init__(
            streams,
            code=self._code,
            end=end,
            tell=task.signal,
            forget=task.delete,
        )

    async def _code(self) -> int:
        code = await self._task.wait()
        await _wait_said(self._outputs)
        return code

    async def end_input(self) -> None:
        if self._stdin is not None:
            self._stdin.close()
            await self._task.end_input()


class TerminalTalk(Talk):
    """Its only stream has both directions of a terminal."""

    async def end_input(self) -> None:
        await self.write(END_OF_INPUT)

    async def resize(self, size: TerminalSize) -> None:
        if not self._ended.done():
            await self._task.resize(size)


async def _wait_said(outputs: Iterable[Source]) -> None:
    """Until the shim has closed each of them, or they were empty for a while."""
    loop = asyncio.get_running_loop()
    quiet_since = loop.time()
    while loop.time() - quiet_since < QUIET_S:
        more = [output.has_more() for output in outputs]
        if more == [None] * len(more):
            return
        if any(more):
            quiet_since = loop.time()
        await asyncio.sleep(POLL_S)
