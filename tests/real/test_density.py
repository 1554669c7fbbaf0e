"""Hundreds of apps at rest on a node with three gateways, and instances that are frozen: what there
is is counted, not timed."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from pathlib import Path

import pytest
from tests.real.conftest import HTTPD, Factory, LocalCluster, to_toml, wait_for

pytestmark = pytest.mark.real

APPS, FROZEN, WOKEN = 300, 20, 5
NODE = "tokyo/tokyo-1"
SLACK = 12
"""Descriptors that come and go whatever there is: connections of ours, threads' pipes."""


@pytest.fixture(scope="module")
def cluster(make_cluster: Factory) -> LocalCluster:
    return make_cluster(["tokyo"], gateways=3)


def write_apps(directory: Path, names: list[str], **reactive: str) -> Path:
    directory.mkdir()
    for name in names:
        top = {"name": name, "image": "host", "command": list(HTTPD), "port": 8000}
        top |= {"hosts": [f"{name}.test"]}
        sections = {"resources": {"memory": "64MiB"}, "reactive": {"stop_after": "1h", **reactive}}
        (directory / f"{name}.toml").write_text(to_toml(top, sections))
    return directory


def parts(cluster: LocalCluster) -> dict[int, str]:
    """The node's own processes: pid, and which it is."""
    holder = cluster.holder(NODE)
    children = Path(f"/proc/{holder}/task/{holder}/children").read_text().split()
    argv = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    own = {pid: text for pid, text in argv.items() if "tabane.node." in text}
    return {holder: "holder"} | {
        pid: text.partition("tabane.node.")[2].split("\0")[0] for pid, text in own.items()
    }


def descriptors(pid: int) -> int:
    """Without files of /proc: how many of these are kept is the process table's to know."""
    found = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found += not str(link.readlink()).startswith("/proc/")
    return found


def test_hundreds_of_apps_are_a_few_commits_and_no_descriptor_more(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    names = [f"app-{number}" for number in range(APPS)]
    directory = write_apps(tmp_path / "apps", names)
    cluster.deploy("first")
    cluster.wake("first")
    there = parts(cluster)
    assert sorted(there.values()).count("gatewayd") == 3
    before = {pid: descriptors(pid) for pid in there}
    commits = cluster.api.get("/api/v1/node")["revision"]
    for _ in range(2):
        ended = cluster.tabane("deploy", "--json", str(directory))
        assert ended.code == 0, ended.err
        told = json.loads(ended.out)
        assert [row["changed"] for row in told["apps"]] == [True] * APPS
        assert told["known"] == ["tokyo"]
        known = cluster.api.get("/api/v1/apps")["apps"]
        assert {app["name"] for app in known} == {"first", *names}
        for name in random.sample(names, WOKEN):
            assert cluster.get(name, path="/GPL-3").status == 200
        assert len(cluster.api.get("/api/v1/instances")["instances"]) == 1 + WOKEN
        ended = cluster.tabane("rm", *names)
        assert ended.code == 0 and f"{APPS} apps removed" in ended.out, ended.err
        wait_for(lambda: len(cluster.api.get("/api/v1/instances")["instances"]) == 1)
        assert cluster.get(names[0]).status == 404
    assert parts(cluster) == there, "none of them was started again"
    for pid, part in there.items():
        wait_for(lambda pid=pid: descriptors(pid) <= before[pid] + SLACK, f"the end of {part}'s")
    renewals = 10  # of the node's lease
    made = cluster.api.get("/api/v1/node")["revision"] - commits
    assert made <= 2 * 2 * (APPS / 100) + renewals


def test_what_is_frozen_is_thawed_in_any_order_and_leaves_nothing_behind(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    names = [f"ice-{number}" for number in range(FROZEN)]
    directory = write_apps(tmp_path / "apps", names, freeze_after="100ms")
    cluster.clear()
    assert cluster.tabane("deploy", str(directory)).code == 0
    agent = cluster.part("agentd")
    before = descriptors(agent)
    for name in names:
        assert cluster.get(name, path="/GPL-3").status == 200
    ids = wait_frozen(cluster)
    assert descriptors(agent) <= before + SLACK, "nothing is open for one that is frozen"
    for name in random.sample(names, FROZEN):
        assert cluster.get(name, path="/GPL-3").status == 200
    assert wait_frozen(cluster) == ids, "they are the same instances"
    options = [wake["option"] for wake in cluster.api.get("/api/v1/wakes?limit=2000")["records"]]
    assert options.count("thaw") == FROZEN
    assert cluster.tabane("rm", *names).code == 0
    wait_for(lambda: not cluster.api.get("/api/v1/instances")["instances"], "the end of all")
    wait_for(lambda: descriptors(agent) <= before + SLACK, "the end of their descriptors")


def wait_frozen(cluster: LocalCluster) -> set[str]:
    """The ids of all, once all are."""

    def look() -> set[str] | None:
        found = cluster.api.get("/api/v1/instances")["instances"]
        frozen = {instance["id"] for instance in found if instance["state"] == "frozen"}
        return frozen if len(frozen) == FROZEN else None

    return wait_for(look, "all frozen")
