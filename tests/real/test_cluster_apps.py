"""Revisions, ages, removal, scale, and programs without a port, while requests flow."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.real.conftest import LocalCluster, saying, wait_for

from tabane.gateway.setbacks import BACKOFF_FIRST_S

pytestmark = pytest.mark.real

SLOW = r"""
mkdir /tmp/cgi-bin
cat >/tmp/cgi-bin/slow <<END
#!/bin/sh
touch /tmp/began
until test -e /tmp/go; do sleep 0.05; done
printf 'Content-Type: text/plain\r\n\r\nfinished\n'
END
chmod +x /tmp/cgi-bin/slow
echo here >/tmp/index.html
exec busybox httpd -f -p 8000 -h /tmp
"""


@pytest.fixture(scope="module")
def cluster(borrowed: LocalCluster) -> LocalCluster:
    return borrowed


def test_a_new_revision_takes_over_without_a_failed_request(cluster: LocalCluster) -> None:
    cluster.deploy("rolling", saying("one"))
    old = cluster.wake("rolling", path="/")
    with cluster.requests("rolling", path="/") as seen:
        cluster.deploy("rolling", saying("two"))
        wait_for(lambda: seen.answers[-1].body == "two\n", "the new revision")
        wait_for(lambda: old["id"] not in ids(cluster, "rolling"), "the old one's end")
    assert seen.failures() == []
    assert {answer.body for answer in seen.answers} == {"one\n", "two\n"}
    assert cluster.get("rolling").body == "two\n"
    assert [i["revision"] for i in cluster.instances("rolling")] == [old["revision"] + 1]


def test_an_app_that_is_deployed_after_its_removal_is_another(cluster: LocalCluster) -> None:
    """Of one command, though of the same name and image."""
    for word in ("one", "two"):
        cluster.deploy("phoenix", saying(word))
        assert cluster.get("phoenix").body == f"{word}\n"
        cluster.api.delete("/api/v1/apps/default/phoenix")


def test_a_revision_that_does_not_start_leaves_the_old_one_serving(cluster: LocalCluster) -> None:
    cluster.deploy("careful", saying("good"))
    old = cluster.wake("careful", path="/")
    with cluster.requests("careful", path="/") as seen:
        cluster.deploy("careful", ["sh", "-c", "echo bad >&2; exit 9"])
        wait_for(lambda: "exited with code 9" in cluster.tabane("show", "careful").out)
    assert seen.failures() == []
    assert {answer.body for answer in seen.answers} == {"good\n"}
    assert old["id"] in ids(cluster, "careful")
    cluster.deploy("careful", saying("better"))
    wait_for(lambda: cluster.get("careful").body == "better\n", "the mended revision")


def test_an_instance_that_is_too_old_is_replaced_while_busy(cluster: LocalCluster) -> None:
    cluster.deploy("ages", reactive={"max_age": "1s"})
    first = cluster.wake("ages")
    with cluster.requests("ages") as seen:
        wait_for(lambda: cluster.starts("ages") >= 3, "two replacements")
    assert seen.failures() == []
    assert first["id"] not in ids(cluster, "ages")


def test_rm_lets_those_inside_finish(cluster: LocalCluster) -> None:
    cluster.deploy("removed", ["sh", "-c", SLOW])
    before = cluster.wake("removed", path="/")
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(cluster.get, "removed", path="/cgi-bin/slow")
        wait_for(lambda: cluster.inside("removed", "test", "-e", "/tmp/began")[0] == 0, "its begin")
        assert cluster.tabane("rm", "removed").code == 0
        assert cluster.get("removed").status == 404
        assert [i["id"] for i in cluster.instances("removed")] == [before["id"]]
        assert cluster.inside("removed", "touch", "/tmp/go") == (0, "")
        assert "finished" in answer.result().body
    wait_for(lambda: not cluster.instances("removed"), "its end")


def test_min_is_spread_over_the_data_centers(cluster: LocalCluster) -> None:
    cluster.deploy("spread")
    awake = cluster.wake("spread", "tokyo")
    ended = cluster.tabane("scale", "spread", "--min", "2")
    assert (ended.code, ended.err) == (0, "")
    ready = wait_for(
        lambda: len(found := cluster.instances("spread", "ready")) == 2 and found, "two instances"
    )
    assert len({instance["node"] for instance in ready}) == 2
    assert awake["id"] in {instance["id"] for instance in ready}, "it counts"
    assert cluster.starts("spread") == 2
    assert cluster.tabane("scale", "spread", "--min", "0").code == 0
    assert cluster.tabane("rm", "spread").code == 0
    wait_for(lambda: not cluster.instances("spread"), "their end")


def test_a_program_without_a_port_runs_and_is_restarted(cluster: LocalCluster) -> None:
    cluster.deploy(
        "worker",
        ["sh", "-c", "echo at work; until test -e /tmp/end; do sleep 0.05; done; exit 4"],
        port=None,
        reactive={"min": 1, "ready": "started"},
    )
    (first,) = wait_for(lambda: cluster.instances("worker", "ready"), "the worker")
    assert cluster.tabane("logs", "worker").out == "at work\n"
    assert cluster.inside("worker", "touch", "/tmp/end") == (0, "")

    def replaced() -> bool:
        return bool(ids(cluster, "worker", "ready") - {first["id"]})

    wait_for(replaced, "the next worker")
    reasons = [event.get("reason", "") for event in cluster.records("events", "worker")]
    assert "the program exited with code 4" in " ".join(reasons)


def test_a_program_that_keeps_dying_is_started_less_and_less_often(cluster: LocalCluster) -> None:
    cluster.deploy(
        "doomed",
        ["sh", "-c", "exit 5"],
        port=None,
        reactive={"min": 1, "ready": "started"},
    )
    wait_for(lambda: cluster.starts("doomed") >= 4, "some starts")
    at = [e["at"] for e in cluster.records("events", "doomed") if e["state"] == "starting"]
    pauses = [later - earlier for earlier, later in itertools.pairwise(at)]
    assert all(
        pause >= BACKOFF_FIRST_S * 2 ** (failures - 1)
        for failures, pause in enumerate(pauses[1:], 2)
    )


def ids(cluster: LocalCluster, name: str, state: str = "") -> set[str]:
    return {instance["id"] for instance in cluster.instances(name, state)}
