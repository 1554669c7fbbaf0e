"""A command inside a container that runs: as the main process in all but its words.

User, groups, environment, capabilities and limits are those of the container's `config.json`, which
the engine is given again as a process description (`exec --process`); without one it would enter as
root in /. Whether the program is there is looked up first, since engines differ in how they say so.
An init of its own stands above the program and adopts what that leaves behind, so that all of it is
found, and killed, when the time is up or nobody waits for the answer any more.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from tabane.errors import TimedOut
from tabane.model import Value
from tabane.runtimes.api import ExecResult, User
from tabane.runtimes.bundle import INIT
from tabane.runtimes.lookup import find_command, is_file
from tabane.runtimes.process import descendants, state
from tabane.supervise import Supervisor

NOT_EXECUTABLE, NOT_FOUND = 126, 127
"""Exit codes, as of a shell."""
MAX_OUTPUT_BYTES = 8 << 20
"""Kept of what a command writes to stdout, and to stderr: it is held in memory, several times."""
READ_BYTES = 64 << 10
ENGINE_TIMEOUT_S = 2.0
"""How long an engine may take to begin, and to see the end of what it began: under 0.1 s as a
rule."""
POLL_S = 0.002


class Entry(Value, frozen=True):
    """What to run: `user` and `workdir` instead of the main process's, when given."""

    argv: tuple[str, ...]
    user: User | None = None
    workdir: str = ""


async def run(
    engine: tuple[str, ...],
    directory: Path,
    pid: int,
    container: str,
    entry: Entry,
    stdin: AsyncIterator[bytes] | None,
    timeout_s: float,
) -> ExecResult:
    """`engine` with its options; `pid` is the container's init. Raises `TimedOut`; the program and
    all it started is killed then, when `stdin` fails, and when this is cancelled."""
    process = describe_process((directory / "config.json").read_bytes(), entry)
    if (problem := look_up(Path(f"/proc/{pid}/root"), process)) is not None:
        return problem
    process["args"] = (INIT, "-s", "--", *entry.argv)
    name = f"exec-{os.getpid()}-{next(_numbers)}"
    pid_file, description = directory / f"{name}.pid", directory / f"{name}.json"
    description.write_bytes(msgspec.json.encode(process))
    options = ("--pid-file", str(pid_file), "--process", str(description))
    pipe, none = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    program = await asyncio.create_subprocess_exec(
        *(*engine, "exec", *options, container),
        stdin=pipe if stdin is not None else none,
        stdout=pipe,
        stderr=pipe,
    )
    try:
        async with asyncio.timeout(timeout_s):
            stdout, stderr = await _converse(program, stdin)
    except TimeoutError:
        said = f"{entry.argv[0]} did not end in {container} within {timeout_s:g} s and was killed"
        raise TimedOut(said) from None
    finally:
        if program.returncode is None:
            await _end(program, pid_file)
        pid_file.unlink(missing_ok=True)
        description.unlink(missing_ok=True)
    return ExecResult(program.returncode or 0, stdout, stderr)


_numbers = itertools.count()


def describe_process(config: bytes, entry: Entry) -> dict[str, Any]:
    """The main process's description of `config.json`, with other words."""
    process: dict[str, Any] = msgspec.json.decode(config)["process"]
    process["args"] = entry.argv
    process["cwd"] = entry.workdir or process["cwd"]
    if (user := entry.user) is not None:
        process["user"] = {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups}
    return process


def look_up(tree: Path, process: dict[str, Any]) -> ExecResult | None:
    """What a shell would answer when there is no such program in `tree`, or none to execute."""
    program, cwd = process["args"][0], process["cwd"]
    env = dict(entry.partition("=")[::2] for entry in process["env"])
    if find_command(tree, program, env["PATH"], cwd) is not None:
        return None
    if is_file(tree, program, cwd):
        return ExecResult(NOT_EXECUTABLE, b"", f"{program}: cannot be executed\n".encode())
    where = "" if "/" in program else f" (looked in {env['PATH']})"
    return ExecResult(NOT_FOUND, b"", f"{program}: not found{where}\n".encode())


async def _converse(
    program: asyncio.subprocess.Process, stdin: AsyncIterator[bytes] | None
) -> tuple[bytes, bytes]:
    """What it writes, while it is given `stdin`; what it does not read until its end is dropped."""
    assert program.stdout is not None
    assert program.stderr is not None
    taking = (_take(program.stdout), _take(program.stderr))
    said = asyncio.gather(*taking, program.wait())
    try:
        if stdin is not None:
            async with Supervisor("exec", on_failure=lambda *_: None) as tasks:
                fed = tasks.start("stdin", _feed(program, stdin))
                await asyncio.wait({said, fed}, return_when=asyncio.FIRST_COMPLETED)
                if fed.done():
                    fed.result()
                await asyncio.shield(said)
        (stdout, cut_out), (stderr, cut_err), _ = await said
    finally:
        said.cancel()
    for name, was_cut in (("stdout", cut_out), ("stderr", cut_err)):
        if was_cut:
            stderr += b"tabane: %s was cut after %d bytes\n" % (name.encode(), MAX_OUTPUT_BYTES)
    return stdout, stderr


async def _take(stream: asyncio.StreamReader) -> tuple[bytes, bool]:
    """What comes until its end, and whether it is cut: the rest is read and dropped, so that the
    program is not held up."""
    kept = bytearray()
    was_cut = False
    while block := await stream.read(READ_BYTES):
        room = MAX_OUTPUT_BYTES - len(kept)
        kept += block[:room]
        was_cut = was_cut or len(block) > room
    return bytes(kept), was_cut


async def _feed(program: asyncio.subprocess.Process, stdin: AsyncIterator[bytes]) -> None:
    pipe = program.stdin
    assert pipe is not None
    with suppress(ConnectionError):
        async for block in stdin:
            pipe.write(block)
            await pipe.drain()
    pipe.close()


async def _end(program: asyncio.subprocess.Process, pid_file: Path) -> None:
    """Kill what an engine began, and its engine. One that is just beginning is waited for: it
    cannot be killed half-way, its helpers would go on without it."""
    async with Supervisor("exec") as tasks:
        engine = tasks.start("engine", program.wait())
        try:
            async with asyncio.timeout(ENGINE_TIMEOUT_S):
                while not engine.done() and (pid := _read_pid(pid_file)) is None:
                    await asyncio.wait({engine}, timeout=POLL_S)
                if not engine.done() and pid is not None:
                    await _kill_all(pid)
                await asyncio.shield(engine)
        except TimeoutError:
            program.kill()
        await engine


def _read_pid(pid_file: Path) -> int | None:
    with suppress(FileNotFoundError, ValueError):
        return int(pid_file.read_text())
    return None


async def _kill_all(init: int) -> None:
    """Kill an init whose engine waits for it, so that its pid cannot have been reused; before it,
    while it starts nothing more, what is below it, and what comes to it as parents are killed."""
    _send(init, signal.SIGSTOP)
    while state(init) not in "TZX":  # noqa: ASYNC110 - the kernel sends no event
        await asyncio.sleep(POLL_S)
    while found := descendants(init):
        for pid in found:
            _send(pid, signal.SIGKILL)
        await asyncio.sleep(POLL_S)
    _send(init, signal.SIGKILL)


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
