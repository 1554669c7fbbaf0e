"""The control node, which holds the store: what its end costs, and what it must not."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.real.conftest import Factory, LocalCluster, wait_for

from tabane.errors import TabaneError

pytestmark = pytest.mark.real

CONTROL = "tokyo/tokyo-1"
OTHERS = ("osaka/osaka-1", "ishikari/ishikari-1")
DEPLOYS = 60


def test_every_acknowledged_deploy_survives_the_agent(cluster: LocalCluster) -> None:
    def deploy(number: int) -> str | None:
        name = f"app-{number}"
        try:
            cluster.deploy(name, node=OTHERS[number % 2])
        except TabaneError:
            return None
        return name

    with ThreadPoolExecutor(4) as threads:
        begun = [threads.submit(deploy, number) for number in range(DEPLOYS)]
        for share in (3, 2):
            enough = DEPLOYS // share
            wait_for(lambda enough=enough: sum(d.done() for d in begun) >= enough, "deploys")
            cluster.kill("agentd", CONTROL)
            wait_for(lambda: cluster.answers(CONTROL), "the agent's return")
        acknowledged = {name for d in begun if (name := d.result()) is not None}
    assert len(acknowledged) >= 5
    cluster.wait_whole()
    for node in (CONTROL, *OTHERS):
        wait_for(lambda node=node: acknowledged <= stored(cluster, node), f"all of them on {node}")


def stored(cluster: LocalCluster, node: str) -> set[str]:
    return {app["name"] for app in cluster.api.get("/api/v1/apps", node=node)["apps"]}


@pytest.fixture(scope="module")
def orphaned(make_cluster: Factory) -> Iterator[LocalCluster]:
    """A cluster whose control node is gone: its holder was killed, and with it all of the node."""
    cluster = make_cluster()
    for name in ("warm", "cold", "colder"):
        cluster.deploy(name)
    cluster.wake("warm", "osaka")
    with cluster.requests("warm", "osaka") as seen:
        os.kill(cluster.holder(CONTROL), signal.SIGKILL)
        wait_for(lambda: not cluster.answers(CONTROL), "its end")
    assert seen.failures() == []
    wait_for(lambda: linked(cluster) == set(OTHERS), "the others' way to each other")
    yield cluster


def linked(cluster: LocalCluster) -> set[str]:
    """The nodes that one of the others can reach, itself among them."""
    rows = cluster.api.get("/api/v1/members")["members"]
    return {row["node"] for row in rows if row["linked"]}


def test_the_others_go_on_serving_and_waking(orphaned: LocalCluster) -> None:
    assert orphaned.get("warm", "osaka", "/GPL-3").status == 200
    assert orphaned.get("cold", "osaka", "/GPL-3").status == 200
    assert orphaned.get("cold", "ishikari", "/GPL-3").status == 200


def test_also_after_the_end_of_their_own_agents(orphaned: LocalCluster) -> None:
    for node in OTHERS:
        orphaned.kill("agentd", node)
    for place in ("osaka", "ishikari"):
        assert orphaned.get("colder", place, "/GPL-3").status == 200
        assert orphaned.get("warm", place, "/GPL-3").status == 200


def test_a_deploy_says_who_is_missing(orphaned: LocalCluster) -> None:
    with pytest.raises(TabaneError) as caught:
        orphaned.deploy("late", node=OTHERS[0])
    assert caught.value.code == "unreachable"
    assert CONTROL in caught.value.message
    file = orphaned.root / "late.toml"
    file.write_text('name = "late"\nimage = "host"\ncommand = ["true"]\n')
    ended = orphaned.tabane("deploy", str(file))
    assert ended.code == 1
    assert CONTROL in ended.err
    assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize("command", ["ps", "apps"])
def test_questions_are_answered_and_the_silent_named(orphaned: LocalCluster, command: str) -> None:
    ended = orphaned.tabane(command)
    assert "warm" in ended.out
    assert CONTROL in ended.err
    assert ended.code == 1


def test_members_shows_which_node_is_gone(orphaned: LocalCluster) -> None:
    ended = orphaned.tabane("members")
    rows = {row["node"]: row for row in orphaned.api.get("/api/v1/members")["members"]}
    assert not rows[CONTROL]["linked"]
    assert all(rows[node]["linked"] for node in OTHERS)
    assert CONTROL.partition("/")[2] in ended.out
    assert (ended.code, ended.err) == (1, f"tabane: no answer from {CONTROL}\n")
