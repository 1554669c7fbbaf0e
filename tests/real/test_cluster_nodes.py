"""Two nodes in one data center: either's gateway reaches every instance of both."""

from __future__ import annotations

import os
import signal

import pytest
from tests.real.conftest import Factory, LocalCluster, wait_for

pytestmark = pytest.mark.real

NODES = ("tokyo/tokyo-1", "tokyo/tokyo-2")


@pytest.fixture(scope="module")
def pair(make_cluster: Factory) -> LocalCluster:
    return make_cluster(["tokyo"], 2)


def other(node: str) -> str:
    return NODES[1 - NODES.index(node)]


def test_a_request_at_either_node_reaches_the_one_instance(pair: LocalCluster) -> None:
    pair.deploy("single", reactive={"max": 1})
    for node in NODES * 5:
        assert pair.get("single", node, "/GPL-3").status == 200
    assert len(pair.instances("single")) == 1
    assert pair.starts("single") == 1


def test_what_forwards_may_die_or_its_hub(pair: LocalCluster) -> None:
    pair.deploy("reached", reactive={"max": 1})
    home = pair.wake("reached", "tokyo")["node"]
    for part in ("agentd", "hubd"):
        for node in NODES:
            with pair.requests("reached", other(home)) as seen:
                pair.kill(part, node)
                wait_for(lambda node=node: pair.answers(node), "the agent's return")
                pair.wait_whole()
            assert seen.failures() == [], (part, node)
    assert pair.starts("reached") == 1


def test_apps_are_spread_over_both(pair: LocalCluster) -> None:
    pair.deploy("wide", reactive={"concurrency": 1, "min": 4})
    ready = wait_for(lambda: len(f := pair.instances("wide", "ready")) == 4 and f, "four of them")
    assert {instance["node"] for instance in ready} == set(NODES)


def test_a_start_that_a_killed_agent_forgot_is_made_good(pair: LocalCluster) -> None:
    for number in range(6):
        pair.deploy(f"forgotten-{number}")
    for number in range(6):
        pair.kill("agentd", NODES[number % 2])
        for node in NODES:
            assert pair.get(f"forgotten-{number}", node, "/GPL-3").status == 200
    pair.wait_whole()


def test_the_end_of_a_node_moves_what_it_ran(pair: LocalCluster) -> None:
    """The last test of this cluster: one of its nodes is gone then."""
    names = [f"moving-{number}" for number in range(4)]
    for name in names:
        pair.deploy(name, reactive={"max": 1})
        pair.wake(name, "tokyo")
    os.kill(pair.holder(NODES[1]), signal.SIGKILL)

    def served(name: str) -> bool:
        return pair.get(name, NODES[0], "/GPL-3").status == 200

    for name in names:
        wait_for(lambda name=name: served(name), f"{name} on the node that is left")
