"""The examples of programs that read k2i: what the page says of them, done."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

EXAMPLES = Path(__file__).parents[2] / "examples" / "k2i"
ODD = 'n"},{\\ \x1b[2J'
"""A name that could lead a careless reader astray, or a terminal; 15 bytes at the most."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A k2i's socket."""
    path = tmp_path_factory.mktemp("k2i") / "k2i.sock"
    argv = [str(Path(sys.executable).with_name("k2i")), "--unix", str(path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as k2i:
        assert k2i.stdout is not None
        assert k2i.stdout.readline() == f"On {path}\n".encode()
        yield path
        k2i.terminate()
        assert k2i.wait() == 0


def run(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in argv], capture_output=True, text=True)


@pytest.fixture
def odd() -> Iterator[int]:
    """The pid of a process that has the odd name, and more memory than others."""
    program = (
        "import ctypes, sys; held = bytearray(300 << 20); held[::4096] = b'x' * (len(held) >> 12)\n"
        f"ctypes.CDLL(None).prctl(15, {ODD.encode()!r})\nprint(flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe) as running:
        assert running.stdout is not None
        running.stdout.readline()
        yield running.pid


def test_the_shell_program(served: Path, odd: int) -> None:
    done = run("sh", EXAMPLES / "top.sh", served, "5")
    assert (done.returncode, done.stderr) == (0, "")
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["PID", "USER", "RSS_KIB", "INSTANCE", "NAME"]
    assert len(rows) == 5
    found = {int(row.split()[0]): row.split(maxsplit=4) for row in rows}
    _, user, rss, instance, name = found[odd]
    assert (user, instance) == ("root", "-")
    assert int(rss) > 300 << 10
    assert name.rstrip() == r"n\"},{\\ \u001b[2J"


def test_the_shell_program_says_what_is_wrong(tmp_path: Path) -> None:
    done = run("sh", EXAMPLES / "top.sh", tmp_path / "none.sock")
    assert "curl" in done.stderr
    assert run("sh", EXAMPLES / "top.sh").returncode == 2


@pytest.fixture(scope="module")
def total(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("c") / "total"
    flags = ("-std=c17", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-O2")
    done = run("cc", *flags, "-o", program, EXAMPLES / "total.c")
    assert (done.returncode, done.stderr) == (0, "")
    return program


def test_the_program_in_c(served: Path, total: Path, odd: int) -> None:
    done = run(total, served)
    assert (done.returncode, done.stderr) == (0, "")
    found = re.fullmatch(r"(\d+) processes, (\d+) MiB\n", done.stdout)
    assert found is not None
    count = sum(name.isdigit() for name in os.listdir("/proc"))  # noqa: PTH208
    assert abs(int(found[1]) - count) < 50  # others come and go meanwhile
    assert int(found[2]) > 300


def test_the_program_in_c_says_what_is_wrong(total: Path, tmp_path: Path) -> None:
    missing = tmp_path / "none.sock"
    done = run(total, missing)
    assert done.returncode == 1
    assert done.stderr == f"total: {missing}: No such file or directory\n"
    assert run(total).returncode == 2
