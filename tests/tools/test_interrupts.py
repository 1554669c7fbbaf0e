"""Ctrl-C ends a command with 130 and no traceback, whatever it is doing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tabane.tools.cli import with_sbin

INTERRUPT_AT = """
import os, signal, sys

class Named:
    def __set_name__(self, *_):
        os.kill(os.getpid(), signal.SIGINT)

class Interrupt:
    left = int(sys.argv[1])

    def find_spec(self, *_):
        Interrupt.left -= 1
        if Interrupt.left == 0:
            type("Owner", (), {"name": Named()})

from tabane.tools import cli
sys.meta_path.insert(0, Interrupt())
sys.argv[1:] = sys.argv[2:]
try:
    cli.main()
finally:
    print("left", Interrupt.left, file=sys.stderr)
"""
"""Ctrl-C comes with the nth import after the command's own beginning, while a class is made: what
is raised then becomes another error."""


def interrupted(number: int, *argv: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", INTERRUPT_AT, str(number), *argv]
    return subprocess.run(line, capture_output=True, text=True)


@pytest.mark.parametrize("command", ["ps", "deploy", "up"])
def test_an_interrupt_during_imports(command: str, tmp_path: Path) -> None:
    argv = ["--root", str(tmp_path), command, *(["x.toml"] if command == "deploy" else ["--help"])]
    whole = interrupted(1_000_000, *argv)
    imports = 1_000_000 - int(whole.stderr.split()[-1])
    assert imports > 10
    for number in range(1, imports, 1 + imports // 12):
        ended = interrupted(number, *argv)
        assert (ended.returncode, "Traceback" in ended.stderr) == (130, False), ended.stderr


def test_an_ignored_interrupt_stays_ignored(tmp_path: Path) -> None:
    """As in a script's background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        ended = interrupted(5, "--root", str(tmp_path), "ps", "--help")
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.returncode == 0


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/usr/bin:/bin", "/usr/bin:/bin:/usr/sbin:/sbin"),
        ("/usr/sbin:/bin", "/usr/sbin:/bin:/sbin"),
        ("/sbin:/usr/sbin", "/sbin:/usr/sbin"),
    ],
)
def test_sbin_is_searched_too(path: str, wanted: str) -> None:
    assert with_sbin(path) == wanted
