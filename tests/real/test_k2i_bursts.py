"""Thousands of processes that are gone at once: each is in the stream of changes, once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from tests.real.conftest import DATACENTERS, LocalCluster

from tabane.k2i import Client
from tabane.k2i.client import Changes

pytestmark = pytest.mark.real

MANY = 1500
"""One after the other, as fast as the machine starts them: in any case more than 10,000 a minute,
unless a start takes 6 ms."""
TOKYO, OSAKA, _ = (f"{dc}/{dc}-1" for dc in DATACENTERS)
ON_THE_MACHINE = ("nsenter", "--net=/proc/2/ns/net", "--")
"""Only there the kernel tells its process events."""
START_MANY = """
import json, os, sys
pids = []
for _ in range(int(sys.argv[1])):
    pids.append(os.posix_spawn("/bin/true", ["true"], {}))
    os.waitpid(pids[-1], 0)
with open(sys.argv[2], "w") as file:
    json.dump(pids, file)
"""


@pytest.fixture(scope="module")
def cluster(borrowed: LocalCluster) -> LocalCluster:
    return borrowed


@contextmanager
def served(directory: Path) -> Iterator[Client]:
    path = directory / "k2i.sock"
    program = str(Path(sys.executable).with_name("k2i"))
    command = (*ON_THE_MACHINE, program, "--unix", str(path))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"On {path}\n"
        try:
            yield Client(f"unix://{path}")
        finally:
            process.terminate()


def test_of_the_machine_each_is_born_and_has_ended_once(tmp_path: Path) -> None:
    births: Counter[int | None] = Counter()
    ends: Counter[int | None] = Counter()
    started = tmp_path / "pids"
    argv = (sys.executable, "-c", START_MANY, str(MANY), str(started))
    with served(tmp_path) as k2i, closing(k2i.changes(fields=["pid"])) as changes:
        next(change for change in changes if isinstance(change, Changes) and not change.first)
        with subprocess.Popen(argv) as starter:
            for change in changes:
                assert isinstance(change, Changes)
                assert (change.source, change.missed) == ("events", "")
                births.update(row["pid"] for row in change.born)
                ends.update(row["pid"] for row in change.died)
                births.update(row.pid for row in change.passed)
                ends.update(row.pid for row in change.passed)
                starter.poll()  # until it is reaped it is there, as a zombie
                if ends[starter.pid]:
                    break
    pids = json.loads(started.read_text())
    assert len(set(pids)) == MANY
    assert {births[pid] for pid in pids} == {1}
    assert {ends[pid] for pid in pids} == {1}


def test_of_a_node_each_is_told_with_its_app_and_end_at_another(cluster: LocalCluster) -> None:
    """Their pids may not be known any more: they are counted by their exit codes."""
    cluster.deploy("burst")
    cluster.wake("burst", "osaka")
    script = f"i=0; while [ $i -lt {MANY} ]; do (exit 7); i=$((i+1)); done; (exit 9); sleep 3"
    k2i = Client(f"unix://{cluster.api.socket_of(TOKYO)}", timeout_s=60)
    codes: Counter[int | None] = Counter()
    with closing(k2i.changes(scope="cluster", app="burst", node=OSAKA)) as changes:
        theirs = (it for it in changes if isinstance(it, Changes) and it.node == OSAKA)
        next(change for change in theirs if change.source == "events")
        command = [sys.executable, "-m", "tabane.tools.cli", "--root", str(cluster.root)]
        with subprocess.Popen([*command, "exec", "burst", "--", "sh", "-c", script]) as running:
            for change in theirs:
                assert (change.source, change.missed) == ("events", "")
                codes.update(row.code for row in change.passed)
                codes.update(row["code"] for row in change.died)
                if codes[9]:
                    break
        assert running.returncode == 0
    assert (codes[7], codes[9]) == (MANY, 1)
