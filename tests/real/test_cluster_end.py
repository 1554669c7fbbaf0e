"""However a cluster ends, nothing of it is left on the machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.real.conftest import HTTPD, LocalCluster, find_cgroups, open_to_all, wait_for

from tabane.node.cluster import bring_down
from tabane.tools.client import Cluster

pytestmark = pytest.mark.real

TOLD = ("cmdline", "cgroup", "mountinfo")
TWO = ("tokyo", "osaka")
"""Data centers: enough where their number does not matter, as a start of each takes seconds."""


class Belongings:
    """What of a cluster is on this machine."""

    def __init__(self, root: Path) -> None:
        config = json.loads((root / "cluster.json").read_bytes())
        self.root = root
        self.id: str = config["id"]

    def found(self) -> list[str]:
        return [
            *self.processes(),
            *(name for _, name in socket.if_nameindex() if self.id in name),
            *(line for line in nft_tables() if self.id in line),
            *(line for line in mounts() if self.id in line),
            *(str(path) for path in find_cgroups(self.id)),
        ]

    def processes(self) -> list[str]:
        """Those started with the cluster's files, or in its cgroups, or in mounts of its own."""
        signs = (str(self.root), f"/tabane/{self.id}")
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            if int(path.name) == os.getpid():
                continue
            try:
                texts = [(path / n).read_text(errors="replace") for n in TOLD]
            except OSError:
                continue
            if any(sign in text for sign in signs for text in texts):
                found.append(f"process {path.name}: {texts[0]!r}")
        return found


def nft_tables() -> list[str]:
    argv = ["nft", "list", "tables"]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()


def mounts() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    root = open_to_all(tmp_path) / "cluster"
    yield root
    bring_down(root)


def start(root: Path, *command: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "tabane.tools.cli", "--root", str(root), *command]
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True)


def interrupt(process: subprocess.Popen[str]) -> tuple[int, str]:
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def read_until(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return
    raise AssertionError(f"it ended before it said {word!r}")


def test_down_leaves_nothing_but_what_is_stored(root: Path) -> None:
    root.mkdir()
    cluster = LocalCluster(root, TWO)
    belongings = Belongings(root)
    cluster.deploy("left", reactive={"min": 2})
    cluster.deploy(
        "stubborn", ["sh", "-c", f"trap '' TERM; {' '.join(HTTPD)} & while :; do wait; done"]
    )
    cluster.wake("left")
    cluster.wake("stubborn", "osaka")
    assert len(belongings.found()) > 3
    ended = cluster.tabane("down")
    assert (ended.code, ended.err) == (0, "")
    assert belongings.found() == []
    again = LocalCluster(root, TWO)
    assert {app["name"] for app in again.api.get("/api/v1/apps")["apps"]} == {"left", "stubborn"}
    assert again.get("stubborn", path="/GPL-3").status == 200
    assert again.tabane("down", "--purge").code == 0
    assert belongings.found() == []
    assert not root.exists() or not list(root.glob("nodes"))


def test_down_also_clears_away_what_crashed(root: Path) -> None:
    root.mkdir()
    cluster = LocalCluster(root, TWO)
    belongings = Belongings(root)
    cluster.deploy("orphan")
    cluster.wake("orphan")
    for node in cluster.addresses:
        os.kill(cluster.holder(node), signal.SIGKILL)
    assert cluster.tabane("down").code == 0
    assert belongings.found() == []
    assert cluster.tabane("down").code == 0


def test_up_starts_a_dead_node_again(root: Path) -> None:
    """One that had a frozen instance: that does not end with it, and its pid namespace stays."""
    root.mkdir()
    cluster = LocalCluster(root, TWO)
    belongings = Belongings(root)
    cluster.deploy("back", reactive={"freeze_after": "100ms"})
    cluster.wake("back", "osaka")
    wait_for(lambda: cluster.instances("back", "frozen"), "the frozen instance")
    before = cluster.api.get("/api/v1/node", node="osaka-1")
    running = cluster.tabane("up", "-d")
    assert (running.code, running.out.count("gateway http://")) == (0, len(cluster.addresses))
    assert running.out.endswith("runs already\n")
    os.kill(cluster.holder("osaka/osaka-1"), signal.SIGKILL)
    refused = cluster.tabane("up", "-d", "--nodes", "2")
    assert (refused.code, "runs below" in refused.err) == (1, True)
    again = cluster.tabane("up", "-d")
    assert (again.code, again.err) == (0, "")
    lines = again.out.splitlines()
    assert len(lines) == len(cluster.addresses)
    (line,) = (line for line in lines if "started again" in line)
    assert line.startswith("osaka/osaka-1 ")
    after = cluster.api.get("/api/v1/node", node="osaka-1")
    assert before["incarnation"] != after["incarnation"]
    (woken,) = {each["instance"] for each in cluster.records("events", "back")}
    ends = [each for each in cluster.records("events", "back") if each["state"] == "absent"]
    assert [(each["instance"], each["reason"]) for each in ends] == [(woken, "its node ended")]
    assert cluster.get("back", "osaka", "/GPL-3").status == 200
    assert cluster.tabane("down").code == 0
    assert belongings.found() == []


@pytest.mark.parametrize("word", ["tokyo/tokyo-1", "until Ctrl-C"])
def test_an_interrupted_up_leaves_nothing(root: Path, word: str) -> None:
    process = start(root, "up", "--datacenters", ",".join(TWO))
    read_until(process, word)
    belongings = Belongings(root)
    code, errors = interrupt(process)
    assert (code in (0, 130), errors) == (True, "")
    assert belongings.found() == []


def test_an_up_that_is_interrupted_while_it_starts_leaves_nothing(root: Path) -> None:
    process = start(root, "up", "-d")
    wait_for(lambda: len(list(root.glob("nodes/*/*/process.json"))) >= 2, "two nodes")
    belongings = Belongings(root)
    assert interrupt(process) == (130, "")
    assert belongings.found() == []


@pytest.mark.parametrize("word", ["up in", "first request", "Two seconds"])
def test_an_interrupted_demo_leaves_nothing(root: Path, word: str) -> None:
    root.mkdir()
    process = start(root, "demo")
    read_until(process, word)
    belongings = Belongings(root)
    code, errors = interrupt(process)
    assert code == 130
    assert "Traceback" not in errors
    assert belongings.found() == []


def test_the_demo_works_twice(root: Path) -> None:
    for _ in range(2):
        process = start(root.parent, "demo", "--root", str(root.parent))
        out, errors = process.communicate(timeout=100)
        assert (process.returncode, errors) == (0, "")
        assert "All of it is gone again" in out
        assert "osaka-1 hello container" in out
        assert Belongings(root.parent).found() == []


def test_a_second_cluster_beside_the_first_is_its_own(root: Path, tmp_path: Path) -> None:
    first, second = (tmp_path / name for name in ("first", "second"))
    for place in (first, second):
        place.mkdir()
        place.chmod(0o755)
    clusters = [LocalCluster(first, ["here"]), LocalCluster(second, ["here"])]
    try:
        for number, cluster in enumerate(clusters):
            cluster.deploy(f"mine-{number}")
            assert cluster.get(f"mine-{number}", "here", "/GPL-3").status == 200
            assert cluster.get(f"mine-{1 - number}", "here", "/GPL-3").status == 404
        assert clusters[0].tabane("down").code == 0
        assert clusters[1].get("mine-1", "here", "/GPL-3").status == 200
    finally:
        for cluster in clusters:
            bring_down(cluster.root)
    assert [name for name in ("first", "second") if Cluster(tmp_path / name).config is None] == []
