"""A pid that is given to another process: refused before, harmless through a pidfd, and told where
the kernel has no form with a pidfd."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of `pid_reuse`, whose processes end with their pid namespace."""
    own = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "--")
    program = str(Path(__file__).with_name("pid_reuse.py"))
    argv = (*own, sys.executable, program, str(tmp_path_factory.mktemp("reuse")))
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


UNTOUCHED = ["unharmed", 0, 77]


def test_orders_for_the_one_before_are_refused(results: dict[str, Any]) -> None:
    assert results["orders"] == [["stale", *UNTOUCHED]] * 5


def test_a_signal_reaches_nobody_else_even_if_it_is_late(results: dict[str, Any]) -> None:
    assert results["signal late"] == ["not_found", *UNTOUCHED]


def test_what_is_late_without_a_pidfd_is_not_done(results: dict[str, Any]) -> None:
    assert results["nice late"] == ["not_found", *UNTOUCHED]


def test_what_hits_another_in_the_window_is_said(results: dict[str, Any]) -> None:
    assert results["nice in the window"] == ["conflict", "unharmed", 5, 77]
    assert results["limit in the window"] == ["conflict", "unharmed", 0, 5]
    assert results["thread in the window"] == ["conflict", 5]
