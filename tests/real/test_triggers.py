"""Timers of a cluster: moments reach their apps, wake them, and each once."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest
import uvloop
from tests.real.conftest import Factory, LocalCluster, wait_for

from tabane.clock import SYSTEM
from tabane.middlecon.blocking import connect

pytestmark = pytest.mark.real

uvloop.new_event_loop().close()
"""The first loop of a process opens descriptors for good: so before any test."""

SAYS_WHAT_IT_GETS = """
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        trigger, moment = self.headers["X-Tabane-Trigger"], self.headers["X-Tabane-Moment"]
        print("got", self.path, trigger, moment, body, flush=True)
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()

HTTPServer(("", 8000), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def cluster(make_cluster: Factory) -> LocalCluster:
    return make_cluster(["tokyo", "osaka"])


def deploy(
    cluster: LocalCluster, name: str, trigger: str, more: str = "", program: str = SAYS_WHAT_IT_GETS
) -> None:
    """With one `[[triggers]]`, which `LocalCluster.deploy` cannot say."""
    text = f'''name = "{name}"
image = "host"
port = 8000
command = ["python3", "-c", {json.dumps(program)}]
resources.memory = "128MiB"
{more}
[[triggers]]
{trigger}
'''
    cluster.api.post("/api/v1/apps", {"text": text, "file": "a.toml", "image": "host"})


def minutely(cluster: LocalCluster) -> dict[str, Any]:
    rows: list[dict[str, Any]] = cluster.api.get("/api/v1/triggers")["triggers"]
    return next(row for row in rows if row["app"] == "default/minutely")


@pytest.fixture(scope="module", autouse=True)
def due(cluster: LocalCluster) -> float:
    """The first moment of an app that is deployed before all tests: the last waits for it."""
    deploy(cluster, "minutely", 'cron = "* * * * *"', more='placement.datacenters = ["osaka"]')
    return float(minutely(cluster)["next"])


def test_a_trigger_that_is_tried_out_wakes_its_app(cluster: LocalCluster) -> None:
    deploy(cluster, "nightly", 'cron = "0 3 * * *"\npath = "/clean"\nbody = "all of it"')
    assert cluster.instances("nightly") == []
    fired = cluster.tabane("trigger", "fire", "nightly", "cron")
    assert (fired.code, fired.out, fired.err) == (0, "nightly cron: answered 201\n", "")
    said = wait_for(lambda: cluster.tabane("logs", "nightly").out)
    assert said.startswith("got /clean cron 20") and said.endswith("+00:00 all of it\n")
    assert len(cluster.records("wakes", "nightly")) == 1
    listed = cluster.tabane("trigger", "ls")
    assert "nightly" in listed.out and "POST /clean" in listed.out
    refused = cluster.tabane("trigger", "fire", "nightly", "daily")
    assert refused.code != 0 and "has no trigger 'daily' (cron)" in refused.err


def hub_of(cluster: LocalCluster, node: str) -> str:
    return f"unix://{cluster.root / 'nodes' / node / 'hub.sock'}"


@pytest.mark.parametrize("node", ["tokyo/tokyo-1", "osaka/osaka-1"])
def test_a_message_in_a_room_wakes_an_app_from_any_data_center(
    cluster: LocalCluster, node: str
) -> None:
    name = f"by-{node.partition('/')[0]}"
    deploy(cluster, name, f'name = "order"\nroom = "{name}"\npath = "/orders"')
    with connect(hub_of(cluster, node), name="customer") as me:
        room = me.join(name, member=False)
        (member,) = wait_for(lambda: tuple(room.members), "who listens for it")
        assert cluster.instances(name) == []
        receipt = room.say(b"two coffees", timeout_s=30)
        assert (receipt.acknowledged, receipt.complete) == ((member,), True)
        assert "got /orders order None two coffees\n" in cluster.tabane("logs", name).out
        assert len(cluster.records("wakes", name)) == 1


def test_messages_at_once_start_as_many_as_they_need(cluster: LocalCluster) -> None:
    """As many as `max` says; each sender's come in their order."""
    deploy(
        cluster,
        "slow",
        'room = "slow"',
        "reactive.concurrency = 1\nreactive.max = 2\nreactive.start_timeout = '30s'",
        SAYS_WHAT_IT_GETS.replace("print(", "__import__('time').sleep(1); print("),
    )

    def order(sender: str) -> list[bool]:
        with connect(hub_of(cluster, "tokyo/tokyo-1"), name=sender) as me:
            room = me.join("slow", member=False)
            wait_for(lambda: room.members, "who listens for it")
            words = [f"{sender} {number}".encode() for number in range(2)]
            return [room.say(word, timeout_s=60).complete for word in words]

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(order, ("ann", "ben", "eve"))) == [[True, True]] * 3
    assert cluster.starts("slow") == 2
    said = [line.split()[-2:] for line in cluster.tabane("logs", "slow").out.splitlines()]
    assert sorted(map(tuple, said)) == [(who, n) for who in ("ann", "ben", "eve") for n in "01"]


def test_a_message_that_an_app_does_not_take_has_failed(cluster: LocalCluster) -> None:
    deploy(cluster, "grumpy", 'room = "grumpy"\nmethod = "PUT"')
    with connect(hub_of(cluster, "tokyo/tokyo-1"), name="customer") as me:
        room = me.join("grumpy", member=False)
        (member,) = wait_for(lambda: tuple(room.members), "who listens for it")
        failed = room.say(b"now", timeout_s=30).failed
        assert "answered 501" in str(failed[member])


def test_a_room_has_its_listener_again_after_kill_9(cluster: LocalCluster) -> None:
    deploy(cluster, "kept", 'room = "kept"')
    with connect(hub_of(cluster, "tokyo/tokyo-1"), name="customer") as me:
        room = me.join("kept", member=False)
        (member,) = wait_for(lambda: tuple(room.members), "who listens for it")
        cluster.kill("agentd", member.partition("@")[2])
        wait_for(lambda: room.say(b"hello", timeout_s=30).acknowledged == (member,))
        assert "got / room None hello" in cluster.tabane("logs", "kept").out


def test_moments_are_carried_out_where_the_app_may_run(cluster: LocalCluster, due: float) -> None:
    """In another data center than the control node's, each once."""

    def answered() -> bool:
        row = minutely(cluster)
        return (row["last"] or 0) >= due and row["outcome"] == "answered 201"

    wait_for(lambda: SYSTEM.wall() >= due - 1.0, "the moment")
    wait_for(answered, "its answer")
    (instance,) = cluster.instances("minutely")
    assert instance["node"].startswith("osaka/")
    lines = cluster.tabane("logs", "minutely").out.splitlines()
    moments = [datetime.fromisoformat(line.split()[3]) for line in lines]
    assert lines == [f"got / cron {moment.isoformat(timespec='seconds')} " for moment in moments]
    assert moments[0] == datetime.fromtimestamp(due, UTC)
    assert all(earlier < later for earlier, later in pairwise(moments))
