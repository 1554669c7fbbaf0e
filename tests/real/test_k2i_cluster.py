"""k2i over all nodes of a real cluster: one answer, one stream, and nodes that vanish."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from tests.real.conftest import DATACENTERS, Factory, LocalCluster, wait_for

from tabane.errors import NotFound
from tabane.tools.client import ask

pytestmark = pytest.mark.real

NODES = [f"{dc}/{dc}-1" for dc in DATACENTERS]


def processes(cluster: LocalCluster, query: str = "") -> dict[str, Any]:
    path = f"/v2/processes?scope=cluster{query}"
    answer: dict[str, Any] = cluster.api.get(path, node=NODES[0])
    return answer


def test_all_nodes_in_one_answer(cluster: LocalCluster) -> None:
    cluster.deploy("web")
    cluster.wake("web", "osaka")
    answer = processes(cluster)
    assert [node["node"] for node in answer["nodes"]] == NODES
    assert answer["silent"] == []
    assert all(0 <= node["age_s"] < 10 for node in answer["nodes"])
    incarnations = {row["incarnation"] for row in answer["processes"]}
    assert incarnations == {node["incarnation"] for node in answer["nodes"]}
    assert len(incarnations) == len(NODES)
    mine = [row for row in answer["processes"] if row["app"] == "default/web"]
    assert {(row["dc"], row["class"], row["namespace"]) for row in mine} == {
        ("osaka", "container", "default")
    }
    pids = [row["pid"] for row in mine]
    assert [row["pid"] for row in processes(cluster, "&app=web")["processes"]] == pids


def test_groups_are_added_over_nodes(cluster: LocalCluster) -> None:
    answer = processes(cluster, "&group=name&sum=rss_kib&sort=-count&limit=1&name=tabane-agent")
    by_node = processes(cluster, "&group=node,name&sum=rss_kib&name=tabane-agent")["processes"]
    assert len(by_node) == len(NODES)
    ((total,), parts) = answer["processes"], by_node
    assert total["count"] == sum(row["count"] for row in parts)
    assert total["rss_kib"] > max(row["rss_kib"] for row in parts)


def test_only_the_nodes_it_is_about_are_asked(cluster: LocalCluster) -> None:
    answer = processes(cluster, "&dc=osaka,ishikari")
    assert [node["node"] for node in answer["nodes"]] == NODES[1:]
    assert {row["dc"] for row in answer["processes"]} == {"osaka", "ishikari"}
    with pytest.raises(NotFound, match="nowhere"):
        processes(cluster, "&node=nowhere")


@pytest.mark.parametrize("kind", ["host", "mounts", "logins", "tree", "threads", "files"])
def test_every_kind_of_question_has_all_nodes(cluster: LocalCluster, kind: str) -> None:
    answer = cluster.api.get(f"/v2/{kind}?scope=cluster")
    assert [node["node"] for node in answer["nodes"]] == NODES
    if kind != "logins":
        assert {row["dc"] for row in answer[kind]} == set(DATACENTERS)


def test_histories_of_all_nodes(cluster: LocalCluster) -> None:
    def of_all() -> bool:
        rows = cluster.api.get("/v2/history?scope=cluster")["history"]
        return {row["dc"] for row in rows} == set(DATACENTERS)

    wait_for(of_all, "samples of all nodes")


def test_the_bytes_of_all_processes(cluster: LocalCluster) -> None:
    status, body = ask(cluster.api.socket_of(NODES[0]), "/v2/raw?scope=cluster", 10.0)
    assert status == 200
    answer = msgspec.msgpack.decode(body)
    assert [node["node"] for node in answer["nodes"]] == NODES
    for node in answer["nodes"]:
        rows = msgspec.msgpack.decode(node["rows"], strict=False)
        assert rows["processes"]
        assert rows["host"]["meminfo"].startswith(b"MemTotal:")


class Events:
    """What a stream of events says, one by one."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines

    def until(self, name: str, **wanted: Any) -> dict[str, Any]:
        """The data of the next event with this name and these fields."""
        for line in self._lines:
            event = line.decode().strip().removeprefix("event: ")
            data = json.loads(next(self._lines).decode().removeprefix("data: "))
            next(self._lines)
            if event == name and all(data[key] == value for key, value in wanted.items()):
                found: dict[str, Any] = data
                return found
        raise AssertionError(f"the stream ended before {name} {wanted}")

    def until_born(self, app: str, node: str) -> dict[str, Any]:
        while True:
            data = self.until("changes", node=node)
            for row in data["born"]:
                if row["app"] == app:
                    found: dict[str, Any] = row
                    return found


def test_changes_of_all_nodes_and_of_one_that_comes_back(cluster: LocalCluster) -> None:
    cluster.deploy("fresh")
    with cluster.api.stream("/v2/changes?scope=cluster", node=NODES[0]) as lines:
        events = Events(lines)
        first = [events.until("changes", first=True) for _ in NODES]
        assert {data["node"] for data in first} == set(NODES)
        cluster.wake("fresh", "osaka")
        born = events.until_born("default/fresh", NODES[1])
        assert (born["dc"], born["class"]) == ("osaka", "container")
        cluster.kill("agentd", NODES[1])
        events.until("silent", node=NODES[1])
        again = events.until("changes", node=NODES[1], first=True)
        assert born["pid"] in {row["pid"] for row in again["born"]}
    wait_for(lambda: cluster.answers(NODES[1]), "the agent")
    cluster.wait_whole()


def test_a_hub_that_restarts_in_the_middle(cluster: LocalCluster) -> None:
    """What cannot be asked is silent, this node's own rows are there all the time."""
    cluster.kill("hubd", NODES[0])
    answer = processes(cluster)
    said = {node["node"] for node in answer["nodes"]}
    assert NODES[0] in said
    assert said | set(answer["silent"]) == set(NODES)
    wait_for(lambda: processes(cluster)["silent"] == [], "all nodes")


@pytest.fixture(scope="module")
def broken(make_cluster: Factory) -> LocalCluster:
    """A cluster of which one node is dead."""
    cluster = make_cluster()
    os.kill(cluster.holder(NODES[2]), signal.SIGKILL)
    return cluster


def test_a_dead_node_is_named(broken: LocalCluster) -> None:
    for _ in range(2):
        answer = processes(broken)
        assert answer["silent"] == [NODES[2]]
        assert [node["node"] for node in answer["nodes"]] == NODES[:2]
    with broken.api.stream("/v2/changes?scope=cluster", node=NODES[0]) as lines:
        assert Events(lines).until("silent") == {"node": NODES[2]}
