"""A spawner in the test's own process: the holder's part in tests of drivers."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from tabane.errors import EngineError, NotFound
from tabane.model import ExitStatus
from tabane.runtimes.api import Command, Finished
from tabane.unix import open_nothing

PR_SET_CHILD_SUBREAPER = 36
OUTPUT_BYTES = 64 << 10
ADOPTION_S = 0.005
"""An orphan is ours only when its engine's last helper has ended too."""


@dataclass
class _Job:
    command: Command
    pid: int
    """The engine's, then that of the process it left behind."""
    output: BinaryIO
    finished: asyncio.Future[Finished] = field(default_factory=asyncio.Future)
    exited: asyncio.Future[ExitStatus] = field(default_factory=asyncio.Future)


class PlainSpawner:
    """A `tabane.runtimes.api.Spawner` without a holder. While it has books of anything, the process
    is a child subreaper.

    Logs are plain lines in one file, not CRI's, and never rotated. Close it after use: what still
    runs is killed.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}
        self._forgotten: list[_Job] = []
        """Before their end."""
        self._watched: dict[int, int] = {}

    async def spawn(self, command: Command) -> int:
        """Start it. Raises `EngineError` when it cannot be executed."""
        output: BinaryIO = (
            command.log.open("ab") if command.log else tempfile.TemporaryFile()  # noqa: SIM115
        )
        _adopt_orphans(True)
        nothing = open_nothing()
        try:
            pid = os.posix_spawnp(  # noqa: ASYNC221 - it returns at once
                command.argv[0],
                command.argv,
                os.environ if command.env is None else command.env,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, nothing, 0),
                    (os.POSIX_SPAWN_DUP2, output.fileno(), 1),
                    (os.POSIX_SPAWN_DUP2, output.fileno(), 2),
                ],
                setsid=True,
            )
        except OSError as error:
            output.close()
            raise EngineError(f"cannot start {command.argv[0]}: {error.strerror}") from error
        finally:
            os.close(nothing)
        job = self._jobs[command.key] = _Job(command, pid, output)
        self._watch(pid, lambda status: self._on_engine_end(job, status))
        return pid

    def _watch(self, pid: int, on_end: Callable[[ExitStatus], None]) -> None:
        pidfd = os.pidfd_open(pid)
        self._watched[pid] = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._on_end, pid, on_end)

    def _on_end(self, pid: int, on_end: Callable[[ExitStatus], None]) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._watched[pid])
        try:
            result = os.waitid(os.P_PIDFD, self._watched[pid], os.WEXITED)
        except ChildProcessError:
            loop.call_later(ADOPTION_S, self._on_end, pid, on_end)
            return
        os.close(self._watched.pop(pid))
        assert result is not None
        ended_itself = result.si_code == os.CLD_EXITED
        status = ExitStatus(result.si_status) if ended_itself else ExitStatus(0, result.si_status)
        on_end(status)

    def _on_engine_end(self, job: _Job, status: ExitStatus) -> None:
        words = b""
        if job.command.log is None:
            job.output.seek(0)
            words = job.output.read(OUTPUT_BYTES)
        job.output.close()
        pid_file = job.command.pid_file
        if pid_file is None or status != ExitStatus():
            job.exited.set_result(status)
        else:
            job.pid = int(pid_file.read_text())
            self._watch(job.pid, job.exited.set_result)
        job.finished.set_result(Finished(status, words.decode(errors="replace")))

    def _job(self, key: str) -> _Job:
        if key not in self._jobs:
            raise NotFound(f"no process {key} was spawned")
        return self._jobs[key]

    async def finished(self, key: str) -> Finished:
        return await asyncio.shield(self._job(key).finished)

    async def exited(self, key: str) -> ExitStatus:
        return await asyncio.shield(self._job(key).exited)

    async def forget(self, key: str) -> None:
        job = self._jobs.pop(key, None)
        if job is not None and not job.exited.done():
            self._forgotten.append(job)
            if job.command.log is not None:
                job.output.close()  # who writes to it has it open itself
        self._reap_helpers()
        if not self._jobs and not self._forgotten:
            _adopt_orphans(False)

    async def signal(self, key: str, number: int) -> bool:
        job = self._jobs.get(key)
        return job is not None and self._signal(job, number)

    def _signal(self, job: _Job, number: int) -> bool:
        if job.exited.done():
            return False
        signal.pidfd_send_signal(self._watched[job.pid], number)
        return True

    def _reap_helpers(self) -> None:
        """Engines leave zombies of helpers in sessions of their own, which the holder reaps.

        Not while an engine runs: what it leaves behind is not known yet, and must be waited for.
        """
        if not all(job.finished.done() for job in self._jobs.values()):
            return
        for children in Path("/proc/self/task").glob("*/children"):
            with suppress(FileNotFoundError):  # of a thread that has ended
                self._reap(children.read_text())

    def _reap(self, children: str) -> None:
        for pid in map(int, children.split()):
            with suppress(ProcessLookupError, ChildProcessError):  # reaped by asyncio
                if pid not in self._watched and os.getsid(pid) != os.getsid(0):
                    os.waitpid(pid, os.WNOHANG)

    async def aclose(self) -> None:
        """Kill what still runs, forgotten or not, and wait for its end."""
        for key, job in list(self._jobs.items()):
            await self._end(job)
            await self.forget(key)
        for job in self._forgotten:
            await self._end(job)
        self._forgotten.clear()
        _adopt_orphans(False)

    async def _end(self, job: _Job) -> None:
        if job.command.pid_file is not None:
            await asyncio.shield(job.finished)  # what it leaves behind is known then
        self._signal(job, signal.SIGKILL)
        await asyncio.shield(job.exited)


def _adopt_orphans(wanted: bool) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0)
