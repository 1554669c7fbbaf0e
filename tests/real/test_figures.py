"""Placement knows what k2i knows of the nodes."""

from __future__ import annotations

import re

import pytest
from tests.real.conftest import Factory, LocalCluster, wait_for

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def nodes(make_cluster: Factory) -> LocalCluster:
    return make_cluster(["tokyo"], 2)


def test_an_app_that_no_node_has_the_memory_for_is_started_nowhere(nodes: LocalCluster) -> None:
    nodes.deploy("whale", resources={"memory": "900TiB"})
    answer = nodes.get("whale")
    assert answer.status == 503

    def reasons() -> list[str]:
        homes = nodes.api.get("/api/v1/apps/default/whale")["homes"]
        found = [reason for home in homes for reason in home["placement"]]
        return found if len(found) == 2 else []

    told = wait_for(reasons, "a reason of each node")
    needed = "943718656 are needed for memory and disk"
    pattern = rf"tokyo/tokyo-\d: has (\d+) MiB of memory available, {needed}"
    figures = [re.fullmatch(pattern, reason) for reason in told]
    host = nodes.api.get("/v2/host", node="tokyo/tokyo-1")["host"][0]
    for figure in figures:
        assert figure is not None, told
        assert 0 < int(figure[1]) <= host["memory"]["total_kib"] >> 10
    nodes.tabane("rm", "whale")


def test_one_that_fits_is_started(nodes: LocalCluster) -> None:
    nodes.deploy("shrimp")
    assert nodes.wake("shrimp")["state"] == "ready"
