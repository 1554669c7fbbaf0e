"""Facts that a command prints: see `tabane.k2i.collectors.parse.parse_output`.

It runs in a session of its own with nothing to read and little of an environment. When its time is
up, or it writes too much, all of its process group is killed; `timeout` stands above it for the
case that its collector is killed first.
"""

from __future__ import annotations

import asyncio
import os
import signal
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable
from contextlib import suppress

from tabane.errors import EngineError, NotFound, ProtocolError
from tabane.k2i.collectors.api import MAX_ANSWER_BYTES, Reading, Setting
from tabane.k2i.collectors.parse import parse_output
from tabane.supervise import Supervisor

ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C"}
READ_BYTES = 16 << 10
MAX_WORDS_BYTES = 1024
"""Kept of what it writes to stderr: an error shows its end."""


class Command:
    """See the module's text."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    async def collect(self) -> list[Reading]:
        collect = self._setting.collect
        try:
            return parse_output(await self._setting.run(collect.command, collect.deadline_s))
        except ProtocolError as error:
            raise ProtocolError(f"{collect.command[0]}: {error}") from None

    async def aclose(self) -> None:
        """It keeps nothing."""


async def run_here(argv: tuple[str, ...], timeout_s: float) -> bytes:
    """Its stdout. Raises `EngineError` when it fails, `NotFound` when it cannot be run, and
    `ProtocolError` when it writes too much. Cancelling kills it."""
    async with Supervisor("command", on_failure=lambda *_: None) as tasks:
        program = await _start(argv, timeout_s, tasks)
        assert program.stdout is not None
        assert program.stderr is not None
        read_output, read_words = program.stdout.read, program.stderr.read
        try:
            output, words = await asyncio.gather(
                take(lambda: read_output(READ_BYTES)), last_words(lambda: read_words(READ_BYTES))
            )
            status = await program.wait()
        except BaseException:
            await _kill(program)
            raise
    return judge(argv, status, output, words)


async def _start(argv: tuple[str, ...], timeout_s: float, tasks: Supervisor) -> Process:
    pipe = asyncio.subprocess.PIPE
    starting = asyncio.create_subprocess_exec(
        *("timeout", "--signal=KILL", f"{timeout_s + 1:g}", *argv),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    try:
        return await tasks.begin(argv[0], starting, _kill)
    except OSError as error:
        raise NotFound(f"{argv[0]} cannot be run: {error.strerror}") from None


async def _kill(program: Process) -> None:
    """All of its group; not what has left that, which may hold the pipes."""
    with suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)
    program._transport.close()  # type: ignore[attr-defined]
    await program.wait()


def judge(argv: tuple[str, ...], status: int, output: bytes, words: str) -> bytes:
    """Its output, unless it failed. Raises `EngineError`."""
    if status:
        said = f": {words}" if words else ""
        raise EngineError(f"{argv[0]} ended with {status}{said}", argv=argv, status=status)
    return output


Read = Callable[[], Awaitable[bytes]]
"""Some of what a program writes; empty at its end."""


async def take(read: Read) -> bytes:
    """All of it. Raises `ProtocolError` when it is too much."""
    taken = b""
    while block := await read():
        taken += block
        if len(taken) > MAX_ANSWER_BYTES:
            raise ProtocolError(f"it prints more than {MAX_ANSWER_BYTES >> 10} KiB")
    return taken


async def last_words(read: Read) -> str:
    """Its last line, as it may stand in a sentence."""
    taken = b""
    while block := await read():
        taken = (taken + block)[-MAX_WORDS_BYTES:]
    lines = taken.decode("utf-8", "backslashreplace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def make(setting: Setting) -> Command:
    return Command(setting)
