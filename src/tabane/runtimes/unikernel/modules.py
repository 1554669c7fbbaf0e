"""Machine code of WebAssembly programs, compiled once for each digest and kept in a directory.

To load compiled code is to trust it, so a file counts only when it is ours alone to write, as is
the directory. Its name says for which program, engine and processor it is. What is compiled is not
trusted: that is done by a process that is confined, and limited in time and memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tabane.errors import EngineError, Unsupported
from tabane.model import ExitStatus
from tabane.runtimes.api import Command, Spawner

MOST_KEPT = 64
COMPILE_TIMEOUT_S = 300.0

Compile = Callable[[Path], tuple[str, ...]]
"""The command line that makes a file."""


class Modules:
    """See the module's text. `directory` is made, for its owner alone."""

    def __init__(self, directory: Path, spawner: Spawner) -> None:
        self._directory = directory
        self._spawner = spawner
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def get(self, digest: str, engine: str, compile_to: Compile) -> Path:
        """The machine code of the program `digest` for `engine`, of which the version is a part;
        made now if need be, which takes from milliseconds to some ten seconds.

        Raises `EngineError` with the compiler's words, `Unsupported` when somebody else could have
        written the file.
        """
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_owned(self._directory)
        path = self._directory / f"{name_of(digest, engine, processor())}.cwasm"
        async with self._locks[path.name]:
            if not os.path.lexists(path):
                await self._make(path, compile_to)
        check_owned(path)
        os.utime(path)
        return path

    async def _make(self, path: Path, compile_to: Compile) -> None:
        for left in self._directory.glob(f"{path.stem}.*.new"):
            left.unlink(missing_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}.new")
        argv = compile_to(fresh)
        key = f"compile-{fresh.name}"
        try:
            await self._run(Command(key, argv))
            await asyncio.to_thread(_take_over, fresh)
            fresh.rename(path)
        finally:
            fresh.unlink(missing_ok=True)
            await self._spawner.forget(key)
        self._drop_old(path)

    async def _run(self, command: Command) -> None:
        await self._spawner.spawn(command)
        try:
            async with asyncio.timeout(COMPILE_TIMEOUT_S):
                finished = await self._spawner.finished(command.key)
        except BaseException as error:
            await self._spawner.signal(command.key, 9)
            if not isinstance(error, TimeoutError):
                raise
            raise EngineError(
                f"it was not compiled within {COMPILE_TIMEOUT_S:.0f} s: make it smaller",
                argv=command.argv,
            ) from None
        if finished.status != ExitStatus():
            words = finished.output.strip() or finished.status.describe()
            code = -finished.status.signal or finished.status.code
            problem = f"it cannot be compiled: {words.splitlines()[0]}"
            raise EngineError(problem, argv=command.argv, status=code, output=words)

    def _drop_old(self, newest: Path) -> None:
        """Those that run have their own hold on it."""
        kept = sorted(self._directory.glob("*.cwasm"), key=_used, reverse=True)
        for path in kept[MOST_KEPT:]:
            if path != newest:
                path.unlink(missing_ok=True)


def name_of(digest: str, engine: str, processor: str) -> str:
    """Pure: another program, engine or processor is another name."""
    return hashlib.sha256("\0".join((digest, engine, processor)).encode()).hexdigest()


@cache
def processor() -> str:
    """What of this machine's processor the code may depend on: its model and features."""
    lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    names = ("flags", "Features", "model name", "vendor_id", "CPU implementer", "CPU part")
    return "\n".join(line for line in lines if line.partition("\t")[0].strip() in names)


def check_owned(path: Path) -> None:
    """Raises `Unsupported` when not just this user can write there, or it is a link."""
    found = path.lstat()
    if (
        found.st_uid != os.geteuid()
        or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        or not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode))
    ):
        raise Unsupported(
            f"{path} could have been written by another user than this node's, so it is not "
            "loaded: remove it"
        )


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _take_over(path: Path) -> None:
    """Whoever wrote it, it is this user's now, and on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fchown(descriptor, os.geteuid(), os.getegid())
        os.fchmod(descriptor, 0o644)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
