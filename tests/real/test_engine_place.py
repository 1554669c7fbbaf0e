"""crun lies where nobody can write to it, so that it need not copy itself at each start."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tabane.runtimes import mounts
from tabane.runtimes.bundles import Bundles

pytestmark = pytest.mark.real


@pytest.fixture
def bundles(ground: Path) -> Iterator[Bundles]:
    made = Bundles(ground / "engines")
    made.set_up()
    yield made
    made.close()


@pytest.fixture
def program(ground: Path) -> Path:
    return Path(shutil.copy(shutil.which("crun") or "", ground / "crun"))


def starts(program: Path) -> int:
    """How often a program is executed when it is told to do nothing."""
    argv = ("strace", "-f", "-e", "trace=execve,execveat", str(program), "--version")
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return done.stderr.count("execve")


def test_it_does_not_copy_itself_there(bundles: Bundles, program: Path) -> None:
    shown = bundles.show_engine(program)
    assert (starts(program), starts(shown)) == (2, 1)


def test_nobody_can_write_to_it_there(bundles: Bundles, program: Path) -> None:
    shown = bundles.show_engine(program)
    for path in (str(shown), f"/proc/self/root{shown}"):
        with pytest.raises(OSError) as caught:
            os.open(path, os.O_WRONLY)
        assert caught.value.errno == errno.EROFS


def test_it_is_shown_once_and_anew_when_it_was_replaced(bundles: Bundles, program: Path) -> None:
    shown = bundles.show_engine(program)
    assert bundles.show_engine(program) == shown
    assert mounts.targets_below(shown.parent) == [shown]
    program.rename(program.with_suffix(".former"))
    program.write_text("#!/bin/sh\necho another\n")
    program.chmod(0o755)
    assert bundles.show_engine(program) == shown
    assert subprocess.run((shown,), capture_output=True, text=True).stdout == "another\n"
    assert mounts.targets_below(shown.parent) == [shown]


def test_nothing_stays_mounted(bundles: Bundles, program: Path) -> None:
    shown = bundles.show_engine(program)
    bundles.close()
    assert mounts.targets_below(shown.parent) == []
