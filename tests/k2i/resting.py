"""A process table in which every process is grown up, so that those that sleep rest."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from tabane.k2i import Process, ProcessTable
from tabane.k2i.procfs import Procfs, stat_of
from tabane.testing import VirtualClock

LOOKS = 1000
"""Until a process that sleeps has come to rest: it may have to get off its CPU first."""


class Grown(Procfs):
    """All started long ago. `read_stat` are those whose `stat` was read in this round."""

    def __init__(self) -> None:
        super().__init__()
        self.read_stat: set[int] = set()

    def pids(self) -> list[int]:
        self.read_stat.clear()
        return super().pids()

    def uptime_s(self) -> float:
        return super().uptime_s() + 1000

    def read_each(self, pids: Iterable[int], name: str) -> list[bytes | None]:
        pids = list(pids)
        if name == "stat":
            self.read_stat.update(pids)
        return super().read_each(pids, name)


class Resting:
    """Its clock stands still: what is read again was not due by time."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.procfs = Grown()
        self.table = ProcessTable(procfs=self.procfs, clock=self.clock)

    def see(self, pid: int) -> Process:
        """In one snapshot."""
        return next(process for process in self.table.processes() if process.pid == pid)

    def rest(self, pid: int) -> Process:
        """Once nothing was read of it for a snapshot but whether it has run."""
        for _ in range(LOOKS):
            process = self.see(pid)
            if pid not in self.procfs.read_stat:
                return process
            os.sched_yield()
        raise AssertionError(f"{pid} never rests: {Path(f'/proc/{pid}/stat').read_text()}")


def wait_for_state(pid: int, *states: str) -> None:
    """Until the kernel says so."""
    while (stat := stat_of(pid)) is None or stat.state not in states:
        os.sched_yield()
