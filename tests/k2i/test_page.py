"""docs/k2i.md is true: its `ps` runs, its parameters and kinds are those that there are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.k2i.conftest import Start
from tests.k2i.test_cli import K2I, serve

from tabane.k2i.kinds import KINDS
from tabane.k2i.query import GROUPS, OWNER, PLACE, SHAPE

PAGE = (Path(__file__).parents[2] / "docs" / "k2i.md").read_text()
PROGRAM, SNIPPET = (block.split("```")[0] for block in PAGE.split("```python\n")[1:3])


def ps(*arguments: str, url: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TABANE_K2I": url}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_ps_in_20_lines(start: Start) -> None:
    assert len([line for line in PROGRAM.splitlines() if line.strip()]) <= 20
    child = start("open('/proc/self/comm', 'w').write('a\\x1b[2J\\nb')")
    for service in serve():
        done = ps(url=f"http://127.0.0.1:{service.port}")
        assert (done.returncode, done.stderr) == (0, "")
        heading, *lines = done.stdout.splitlines()
        assert heading.split()[:3] == ["NODE", "USER", "PID"]
        by_pid = {int(line.split()[2]): line for line in lines}
        assert r"[a\x1b[2J\nb]" in by_pid[child.pid]
        assert service.process.pid in by_pid
        refused = ps("--cluster", url=f"http://127.0.0.1:{service.port}")
        assert refused.returncode == 1
        assert refused.stderr == "ps: scope: this k2i belongs to no cluster\n"


@pytest.mark.parametrize("options", [[], ["--audit"]], ids=["port", "unix"])
def test_what_the_client_does(options: list[str], tmp_path: Path) -> None:
    """Literally, at a port, and at a socket where orders are obeyed."""
    socket, audit = str(tmp_path / "k2i.sock"), str(tmp_path / "audit.log")
    where = ["--unix", socket, "--audit", audit] if options else ["--port", "0"]
    with subprocess.Popen([K2I, *where], stdout=subprocess.PIPE, text=True) as k2i:
        assert k2i.stdout
        place = k2i.stdout.readline().removeprefix("On ").strip()
        url = f"unix://{place}" if options else f"http://{place}"
        done = subprocess.run(
            [sys.executable, "-c", SNIPPET],
            capture_output=True,
            text=True,
            env=os.environ | {"TABANE_K2I": url},
            timeout=60,
        )
        k2i.terminate()
    assert (done.returncode, done.stderr) == (0, "")
    *refused, last = done.stdout.splitlines()
    assert re.fullmatch("(looks|events) [0-9]+ processes", last)
    if not options:
        assert refused == [
            "this k2i only tells: it obeys where it knows who asks: "
            "start it with `--unix PATH --audit FILE`"
        ]


def test_ps_without_a_k2i() -> None:
    done = ps(url="unix:///nowhere/k2i.sock")
    assert done.returncode == 1
    assert done.stderr.startswith("ps: no k2i at /nowhere/k2i.sock: ")
    assert done.stderr.count("\n") == 1


def test_every_question_is_on_the_page() -> None:
    table = PAGE.split("## Questions")[1].split("| parameter |")[0]
    named = {name.partition("?")[0] for name in re.findall(r"`([a-z/?=]+)`", table)}
    assert set(KINDS) <= named


def test_every_common_parameter_is_on_the_page() -> None:
    table = PAGE.split("| parameter | |")[1].split("\n\n")[0]
    named = {word for text in re.findall(r"`([^`]+)`", table) for word in text.split()}
    assert {*PLACE, *OWNER, *SHAPE, *GROUPS} <= named
