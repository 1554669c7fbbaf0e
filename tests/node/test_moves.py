"""What is done ahead of a move between cgroups."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tabane.node import moves
from tabane.node.moves import AGAIN_S, Moves, move_nowhere, own_path
from tabane.testing.clock import VirtualClock

MIXED = """\
12:freezer:/tabane/c/tokyo-1
4:cpu,cpuacct:/some/where
1:name=systemd:/user.slice
0::/unified
"""


@pytest.mark.parametrize(
    ("controller", "path"),
    [("freezer", "tabane/c/tokyo-1"), ("cpuacct", "some/where"), ("", "unified")],
)
def test_a_process_finds_its_own_cgroup_in_each_hierarchy(controller: str, path: str) -> None:
    assert own_path(MIXED, controller) == path


def test_this_process_stays_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (line, *_) = Path("/proc/self/cgroup").read_text().splitlines()
    _, names, path = line.split(":", 2)
    here = tmp_path / path.lstrip("/")
    here.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(moves, "find_hierarchies", lambda: {names.split(",")[0]: tmp_path})
    move_nowhere()
    assert (here / "cgroup.procs").read_text() == "0"


def test_what_the_kernel_refuses_is_left_to_the_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (line, *_) = Path("/proc/self/cgroup").read_text().splitlines()
    controller = line.split(":", 2)[1].split(",")[0]
    monkeypatch.setattr(moves, "find_hierarchies", lambda: {controller: tmp_path / "gone"})
    move_nowhere()


async def test_one_wait_is_enough_for_all_that_come_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits, go_on = [], threading.Event()

    def wait() -> None:
        waits.append(1)
        go_on.wait(60)

    monkeypatch.setattr(moves, "move_nowhere", wait)
    clock = VirtualClock()
    ahead = Moves(clock)
    for _ in range(3):
        clock.advance(AGAIN_S)
        ahead.foresee()
    go_on.set()
    assert ahead._waiting is not None
    await ahead._waiting
    assert len(waits) == 1
    clock.advance(AGAIN_S)
    ahead.foresee()
    ahead.foresee()
    await ahead._waiting
    ahead.foresee()
    assert ahead._waiting.done()
    assert len(waits) == 2
