"""What is read before anyone asks, and when that ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from tabane.clock import SystemClock
from tabane.tools.procfs.ahead import READ, read_ahead
from tabane.tools.procfs.feed import FRESH_S
from tabane.tools.procfs.numbers import FIRST


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three processes of other nodes, the last of which has ended; one of this machine."""
    for number in (FIRST, FIRST + 1, FIRST + 2, 7):
        (tmp_path / str(number)).mkdir()
    for name in READ:
        for number in (FIRST, FIRST + 1):
            (tmp_path / str(number) / name).touch()
    return tmp_path


def test_other_nodes_processes_are_read(root: Path) -> None:
    assert read_ahead(root) == 2


def test_nothing_is_read_once_it_is_no_longer_fresh(root: Path) -> None:
    class Racing(SystemClock):
        """A listing takes longer than all else may."""

        seconds = 0.0

        def now(self) -> float:
            self.seconds += FRESH_S
            return self.seconds

    assert read_ahead(root, clock=Racing()) == 0


def test_a_proc_that_is_not_served_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_ahead(tmp_path / "nothing")
