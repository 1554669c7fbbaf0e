"""Instances that hang: found by their checks, ended, and replaced."""

from __future__ import annotations

from typing import Any

import pytest
from tests.real.conftest import LocalCluster, wait_for

pytestmark = pytest.mark.real

HANGS_ON_DEMAND = """
import os, signal, socket, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

lock = threading.Lock()

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.path == "/lock":
            lock.acquire()
        with lock:
            pass
        self.send_response(200)
        self.send_header("Content-Length", "3")
        self.end_headers()
        self.wfile.write(b"ok\\n")

ThreadingHTTPServer(("", 8000), Handler).serve_forever()
"""
QUICK = {"interval": "2s", "timeout": "2s", "failures": 1}
PYTHON = ["python3", "-c", HANGS_ON_DEMAND]


@pytest.fixture(scope="module")
def cluster(borrowed: LocalCluster) -> LocalCluster:
    return borrowed


def end_of(cluster: LocalCluster, app: str, instance: dict[str, Any]) -> str:
    """Why an instance ended, as `tabane events` tells, once it has."""

    def look() -> str:
        told = [e for e in cluster.records("events", app) if e["instance"] == instance["id"]]
        return next((e["reason"] for e in told if e["state"] == "absent"), "")

    return wait_for(look, f"the end of {instance['id']}")


@pytest.mark.parametrize(("isolation", "path"), [("container", "/stop"), ("sandbox", "/lock")])
def test_one_that_hangs_is_replaced(cluster: LocalCluster, isolation: str, path: str) -> None:
    name = f"hangs-in-a-{isolation}"
    cluster.deploy(
        name,
        PYTHON,
        isolation=isolation,
        resources={"memory": "128MiB"},
        reactive={"stop_timeout": "500ms", "start_timeout": "30s", "response_timeout": "30s"},
        health=QUICK | {"http": "/healthz"},
    )
    first = cluster.wake(name)
    cluster.get(name, path=path)  # it gets none, or that of the next one
    assert "unhealthy: GET /healthz is not answered within 2 s" in end_of(cluster, name, first)
    assert cluster.get(name, path="/").status == 200
    assert first["id"] not in {one["id"] for one in cluster.instances(name)}


def test_a_command_inside_tells_and_min_is_kept(cluster: LocalCluster) -> None:
    cluster.deploy(
        "worker",
        ["sh", "-c", "touch /tmp/well; exec sleep 1000"],
        port=None,
        reactive={"min": 1, "ready": "health", "stop_timeout": "100ms"},
        health={
            "interval": "5s",
            "timeout": "5s",
            "failures": 1,
            "command": ["test", "-e", "/tmp/well"],
        },
    )
    (first,) = wait_for(lambda: cluster.instances("worker", "ready"), "the worker")
    assert cluster.inside("worker", "rm", "/tmp/well") == (0, "")
    assert "unhealthy: `test -e /tmp/well` fails: test ended with 1" in end_of(
        cluster, "worker", first
    )

    def replaced() -> bool:
        return bool({one["id"] for one in cluster.instances("worker", "ready")} - {first["id"]})

    wait_for(replaced, "the next worker")


def test_one_that_never_is_well_is_started_less_and_less_often(cluster: LocalCluster) -> None:
    cluster.deploy(
        "poorly",
        ["busybox", "httpd", "-f", "-p", "8000", "-h", "/tmp"],
        reactive={"min": 1, "stop_timeout": "100ms"},
        health=QUICK | {"http": "/none"},
    )
    shown = wait_for(
        lambda: (
            "ended right after its start" in (out := cluster.tabane("show", "poorly").out) and out
        )
    )
    assert "unhealthy: GET /none is answered 404" in shown
    assert cluster.tabane("rm", "poorly").code == 0


def test_a_check_is_no_session_and_keeps_nothing_awake(cluster: LocalCluster) -> None:
    cluster.deploy(
        "idle",
        reactive={"stop_after": "3s"},
        health=QUICK | {"http": "/GPL-3"},
    )
    first = cluster.wake("idle")
    assert "idle for 3 s" in end_of(cluster, "idle", first)
    assert cluster.starts("idle") == 1
