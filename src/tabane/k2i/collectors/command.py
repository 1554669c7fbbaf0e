"""Facts that a command prints: see `tabane.k2i.collectors.parse.parse_output`.

It runs with nothing to read and little of an environment. Above it stands
`tabane.k2i.collectors.alone`: nothing that it has started is left when it ends, when its time is
up, when it writes too much, and when its collector is killed first.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable
from contextlib import suppress

from tabane.errors import EngineError, ProtocolError, TimedOut
from tabane.k2i.collectors import alone
from tabane.k2i.collectors.api import MAX_ANSWER_BYTES, Reading, Setting
from tabane.k2i.collectors.parse import parse_output
from tabane.supervise import Supervisor

ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C"}
READ_BYTES = 16 << 10
END_S = 2.0
"""For a command to be gone with all that it has started."""
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
    """Its stdout. Raises `EngineError` when it fails or cannot be run, `TimedOut`, and
    `ProtocolError` when it writes too much. Cancelling kills it."""
    try:
        async with asyncio.timeout(timeout_s):
            return await _run(argv)
    except TimeoutError:
        raise TimedOut(f"{argv[0]} did not end within {timeout_s:g} s") from None


async def _run(argv: tuple[str, ...]) -> bytes:
    async with Supervisor("command", on_failure=lambda *_: None) as tasks:
        program = await tasks.begin(argv[0], _start(argv), _kill)
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


async def _start(argv: tuple[str, ...]) -> Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", alone.__file__, str(os.getpid()), *argv),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=ENVIRONMENT,
        start_new_session=True,
    )


async def _kill(program: Process) -> None:
    """With all that it has started. What does not even end by KILL is not waited for."""
    with suppress(ProcessLookupError):
        program.terminate()
    if program.returncode is None:
        with suppress(TimeoutError, ProcessLookupError):
            async with asyncio.timeout(END_S):
                await _exited(program.pid)
    with suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)
    program._transport.close()  # type: ignore[attr-defined]
    await program.wait()


async def _exited(pid: int) -> None:
    """Return when a child has ended; `Process.wait` wants all that it wrote to be read, too."""
    descriptor, ended = os.pidfd_open(pid), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


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
