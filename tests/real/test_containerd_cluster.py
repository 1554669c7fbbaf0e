"""An app that containerd keeps, from its first request to its end, and what survives what."""

from __future__ import annotations

import os
import signal
from itertools import chain
from pathlib import Path

import pytest
from tests.real.conftest import Factory, LocalCluster, wait_for

from tabane.runtimes.containerd.shims import find_shims
from tabane.runtimes.process import descendants

pytestmark = pytest.mark.real

NODE = "tokyo/tokyo-1"
SHIM = "containerd-shim-runc-v2"


@pytest.fixture(scope="module")
def cluster(make_cluster: Factory) -> LocalCluster:
    return make_cluster(["tokyo"])


def containerd_of(cluster: LocalCluster) -> int:
    """The node's own; 0: it has none."""
    found = (pid for pid in descendants(cluster.holder(NODE)) if name_of(pid) == "containerd")
    return next(found, 0)


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_the_life_of_an_app(cluster: LocalCluster) -> None:
    """The first request starts containerd and the app; when that is idle it is stopped, and
    nothing of it is left but its log."""
    assert containerd_of(cluster) == 0
    script = "echo began; exec busybox httpd -f -p 8000 -h /usr/share/common-licenses"
    reactive = {"stop_after": "1s"}
    cluster.deploy("kept", ["sh", "-c", script], driver="containerd", reactive=reactive)
    instance = cluster.wake("kept")
    assert instance["driver"] == "containerd"
    assert "began" in cluster.tabane("logs", instance["id"]).out
    (shim,) = find_shims(SHIM, instance["id"])
    (wake,) = cluster.records("wakes", "kept")
    assert wake["option"] == "cold" and wake["phases_us"]["engine"] > 0
    wait_for(lambda: not cluster.instances("kept"), "its idle stop")
    wait_for(lambda: not Path(f"/proc/{shim}").exists(), "the end of its shim")
    run = Path("/proc", str(cluster.holder(NODE)), "root", "mnt/run")
    assert (run / "drivers/containerd/daemon").exists()

    def left() -> list[str]:
        """By `os.walk`, as containerd removes files meanwhile."""
        names = (name for _, *found in os.walk(run) for name in chain(*found))
        return [name for name in names if instance["id"] in name]

    wait_for(lambda: not left(), "its last file's end")
    assert "began" in cluster.tabane("logs", "kept").out


def test_it_outlives_agent_and_containerd(cluster: LocalCluster) -> None:
    """The next of each finds it, and can enter and end it."""
    cluster.deploy("lasting", driver="containerd")
    first = cluster.wake("lasting")
    assert cluster.inside("lasting", "echo", "there") == (0, "there\n")
    containerd = containerd_of(cluster)
    assert containerd
    os.kill(containerd, signal.SIGKILL)
    cluster.kill("agentd", NODE)
    wait_for(lambda: cluster.answers(NODE), "the next agent")
    assert cluster.wake("lasting")["id"] == first["id"]
    assert cluster.inside("lasting", "echo", "there") == (0, "there\n")
    assert "busybox" in cluster.tabane("ps", "--app", "lasting").out
    assert cluster.tabane("stop", first["id"]).code == 0
    wait_for(lambda: not cluster.instances("lasting"), "its end")
    assert not list(find_shims(SHIM, first["id"]))


def test_the_doctor_lists_what_cannot_work_here(cluster: LocalCluster) -> None:
    out = cluster.tabane("doctor").out
    assert "containerd-shim-kata-v2 is not installed" in out
    assert "firecracker is not installed" in out
