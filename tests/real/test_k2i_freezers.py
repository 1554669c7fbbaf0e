"""A process that a freezer stops in its sleep, and lets go: its state is in the next snapshot."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.k2i.conftest import Start, start
from tests.k2i.resting import Resting, wait_for_state

from tabane.k2i.procfs import stat_of
from tabane.testing.leaks import CGROUPS, name_cgroup

__all__ = ["start"]

pytestmark = pytest.mark.real

SLEEPS = ("time.sleep(1000)", "signal.pause()", "os.read(0, 1)", "signal.sigwait({10})")
"""The first version's freezer has some of these run for it, and others not."""
FREEZERS = [
    path
    for path in (CGROUPS / "freezer", CGROUPS / "unified", CGROUPS)
    if (path / "cgroup.procs").exists()
]


class Freezer:
    """A cgroup of either version."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / name_cgroup("freezer").lstrip("/")
        self.path.mkdir()
        self.is_first = (self.path / "freezer.state").exists()

    def freeze(self) -> None:
        if self.is_first:
            self._write("freezer.state", "FROZEN")
            self._wait("freezer.state", "FROZEN\n")
        else:
            self._write("cgroup.freeze", "1")
            self._wait("cgroup.events", "populated 1\nfrozen 1\n")

    def thaw(self) -> None:
        if self.is_first:
            self._write("freezer.state", "THAWED")
        else:
            self._write("cgroup.freeze", "0")
            self._wait("cgroup.events", "populated 1\nfrozen 0\n")

    def take(self, pid: int) -> None:
        self._write("cgroup.procs", str(pid))

    def remove(self) -> None:
        for pid in (self.path / "cgroup.procs").read_text().split():
            (self.root / "cgroup.procs").write_text(pid)
        self.path.rmdir()

    def _write(self, name: str, text: str) -> None:
        (self.path / name).write_text(text)

    def _wait(self, name: str, text: str) -> None:
        while (self.path / name).read_text() != text:
            os.sched_yield()


@pytest.fixture(params=FREEZERS, ids=lambda path: path.name)
def freezer(request: pytest.FixtureRequest) -> Iterator[Freezer]:
    freezer = Freezer(request.param)
    yield freezer
    freezer.thaw()
    freezer.remove()


@pytest.fixture
def resting() -> Iterator[Resting]:
    resting = Resting()
    yield resting
    resting.table.close()


def is_right(resting: Resting, pid: int) -> bool:
    """Twice, so that it may rest in between."""
    stat = stat_of(pid)
    return stat is not None and [resting.see(pid).state for _ in range(2)] == [stat.state] * 2


@pytest.mark.parametrize("sleep", SLEEPS)
def test_a_sleeping_process(resting: Resting, start: Start, freezer: Freezer, sleep: str) -> None:
    pid = start(f"import signal; print(flush=True); {sleep}").pid
    freezer.take(pid)
    for _ in range(2):
        wait_for_state(pid, "S")
        assert is_right(resting, pid)
        assert freezer.is_first or resting.rest(pid)
        freezer.freeze()
        assert is_right(resting, pid)
        freezer.thaw()


def test_a_stopped_process(resting: Resting, start: Start, freezer: Freezer) -> None:
    pid = start().pid
    freezer.take(pid)
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    for _ in range(2):
        wait_for_state(pid, "T")
        assert is_right(resting, pid)
        freezer.freeze()
        assert is_right(resting, pid)
        freezer.thaw()
