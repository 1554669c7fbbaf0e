"""Timers of a cluster: moments reach their apps, wake them, and each once."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.real.conftest import Factory, LocalCluster, wait_for

from tabane.clock import SYSTEM

pytestmark = pytest.mark.real

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


def deploy(cluster: LocalCluster, name: str, trigger: str, **sections: object) -> None:
    """With one `[[triggers]]` more than `LocalCluster.deploy` can say."""
    text = f'''name = "{name}"
image = "host"
port = 8000
command = ["python3", "-c", {json.dumps(SAYS_WHAT_IT_GETS)}]
resources.memory = "128MiB"
{sections.get("more", "")}
[[triggers]]
{trigger}
'''
    cluster.api.post("/api/v1/apps", {"text": text, "file": "a.toml", "image": "host"})


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


def test_a_moment_is_carried_out_where_the_app_may_run(cluster: LocalCluster) -> None:
    """In another data center than the control node's."""
    deploy(cluster, "minutely", 'cron = "* * * * *"', more='placement.datacenters = ["osaka"]')

    def row() -> dict[str, Any]:
        rows: list[dict[str, Any]] = cluster.api.get("/api/v1/triggers")["triggers"]
        return next(row for row in rows if row["app"] == "default/minutely")

    due = row()["next"]
    wait_for(lambda: SYSTEM.wall() >= due - 1.0, "the moment")
    wait_for(lambda: row()["last"] == due and row()["outcome"] == "answered 201", "its answer")
    (instance,) = cluster.instances("minutely")
    assert instance["node"].startswith("osaka/")
    moment = datetime.fromtimestamp(due, UTC).isoformat(timespec="seconds")
    assert cluster.tabane("logs", "minutely").out == f"got / cron {moment} \n"
