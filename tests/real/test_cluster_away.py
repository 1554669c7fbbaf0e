"""Instances that are put away with what they have in memory, and go on: on real engines, in a
cluster as people have it, with everything killed in between."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.real.conftest import Factory, LocalCluster, open_to_all, wait_for
from tests.real.test_cluster_saving import is_tried, wakes

pytestmark = pytest.mark.real

TALLY = """
import http.server, json, os, pathlib, uuid
me, count = str(uuid.uuid4()), 0

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        global count
        count += 1
        pathlib.Path("/tmp/count").write_text(str(count))
        told = {"me": me, "count": count, "host": os.uname().nodename}
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

http.server.ThreadingHTTPServer(("", 8000), Handler).serve_forever()
"""
CLASSES = {"crun": "container", "runsc": "sandbox"}
COMMAND = ["python3", "-c", TALLY]


@pytest.fixture(scope="module")
def cluster(make_cluster: Factory) -> LocalCluster:
    """Two nodes, which know by now what their engines can save."""
    cluster = make_cluster(["tokyo"], nodes=2)
    wait_for(lambda: is_tried(cluster), "the trial of checkpoints")
    return cluster


@pytest.fixture(scope="module")
def alone(make_cluster: Factory) -> LocalCluster:
    """One node: nothing can begin where there is no checkpoint of it yet."""
    cluster = make_cluster(["tokyo"])
    wait_for(lambda: is_tried(cluster), "the trial of checkpoints")
    return cluster


def deploy(cluster: LocalCluster, name: str, driver: str = "crun", **reactive: Any) -> None:
    limits = {"checkpoint_after": "1s", "stop_after": "1h", "max": 1, "start_timeout": "30s"}
    memory = {"memory": "96MiB"}
    sections = {"reactive": limits | reactive, "resources": memory}
    cluster.deploy(name, COMMAND, driver=driver, isolation=CLASSES[driver], **sections)


def ask(cluster: LocalCluster, name: str) -> dict[str, Any]:
    answer = cluster.get(name)
    assert answer.status == 200, answer
    told: dict[str, Any] = json.loads(answer.body)
    return told


def kept(cluster: LocalCluster, name: str) -> list[dict[str, Any]]:
    told = json.loads(cluster.tabane("checkpoint", "ls", "--json").out)["checkpoints"]
    return [one for one in told if f"default/{name}" in json.dumps(one)]


def rest(cluster: LocalCluster, name: str) -> dict[str, Any]:
    """Until it is put away; returns its checkpoint."""
    wait_for(lambda: not cluster.instances(name) and kept(cluster, name), f"{name} put away")
    (found,) = kept(cluster, name)
    return found


def test_it_goes_on_with_its_memory_and_files_under_its_name_once(cluster: LocalCluster) -> None:
    deploy(cluster, "tally", freeze_after="200ms")
    first = ask(cluster, "tally")
    for count in (2, 3):
        saved = rest(cluster, "tally")
        told_of = f"{saved['instance']} is put away on {saved['dc']}/{saved['node']}, idle for "
        assert told_of in cluster.tabane("why", "tally").out
        told = ask(cluster, "tally")
        assert told == first | {"count": count}
        assert kept(cluster, "tally") == []
    code, out = cluster.inside("tally", "cat", "/tmp/count")
    assert (code, out.strip()) == (0, "3")
    records = wakes(cluster, "tally", 3)
    assert [record["option"] for record in records] == ["cold", "resume", "resume"]
    assert len({record["instance"] for record in records}) == 1
    reasons = [event.get("reason", "") for event in cluster.records("events", "tally")]
    assert "put away, as idle for 1s" in reasons


def test_what_is_put_away_is_lost_with_its_checkpoint_and_all_hear_of_it(
    cluster: LocalCluster,
) -> None:
    deploy(cluster, "lost")
    first = ask(cluster, "lost")
    identity = rest(cluster, "lost")["instance"]
    assert cluster.tabane("checkpoint", "rm", identity).code == 0
    assert kept(cluster, "lost") == []
    assert f"{identity} is put away" not in cluster.tabane("why", "lost").out
    last = cluster.records("events", "lost")[-1]
    assert (last["instance"], last["state"]) == (identity, "absent")
    assert last["reason"] == "what it was put away as was removed by order"
    assert ask(cluster, "lost")["me"] != first["me"]


def test_a_sandbox_goes_on_too_and_others_begin_as_its_copies(alone: LocalCluster) -> None:
    deploy(alone, "caged", "runsc", checkpoint=True, checkpoint_after="2s", max=2, concurrency=1)
    first = ask(alone, "caged")
    wait_for(lambda: not alone.instances("caged") and len(kept(alone, "caged")) == 2, "two")
    with ThreadPoolExecutor(2) as threads:
        told = [*threads.map(lambda _: ask(alone, "caged"), range(2))]
    assert {one["me"] for one in told} == {first["me"]}
    options = {record["option"] for record in wakes(alone, "caged", 2)[1:]}
    assert options <= {"resume", "restore", "wait"} and "cold" not in options
    begun = [e for e in alone.records("events", "caged") if e["state"] == "starting"]
    assert begun[0]["instance"] in {each["instance"] for each in begun[1:]}


def test_cuts_of_power_lose_nothing_that_is_put_away_and_say_what_else_is_lost(
    tmp_path: Path,
) -> None:
    """In the middle of it, and as it goes on. Every phase of both is in
    `tests/node/test_putting_away.py`; nobody tells when CRIU has got where."""
    cluster = LocalCluster(open_to_all(tmp_path), ["tokyo"])
    try:
        wait_for(lambda: is_tried(cluster), "the trial of checkpoints")
        deploy(cluster, "cut")
        last = ask(cluster, "cut")
        last = cut_in(cluster, "checkpointing", 0.1, last)
        cut_in(cluster, "starting", 0.05, last)
    finally:
        cluster.close()


def cut_in(
    cluster: LocalCluster, phase: str, after_s: float, last: dict[str, Any]
) -> dict[str, Any]:
    """Cut it then; returns what it answers afterwards."""
    seen = count_events(cluster, phase)
    with ThreadPoolExecutor(1) as threads:
        if phase == "starting":
            rest(cluster, "cut")
            waiting = threads.submit(cluster.get, "cut")
        wait_for(lambda: count_events(cluster, phase) > seen, phase)
        time.sleep(after_s)
        cut_power(cluster)
        if phase == "starting":
            waiting.exception()
    told = [event for event in cluster.records("events", "cut") if event["state"] == "absent"]
    now = ask(cluster, "cut")
    if "put away" in told[-1]["reason"]:
        assert (now["me"], now["count"]) == (last["me"], last["count"] + 1)
    elif now["me"] == last["me"]:
        assert now["count"] > last["count"]
    else:
        assert told[-1]["reason"] == "its node ended"
    assert len(cluster.instances("cut")) == 1
    return now


def cut_power(cluster: LocalCluster) -> None:
    """Every node ends at once, with all that runs on it; then all are there again."""
    for node in cluster.addresses:
        os.kill(cluster.holder(node), signal.SIGKILL)
    assert cluster.tabane("up", "-d").code == 0
    cluster.wait_whole()
    wait_for(lambda: is_tried(cluster), "the trial of checkpoints")


def count_events(cluster: LocalCluster, state: str, name: str = "cut") -> int:
    return sum(event["state"] == state for event in cluster.records("events", name))


def test_an_agent_that_is_killed_in_the_middle_loses_nothing(cluster: LocalCluster) -> None:
    deploy(cluster, "shaken")
    first = ask(cluster, "shaken")
    node = cluster.instances("shaken")[0]["node"]
    wait_for(lambda: count_events(cluster, "checkpointing", "shaken"), "its dump")
    cluster.kill("agentd", node)
    assert ask(cluster, "shaken") == first | {"count": 2}
    cluster.wait_whole()
    assert len(cluster.instances("shaken")) == 1
