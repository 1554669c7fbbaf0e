"""A request starts a program in the nearest data center, and idleness ends it."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.real.conftest import HTTPD, Factory, LocalCluster, wait_for

from tabane.model import PHASES

pytestmark = pytest.mark.real

SESSIONS = 200
IDLE_ROUNDS = 150
IDLE_S = 0.05


@pytest.fixture(scope="module")
def cluster(make_cluster: Factory) -> LocalCluster:
    return make_cluster(["tokyo", "osaka"])


def test_the_first_request_starts_it_and_the_next_find_it(cluster: LocalCluster) -> None:
    cluster.deploy("hello")
    assert cluster.instances("hello") == []
    instance = cluster.wake("hello")
    assert (instance["node"], instance["state"]) == ("tokyo/tokyo-1", "ready")
    answers = [cluster.get("hello", path="/GPL-3") for _ in range(20)]
    assert {answer.status for answer in answers} == {200}
    assert all("GNU GENERAL PUBLIC LICENSE" in answer.body for answer in answers)
    assert cluster.instances("hello") == [instance]
    assert cluster.starts("hello") == 1


def test_another_data_center_wakes_its_own(cluster: LocalCluster) -> None:
    cluster.deploy("two-places")
    cluster.wake("two-places", "tokyo")
    cluster.wake("two-places", "osaka")
    nodes = {instance["node"] for instance in cluster.instances("two-places")}
    assert nodes == {"tokyo/tokyo-1", "osaka/osaka-1"}


def test_ps_shows_where_each_process_runs_and_what_it_belongs_to(cluster: LocalCluster) -> None:
    cluster.deploy("listed")
    cluster.wake("listed", "osaka")
    ended = cluster.tabane("ps", "--app", "listed")
    head, *rows = (line.split() for line in ended.out.splitlines())
    assert (ended.code, ended.err) == (0, "")
    columns = [head.index(name) for name in ("DC", "NODE", "APP", "CLASS")]
    found = {tuple(row[n] for n in columns) for row in rows}
    assert found == {("osaka", "osaka-1", "listed", "container")}
    assert any("httpd" in row for row in rows)


def test_the_phases_of_a_wake_add_up(cluster: LocalCluster) -> None:
    cluster.deploy("measured")
    instance = cluster.wake("measured")
    (record,) = wait_for(lambda: cluster.records("wakes", "measured"), "the wake record")
    assert record["option"] == "cold"
    assert record["instance"] == instance["id"]
    assert record["gateway"] == "tokyo/tokyo-1/gateway-0"
    phases = record["phases_us"]
    assert set(phases) == set(PHASES)
    assert min(phases.values()) >= 0
    assert abs(sum(phases.values()) - record["total_us"]) <= len(PHASES)
    shown = cluster.tabane("wakes", "measured")
    assert [line.split()[3] for line in shown.out.splitlines()[1:]] == ["measured"]


def test_what_ended_is_remembered(cluster: LocalCluster) -> None:
    command = ["sh", "-c", "echo up and running; echo twice >&2; exec " + " ".join(HTTPD)]
    cluster.deploy("past", command, reactive={"stop_after": "200ms"})
    answer = cluster.get("past", path="/GPL-3")
    assert answer.status == 200
    events = wait_for(lambda: _until_absent(cluster.records("events", "past")), "the last event")
    assert [event["state"] for event in events] == ["starting", "ready", "stopping", "absent"]
    assert "idle" in events[-1]["reason"]
    assert [wake["instance"] for wake in cluster.records("wakes", "past")] == [
        events[0]["instance"]
    ]
    for what in ("past", events[0]["instance"]):
        logs = cluster.tabane("logs", what)
        assert (logs.code, logs.out, logs.err) == (0, "up and running\n", "twice\n")


def _until_absent(events: list[dict[str, str]]) -> list[dict[str, str]] | None:
    return events if events and events[-1]["state"] == "absent" else None


def test_many_sessions_at_once_wake_no_more_than_max(cluster: LocalCluster) -> None:
    cluster.deploy("crowd", reactive={"concurrency": 10, "max": 20})
    with ThreadPoolExecutor(SESSIONS) as threads:
        answers = list(threads.map(lambda _: cluster.get("crowd", path="/GPL-3"), range(SESSIONS)))
    assert [answer.status for answer in answers] == [200] * SESSIONS
    assert 1 <= cluster.starts("crowd") <= 20


def test_a_request_that_meets_an_idle_stop_is_not_lost(cluster: LocalCluster) -> None:
    cluster.deploy("naps", reactive={"stop_after": f"{IDLE_S * 1000:g}ms"})
    chance = random.Random(1)
    for _ in range(IDLE_ROUNDS):
        assert cluster.get("naps", path="/GPL-3").status == 200
        time.sleep(IDLE_S * chance.uniform(0.8, 1.2))
    assert cluster.starts("naps") > 1


def test_a_data_center_that_may_not_run_it_forwards(cluster: LocalCluster) -> None:
    cluster.deploy("only-tokyo", placement={"datacenters": ["tokyo"]})
    assert cluster.get("only-tokyo", "osaka", "/GPL-3").status == 200
    assert [i["node"] for i in cluster.instances("only-tokyo")] == ["tokyo/tokyo-1"]
