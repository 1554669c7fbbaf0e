"""The tools in a terminal: colours, widths, and nothing that moves the cursor; elsewhere none."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
import tty
from typing import Any

import pytest
from tests.tools.conftest import EVIL, Pretended
from tests.tools.rows import HOST, ROW
from tests.tools.test_hosts import MOUNT
from tests.tools.test_hosts import answer as answer_of
from tests.tools.test_ps import answer

from tabane.tools.cli.common import cells_of

WIDTH = 60
COLOUR = re.compile("\x1b\\[[0-9]*m")
LONG = ROW | {"command": f"x 束ね{EVIL}" * 20, "name": EVIL * 9}


def shown(pretended: Pretended, *argv: str, **environment: str) -> str:
    """What a terminal of `WIDTH` cells gets."""
    terminal, its = os.openpty()
    tty.setraw(its)
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
    command = [sys.executable, "-m", "tabane.tools.cli", "--root", str(pretended.root), *argv]
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "TERM")}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=its, env=plain | {"TERM": "xterm"} | environment
    ) as child:
        os.close(its)
        found = b""
        while block := _read(terminal):
            found += block
        assert child.wait(timeout=60) == 0
    os.close(terminal)
    return found.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # its other end was closed
        return b""


@pytest.fixture
def started(pretended: Pretended) -> Pretended:
    def tell(line: str, _: bytes) -> bytes:
        mounts: list[Any] = [
            MOUNT,
            MOUNT | {"device_id": "8:2", "mount_point": "/x", "used_percent": 9},
        ]
        return answer_of("mounts", *mounts) if "/mounts" in line else answer(HOST, LONG)

    pretended.begin(tokyo=tell)
    return pretended


@pytest.mark.parametrize("argv", ["ps", "ps aux", "ps -ef --forest", "pstree", "pstree -a"])
def test_lines_fit_and_are_safe(argv: str, started: Pretended) -> None:
    text = COLOUR.sub("", shown(started, *argv.split()))
    assert all(line.isprintable() for line in text.splitlines())
    assert max(map(cells_of, text.splitlines())) in (WIDTH - 1, WIDTH)


@pytest.mark.parametrize(("option", "cells"), [("-ww", 1000), ("--cols=30", 30)])
def test_widths_that_are_asked_for(option: str, cells: int, started: Pretended) -> None:
    lines = COLOUR.sub("", shown(started, "ps", option)).splitlines()
    longest = max(map(cells_of, lines))
    assert longest > WIDTH if cells > WIDTH else longest in (cells - 1, cells)


def test_colours_only_where_they_are_seen(started: Pretended) -> None:
    assert shown(started, "ps").startswith("\x1b[1mDC")
    assert "\x1b[31m" in shown(started, "df") and shown(started, "df").count("\x1b[31m") == 1
    for forbidden in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\x1b" not in shown(started, "ps", **forbidden)
        assert "\x1b" not in shown(started, "df", **forbidden)
    command = [sys.executable, "-m", "tabane.tools.cli", "--root", str(started.root), "ps"]
    piped = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "\x1b" not in piped.stdout
    assert max(map(cells_of, piped.stdout.splitlines())) > WIDTH
