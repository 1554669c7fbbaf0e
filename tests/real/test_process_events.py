"""The kernel's process events: of the machine, and of the namespaces of local nodes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.real.conftest import wait_for

from tabane.network.processes import end_process
from tabane.node.config import event_socket
from tabane.node.outside import Outsider, start_collector, stop_collector
from tabane.runtimes.process import is_same, start_ticks

pytestmark = pytest.mark.real

MANY = 300
PROGRAM = """
import asyncio, json, os, subprocess, sys
from pathlib import Path
from tabane.k2i import EventFeed, ProcessTable
from tabane.supervise import Supervisor

async def main():
    table = ProcessTable()
    feed = EventFeed(table, collector=Path(sys.argv[1]))
    async with Supervisor("test") as tasks:
        feed.start(tasks)
        await feed.started()
        with feed.subscribe() as events:
            found = await short_lived(events)
    table.close()
    print(json.dumps({"source": feed.source, "reason": feed.reason, **found}))

async def short_lived(events):
    '''Children of this process, until the last one has ended.'''
    pids = await asyncio.to_thread(spawn)
    rows = []
    async for event in events:
        rows.append([event.kind, event.pid, event.ppid, event.code, event.signal, event.name])
        if event.kind == "exit" and event.ppid == os.getpid() and event.code == 77:
            break
    return {"pids": pids, "rows": rows}

def spawn():
    pids = []
    for _ in range(int(sys.argv[2])):
        child = subprocess.Popen(["true"])
        pids.append(child.pid)
        child.wait()
    subprocess.run(["sh", "-c", "exit 77"])
    return pids

asyncio.run(main())
"""
ON_THE_MACHINE = ("nsenter", "--net=/proc/2/ns/net", "--")
IN_A_NODE = ("unshare", "--pid", "--net", "--mount", "--fork", "--mount-proc", "--kill-child")


def follow(enter: tuple[str, ...], collector: Path) -> dict[str, Any]:
    argv = (*enter, sys.executable, "-c", PROGRAM, str(collector), str(MANY))
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    stop_collector(tmp_path)


def outsider(root: Path) -> Outsider:
    return Outsider(**json.loads((root / "collector.json").read_text()))


def test_no_short_lived_process_of_the_machine_is_missed(tmp_path: Path) -> None:
    found = follow(ON_THE_MACHINE, tmp_path / "none")
    assert (found["source"], found["reason"]) == ("kernel", "")
    kinds: dict[int, list[str]] = {}
    for kind, pid, *_ in found["rows"]:
        assert kind != "gap"
        kinds.setdefault(pid, []).append(kind)
    for pid in found["pids"]:
        told = [kind for kind in kinds[pid] if kind in ("fork", "exec", "exit")]
        assert told == ["fork", "exec", "exit"], pid


def test_nor_one_of_a_namespace_that_the_kernel_does_not_tell(root: Path) -> None:
    start_collector(root)
    found = follow(IN_A_NODE, event_socket(root))
    assert found["source"] == "collector"
    assert found["reason"].startswith("the kernel refuses to tell process events: ")
    rows = found["rows"]
    children = [row for row in rows if row[0] == "fork" and row[2] == 1]
    assert len(children) == MANY + 1  # each once, whether its pid could be learnt or not
    assert [kind for kind, *_ in rows if kind == "gap"] == []
    known = {pid for _, pid, *_ in children if pid is not None}
    assert known <= {*found["pids"], max(found["pids"]) + 1}
    exits = [row for row in rows if row[0] == "exit"]
    assert len(exits) == MANY + 1
    assert all(row[2] == 1 for row in exits)


def test_others_on_the_machine_are_nothing_to_a_namespace(root: Path) -> None:
    start_collector(root)
    with busy():
        found = follow(IN_A_NODE, event_socket(root))
    assert {row[2] for row in found["rows"] if row[0] == "fork"} == {1}
    assert sum(row[0] == "fork" for row in found["rows"]) == MANY + 1


@contextmanager
def busy() -> Iterator[None]:
    """The machine starts processes all the time."""
    script = "while :; do /bin/true; done"
    with subprocess.Popen(["sh", "-c", script]) as child:
        try:
            yield
        finally:
            child.kill()


def test_a_collector_is_started_once_and_leaves_nothing(root: Path) -> None:
    start_collector(root)
    first = outsider(root)
    start_collector(root)
    assert outsider(root) == first
    assert event_socket(root).stat().st_mode & 0o777 == 0o600
    stop_collector(root)
    assert not is_same(first.pid, first.start_ticks)
    assert {path.name for path in root.iterdir()} == {"collector.log"}
    stop_collector(root)


def collecting(keeper: int) -> list[int]:
    """The process that collects, below the one that keeps it."""
    return [int(pid) for pid in Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()]


def test_one_that_was_killed_comes_back_by_itself(root: Path) -> None:
    start_collector(root)
    keeper = outsider(root)
    (first,) = collecting(keeper.pid)
    os.kill(first, signal.SIGKILL)
    (second,) = wait_for(lambda: [pid for pid in collecting(keeper.pid) if pid != first])
    wait_for(lambda: is_served(event_socket(root)))
    assert follow(IN_A_NODE, event_socket(root))["source"] == "collector"
    stop_collector(root)
    assert start_ticks(second) == start_ticks(keeper.pid) == 0


def is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def test_the_next_start_replaces_one_whose_keeper_was_killed(root: Path) -> None:
    start_collector(root)
    first = outsider(root)
    (child,) = collecting(first.pid)
    end_process(first.pid, first.start_ticks)
    wait_for(lambda: not start_ticks(child), "the end of what it kept")
    start_collector(root)
    assert outsider(root) != first
    assert follow(IN_A_NODE, event_socket(root))["source"] == "collector"


def test_where_the_kernel_does_not_tell_there_is_none_and_nodes_look(root: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tabane.node.outside import start_collector; "
        "start_collector(Path(sys.argv[1]))"
    )
    argv = (*IN_A_NODE, sys.executable, "-c", program, str(root))
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "process events are not collected: the kernel " in done.stderr
    assert {path.name for path in root.iterdir()} == {"collector.log"}
