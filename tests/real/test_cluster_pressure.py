"""A node with little memory, and apps that hold what was given to them: the coldest make room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.real.conftest import LocalCluster, open_to_all, wait_for

from tabane.model import AppName, NodeName
from tabane.scheduler.placement import home_of
from tabane.tools.cli.cluster import start_cluster
from tabane.tools.client import Cluster

pytestmark = pytest.mark.real

NODE_MIB = 800
HELD_MIB = 60
"""Of each app's layer, which is in memory."""
HOLDS = f"""
head -c {HELD_MIB}M /dev/zero >/tmp/held && echo hello >/tmp/index.html
exec busybox httpd -f -p 8000 -h /tmp
"""
ROOM = {"memory": "32MiB", "disk": "96MiB"}


class SmallCluster(LocalCluster):
    def __init__(self, root: Path, nodes: int, node_mib: int) -> None:
        self.root = root
        start_cluster(root, ["tokyo"], nodes, 1, "", memory_bytes=node_mib << 20)
        self.api = Cluster(root)
        peers = self.api.config["nodes"]
        self.addresses = {f"tokyo/{peer['name']}": peer["address"] for peer in peers}

    def deploy_holding(self, name: str, **reactive: object) -> None:
        self.deploy(name, ["sh", "-c", HOLDS], resources=ROOM, reactive=reactive)

    def reasons(self, name: str) -> list[str]:
        """Why its instances were stopped."""
        events = self.records("events", name)
        return [event["reason"] for event in events if event["state"] == "stopping"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallCluster]:
    cluster = SmallCluster(open_to_all(tmp_path_factory.mktemp("cluster")), 1, NODE_MIB)
    yield cluster
    cluster.close()


@pytest.fixture
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallCluster]:
    """Two nodes, each of them the home of some apps that run on the other."""
    cluster = SmallCluster(open_to_all(tmp_path_factory.mktemp("two")), 2, NODE_MIB // 2)
    yield cluster
    cluster.close()


def test_more_apps_than_fit_are_served_as_the_coldest_make_room(small: SmallCluster) -> None:
    names = [f"app-{number}" for number in range(14)]
    small.deploy_holding("kept", min=1)
    small.get("kept")
    for name in names:
        small.deploy_holding(name)
        assert small.get(name).status == 200, name
    left = [name for name in names if not small.instances(name, "ready")]
    assert 2 < len(left) < len(names)
    assert left == names[: len(left)]
    assert "its node needs its memory for default/" in small.reasons("app-0")[0]
    assert [one["state"] for one in small.instances("kept")] == ["ready"]
    assert small.get("app-0").status == 200


def test_what_grows_has_the_coldest_leave(small: SmallCluster) -> None:
    """Each of two has room for what it may hold, but both together take all."""
    for name in ("grows", "grows-too"):
        small.deploy(name, ["sh", "-c", HOLDS], resources=ROOM | {"disk": "280MiB"})
        assert small.get(name).status == 200
    before = {one["id"] for one in small.api.get("/api/v1/instances")["instances"]}
    for name in ("grows", "grows-too"):
        assert small.inside(name, "sh", "-c", "head -c 210M /dev/zero >/tmp/more")[0] == 0

    def told() -> list[str]:
        events = small.api.get("/api/v1/events?limit=2000")["records"]
        mine = (one.get("reason", "") for one in events if one["instance"] in before)
        return [reason for reason in mine if "is short of memory" in reason]

    assert "MiB available, 64 are kept free): it was idle for" in wait_for(told)[0]
    assert [one["state"] for one in small.instances("grows-too")] == ["ready"]


def test_an_app_for_which_there_cannot_be_room_is_refused_with_the_reason(
    small: SmallCluster,
) -> None:
    small.deploy("huge", resources={"memory": "2GiB"})
    answer = small.get("huge")
    assert answer.status == 503
    assert "MiB of memory available" in answer.body


def test_a_node_takes_down_what_has_its_home_on_another(two: SmallCluster) -> None:
    names = [f"app-{number}" for number in range(14)]
    places = [NodeName(node) for node in two.addresses]
    for number, name in enumerate(names):
        two.deploy_holding(name)
        assert two.get(name, at=places[number % 2]).status == 200, name
    events = two.api.get("/api/v1/events?limit=2000")["records"]
    stopped = [one for one in events if one["state"] == "stopping"]
    assert all("its node needs its memory for" in one["reason"] for one in stopped)
    assert any(home_of(AppName(one["app"]), places) != one["node"] for one in stopped)


def test_an_agent_that_is_killed_in_between_changes_nothing(small: SmallCluster) -> None:
    """Nobody but the agent knew what was on its way; the next one looks again."""
    names = [f"more-{number}" for number in range(8)]
    for number, name in enumerate(names):
        small.deploy_holding(name)
        assert small.get(name).status == 200, name
        if number % 3 == 2:
            small.kill("agentd")
            wait_for(lambda: small.answers("tokyo/tokyo-1"), "the next agent")
    events = small.api.get("/api/v1/events?limit=2000")["records"]
    assert [one for one in events if one["state"] == "failed" and one["app"]] == []
