"""Instances that freeze between their sessions, under requests, orders and the ends of agents."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from tests.real.conftest import Factory, LocalCluster, find_cgroups, wait_for

pytestmark = pytest.mark.real

FREEZE = {"freeze_after": "50ms", "stop_after": "1h", "max": 1, "start_timeout": "1m"}
ROUNDS = 120
SWEEP_S = 0.15
"""From one request to the next at the most: they meet a freeze before, while and after it is."""


@pytest.fixture(scope="module")
def cluster(make_cluster: Factory) -> LocalCluster:
    return make_cluster(["tokyo"])


def frozen(cluster: LocalCluster, name: str) -> dict[str, Any]:
    """The app's instance, once it is frozen."""

    def at_rest() -> dict[str, Any] | None:
        found = cluster.instances(name)
        return found[0] if [i["state"] for i in found] == ["frozen"] else None

    return wait_for(at_rest, f"{name} frozen")


def rest(cluster: LocalCluster, name: str) -> dict[str, Any]:
    """Have the app woken, and its instance frozen again."""
    assert cluster.get(name, path="/GPL-3").status == 200
    return frozen(cluster, name)


def stands_still(instance: dict[str, Any]) -> bool:
    """As this machine's kernel says."""
    trees = find_cgroups(instance["id"])
    files = [file for tree in trees if (file := tree / "freezer.state").exists()]
    events = [file for tree in trees if (file := tree / "cgroup.events").exists()]
    return any(f.read_text().strip() == "FROZEN" for f in files) or any(
        "frozen 1" in f.read_text() for f in events
    )


@pytest.mark.parametrize("isolation", ["container", "sandbox"])
def test_no_request_is_lost_however_it_meets_a_freeze(
    cluster: LocalCluster, isolation: str
) -> None:
    name = f"race-{isolation}"
    cluster.deploy(name, isolation=isolation, reactive=FREEZE)
    before = rest(cluster, name)
    for number in range(ROUNDS):
        time.sleep(SWEEP_S * number / ROUNDS)
        assert cluster.get(name, path="/GPL-3").status == 200, number
    assert stands_still(frozen(cluster, name))
    with cluster.requests(name, threads=4) as seen:
        pass
    assert seen.failures() == []
    assert [one["id"] for one in cluster.instances(name)] == [before["id"]]
    assert cluster.starts(name) == 1
    thaws = [wake for wake in cluster.records("wakes", name) if wake["option"] == "thaw"]
    assert len(thaws) > ROUNDS / 4
    assert {wake["outcome"] for wake in thaws if "outcome" in wake} <= {"ok"}


def test_the_next_agent_finds_it_frozen_and_thaws_it(cluster: LocalCluster) -> None:
    cluster.deploy("kept", reactive=FREEZE)
    before = rest(cluster, "kept")
    cluster.kill("agentd")
    cluster.wait_whole()
    after = frozen(cluster, "kept")
    assert (after["id"], after["pid"]) == (before["id"], before["pid"])
    assert stands_still(after)
    assert cluster.get("kept", path="/GPL-3").status == 200
    assert cluster.starts("kept") == 1


def test_requests_while_agents_are_killed_are_all_answered(cluster: LocalCluster) -> None:
    cluster.deploy("shaken", reactive=FREEZE)
    before = rest(cluster, "shaken")
    for _ in range(3):
        frozen(cluster, "shaken")
        cluster.kill("agentd")
        assert cluster.get("shaken", path="/GPL-3").status == 200
        cluster.wait_whole()
    assert [one["id"] for one in cluster.instances("shaken")] == [before["id"]]


def test_what_people_do_inside_thaws_it(cluster: LocalCluster, tmp_path: Path) -> None:
    cluster.deploy("used", reactive=FREEZE)
    rest(cluster, "used")
    assert cluster.inside("used", "echo", "hello") == (0, "hello\n")
    instance = frozen(cluster, "used")
    copied = cluster.tabane("cp", f"{instance['id']}:/etc/hostname", str(tmp_path / "name"))
    assert copied.code == 0, copied
    assert (tmp_path / "name").read_text().strip().endswith(instance["id"])
    frozen(cluster, "used")
    paused = cluster.tabane("ps", "--app", "used")
    assert "busybox" in paused.out


def test_a_signal_ends_it_and_the_next_session_starts_another(cluster: LocalCluster) -> None:
    cluster.deploy("killed", reactive=FREEZE)
    before = rest(cluster, "killed")
    ended = cluster.tabane("pkill", "-KILL", "--app", "killed", "busybox")
    assert ended.code == 0, ended
    wait_for(lambda: before["id"] not in {i["id"] for i in cluster.instances("killed")}, "its end")
    assert rest(cluster, "killed")["id"] != before["id"]


def test_one_that_is_frozen_stops_as_it_is_asked_to(cluster: LocalCluster) -> None:
    cluster.deploy("ended", reactive={"freeze_after": "50ms", "stop_after": "1s"})
    assert cluster.get("ended", path="/GPL-3").status == 200
    wait_for(lambda: not cluster.instances("ended"), "its end")
    states = [event["state"] for event in cluster.records("events", "ended")]
    assert states[-4:] == ["freezing", "frozen", "stopping", "absent"]
    reasons = {event.get("reason", "") for event in cluster.records("events", "ended")}
    assert "idle for 1 s" in reasons


def test_what_is_kept_may_be_frozen_and_gives_its_memory_back(cluster: LocalCluster) -> None:
    cluster.deploy("warm", reactive=FREEZE | {"min": 1, "reclaim": True})
    instance = frozen(cluster, "warm")
    assert stands_still(instance)
    assert cluster.get("warm", path="/GPL-3").status == 200
