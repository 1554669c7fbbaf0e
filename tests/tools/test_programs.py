"""Commands as programs: full disks, readers that go away, Ctrl-C, odd terminals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tty
from pathlib import Path
from typing import Any

import pytest
from tests.tools.answers import APP, answer
from tests.tools.conftest import Pretended, reply


def start(*argv: str, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tabane.tools.cli", *argv]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **options)


FULL_DISK = [["--help"], ["ps", "--help"], ["ps"], ["ps", "--json"], ["apps"], ["events"]]


@pytest.mark.parametrize("line", FULL_DISK, ids=" ".join)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written(
    line: list[str], unbuffered: str, pretended: Pretended
) -> None:
    pretended.begin(tokyo=answer)
    environment = os.environ | {"TABANE_ROOT": str(pretended.root), "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("wb") as full, start(*line, stdout=full, env=environment) as done:
        _, err = done.communicate(timeout=60)
    who = "tabane" if line == ["--help"] else f"tabane: {line[0]}"
    assert err.decode() == f"{who}: cannot write: No space left on device\n"
    assert done.returncode == 1


@pytest.mark.parametrize("line", FULL_DISK, ids=" ".join)
def test_a_reader_that_goes_away(line: list[str], pretended: Pretended) -> None:
    pretended.begin(tokyo=answer)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with start("--root", str(pretended.root), *line, stdout=writer) as done:
            assert done.communicate(timeout=60) == (None, b"")
    finally:
        os.close(writer)
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("apps >&-", 1, b"tabane: apps: cannot write: Bad file descriptor\n"),
        ("apps >&- 2>&-", 1, b""),
        ("apps 2>&- >/dev/null", 0, b""),
        ("pgrep nobody >&- 2>&-", 1, b""),
        ("stop hello >&- 2>&- <&-", 1, b""),
        ("completion nope >&- 2>&-", 2, b""),
    ],
)
def test_closed_streams(line: str, code: int, said: bytes, pretended: Pretended) -> None:
    """Writing to a closed stdout is a failure, as of all commands, and not writing is none."""
    pretended.begin(tokyo=answer)
    script = f'exec "$0" -m tabane.tools.cli --root "$1" {line}'
    argv = ["sh", "-c", script, sys.executable, str(pretended.root)]
    done = subprocess.run(argv, timeout=30, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (code, said)


def test_a_terminal_without_unicode(pretended: Pretended) -> None:
    known = {"apps": [APP | {"hosts": ["束ね"]}], "silent": []}
    pretended.begin(tokyo=reply(known))
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    argv = ["--root", str(pretended.root), "apps"]
    with start(*argv, stdout=subprocess.PIPE, env=environment) as done:
        out, err = done.communicate(timeout=60)
    assert (done.returncode, err) == (0, b"")
    assert b"\\u675f\\u306d" in out


def test_a_terminal_gets_no_control_characters_of_an_app(pretended: Pretended) -> None:
    log = b"2026-01-31T23:59:59.1Z stdout F \x1b[2J\xff\ta \xe6\x9d\x9f\xc2\x9b31m\r\x07\n"

    def tell(question: str, body: bytes) -> bytes:
        return reply(log) if "/log" in question else answer(question, body)

    pretended.begin(tokyo=tell)
    terminal, its = os.openpty()
    tty.setraw(its)
    with start("--root", str(pretended.root), "logs", "hello", stdout=its) as done:
        os.close(its)
        _, err = done.communicate(timeout=60)
    shown = os.read(terminal, 1000)
    os.close(terminal)
    assert (done.returncode, err) == (0, b"")
    assert shown == "\\x1b[2J\\xff\ta 束\\x9b31m\\r\\x07\n".encode()


@pytest.mark.parametrize("line", [["events", "-f"], ["logs", "-f", "hello"], ["ps"]])
def test_ctrl_c(line: list[str], pretended: Pretended) -> None:
    """Sent when the node has the question and does not answer it."""
    pretended.begin(tokyo=answer)
    node = pretended.nodes["tokyo"]
    asked, written = os.pipe()

    def hang(question: str, body: bytes) -> bytes:
        if "follow=true" not in question and "/v2/" not in question:
            return answer(question, body)
        os.write(written, b"!")
        node.over.wait()
        return b""

    node.answer = hang
    with start("--root", str(pretended.root), *line, stdout=subprocess.PIPE) as child:
        os.read(asked, 1)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    os.close(asked)
    os.close(written)
    assert (child.returncode, out, err) == (130, b"", b"")


@pytest.mark.parametrize(
    ("module", "program", "lines"),
    [
        (
            "tabane.k2i.cli",
            "k2i",
            [["--bogus"], ["x"], ["--port"], ["--port", "x"], ["--port", "-1"], ["--host", "::"]],
        ),
        (
            "tabane.middlecon.cli",
            "middlecon",
            [
                ["bogus"],
                ["--bogus"],
                ["say"],
                ["join", "r", "--hub"],
                ["ask", "r", "t", "--timeout", "x"],
            ],
        ),
    ],
)
def test_the_other_programs(module: str, program: str, lines: list[list[str]]) -> None:
    main = f"import sys; from {module} import main; sys.argv[0] = {program!r}; sys.exit(main())"
    for line in lines:
        command = [sys.executable, "-c", main, *line]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"{program}: ")
        assert done.stderr.count("\n") == 1
    command = [sys.executable, "-c", main, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {program} ")
