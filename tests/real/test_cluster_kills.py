"""kill -9 of Tabane's own processes while requests flow: instances never notice."""

from __future__ import annotations

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.real.conftest import DATACENTERS, HTTPD, LocalCluster, find_cgroups, wait_for

pytestmark = pytest.mark.real

TOKYO, OSAKA, ISHIKARI = "tokyo/tokyo-1", "osaka/osaka-1", "ishikari/ishikari-1"
COUNTING = "n=0; while :; do echo line $n; n=$((n+1)); sleep 0.002; done"


def machine_pid(cluster: LocalCluster, instance: dict[str, object]) -> int:
    """The pid of an instance's first process as this machine sees it."""
    procs = [
        pid
        for place in find_cgroups(str(instance["id"]))
        for pid in map(int, (place / "cgroup.procs").read_text().split())
    ]
    assert procs, f"no process of {instance['id']} is in its cgroup"
    return min(procs)


@pytest.mark.parametrize("part", ["agentd", "hubd"])
def test_no_request_notices_the_end_of(cluster: LocalCluster, part: str) -> None:
    name = f"warm-{part}"
    cluster.deploy(name)
    before = cluster.wake(name)
    with cluster.requests(name) as seen:
        killed = cluster.kill(part)
        wait_for(lambda: cluster.answers(TOKYO), "the agent's return")
        cluster.wait_whole()
    assert seen.failures() == []
    assert cluster.part(part) != killed
    assert cluster.instances(name) == [before]
    assert cluster.starts(name) == 1


@pytest.mark.parametrize("part", ["agentd", "hubd", "gatewayd"])
def test_cold_requests_wait_until_it_is_back(cluster: LocalCluster, part: str) -> None:
    names = [f"cold-{part}-{number}" for number in range(4)]
    for name in names:
        cluster.deploy(name)
    with ThreadPoolExecutor(len(names)) as threads:
        cluster.kill(part)
        answers = list(threads.map(lambda name: cluster.get(name, path="/GPL-3"), names))
    assert [answer.status for answer in answers] == [200] * len(names)
    cluster.wait_whole()


@pytest.mark.parametrize("part", ["agent", "hub", "gateway"])
def test_its_end_is_an_event(cluster: LocalCluster, part: str) -> None:
    words = f"tokyo tokyo-1 tabane-{part}(-0)? failed: killed by SIGKILL; it is started again after"

    def told() -> int:
        return len(re.findall(words, cluster.tabane("events", "-n", "2000").out))

    before = told()
    cluster.kill(f"{part}d")
    cluster.wait_whole()
    wait_for(lambda: told() == before + 1, "the event")


def test_what_is_deployed_while_a_hub_starts_is_stored_and_no_failure(
    cluster: LocalCluster,
) -> None:
    cluster.kill("hubd")
    wait_for(lambda: cluster.has_part("hubd"), "the new hub")
    hub = cluster.part("hubd")
    os.kill(hub, signal.SIGSTOP)
    try:
        assert cluster.api.get("/api/v1/node", node=TOKYO)["whole"] is False
        deployed = cluster.deploy("unheard")
        assert (deployed["known"], deployed["unreachable"]) == ([], sorted(DATACENTERS))
        shown = cluster.api.get("/api/v1/apps/default/unheard")
        assert shown["app"]["revision"] == deployed["revision"]
        assert shown["silent"] == sorted([OSAKA, ISHIKARI])
    finally:
        os.kill(hub, signal.SIGCONT)
    cluster.wait_whole()
    assert cluster.deploy("heard")["known"] == list(DATACENTERS)
    for name in ("unheard", "heard"):
        assert cluster.get(name, path="/GPL-3").status == 200


def test_who_asks_a_node_whose_agent_hangs_is_told_and_goes_on(cluster: LocalCluster) -> None:
    """It is the first of all, holds the store, and would do what it was sent when it is back."""
    cluster.deploy("still")
    agent = cluster.part("agentd")
    os.kill(agent, signal.SIGSTOP)
    try:
        silence = f"tabane: no answer from {TOKYO}\n"
        wait_for(lambda: cluster.tabane("members").err == silence, "that its silence is noticed")
        assert cluster.tabane("members").code == 1
        ended = cluster.tabane("rm", "still")
        assert (ended.code, ended.out) == (1, "")
        assert f"nothing was done, {TOKYO} cannot be told now" in ended.err
        shown = cluster.tabane("shell", "-c", "cat /proc/tabane/nodes")
        assert f"{TOKYO} - 0 no\n" in shown.out
    finally:
        os.kill(agent, signal.SIGCONT)
    cluster.wait_whole()
    assert cluster.get("still", path="/GPL-3").status == 200


def test_a_killed_gateway_loses_at_most_what_it_was_answering(cluster: LocalCluster) -> None:
    cluster.deploy("passing")
    before = cluster.wake("passing")
    threads = 3
    with cluster.requests("passing", threads=threads) as seen:
        cluster.kill("gatewayd")
    assert len(seen.failures()) <= threads
    assert [answer for answer in seen.answers if answer.status != 200] == []
    cluster.wait_whole()
    assert cluster.get("passing", path="/GPL-3").status == 200
    assert cluster.instances("passing") == [before]


def test_the_end_of_one_gateway_is_not_noticed_elsewhere(cluster: LocalCluster) -> None:
    cluster.deploy("elsewhere")
    cluster.wake("elsewhere", "osaka")
    with cluster.requests("elsewhere", "osaka") as seen:
        cluster.kill("gatewayd")
    assert seen.failures() == []
    cluster.wait_whole()


def test_an_instance_lives_on_and_the_next_agent_stops_it(cluster: LocalCluster) -> None:
    """Idleness that falls into the agent's absence is seen by the next."""
    cluster.deploy("adopted", reactive={"stop_after": "300ms"})
    before = cluster.wake("adopted")
    pid = machine_pid(cluster, before)
    cluster.kill("agentd")
    assert Path(f"/proc/{pid}").exists()
    wait_for(lambda: cluster.answers(TOKYO), "the agent's return")
    wait_for(lambda: not cluster.instances("adopted"), "the idle stop")
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "its end")
    events = wait_for(lambda: cluster.records("events", "adopted"), "its events")
    assert {event["instance"] for event in events} == {before["id"]}
    assert events[-1]["state"] == "absent"


def test_no_line_of_a_log_is_lost(cluster: LocalCluster) -> None:
    cluster.deploy("talks", ["sh", "-c", f"({COUNTING}) & exec {' '.join(HTTPD)}"])
    before = cluster.wake("talks")
    for _ in range(2):
        cluster.kill("agentd")
        wait_for(lambda: cluster.answers(TOKYO), "the agent's return")
    count = len(cluster.tabane("logs", "talks").out.splitlines())
    wait_for(lambda: len(cluster.tabane("logs", "talks").out.splitlines()) > count, "more lines")
    assert cluster.instances("talks") == [before]
    lines = cluster.tabane("logs", "talks").out.splitlines()
    assert lines == [f"line {number}" for number in range(len(lines))]


def test_an_exit_while_the_agent_is_away_is_known_to_the_next(cluster: LocalCluster) -> None:
    cluster.deploy("leaves", ["sh", "-c", f"({' '.join(HTTPD)}) & sleep 1; exit 7"])
    before = cluster.wake("leaves")
    cluster.kill("agentd")
    wait_for(lambda: not cluster.instances("leaves"), "its end")
    reasons = [
        event["reason"]
        for event in cluster.records("events", "leaves")
        if event["instance"] == before["id"] and event.get("reason")
    ]
    assert any("exited with code 7" in reason for reason in reasons), reasons
