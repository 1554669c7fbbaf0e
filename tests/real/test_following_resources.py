"""An instance's processors rise and fall with its sessions."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.real.conftest import Factory, LocalCluster, wait_for

from tabane.runtimes.cgroups import Cgroup

pytestmark = pytest.mark.real

WAITS = """
import os, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        while self.path == "/wait" and not os.path.exists("/tmp/go"):
            time.sleep(0.02)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

ThreadingHTTPServer(("", 8000), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def cluster(make_cluster: Factory) -> LocalCluster:
    return make_cluster(["tokyo"])


def cpus(instance: dict[str, Any]) -> float:
    """As the kernel has it."""
    return Cgroup(instance["cgroup"]).limits()["cpu"]


@pytest.mark.parametrize("isolation", ["container", "sandbox"])
def test_they_rise_and_fall_with_its_sessions(cluster: LocalCluster, isolation: str) -> None:
    name = f"follows-in-a-{isolation}"
    cluster.deploy(
        name,
        ["python3", "-c", WAITS],
        isolation=isolation,
        resources={"cpu": 1.0, "cpu_min": 0.2, "memory": "128MiB", "memory_min": "64MiB"},
        reactive={"concurrency": 4, "start_timeout": "30s"},
    )
    instance = cluster.wake(name, path="/")
    wait_for(lambda: cpus(instance) == 0.2, "the least")
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(cluster.get, name, path="/wait") for _ in range(2)]
        wait_for(lambda: cpus(instance) == 0.6, "what two sessions need")
        assert cluster.inside(name, "touch", "/tmp/go") == (0, "")
        assert [each.result().status for each in waiting] == [200, 200]
    wait_for(lambda: cpus(instance) == 0.2, "the least again")
    assert len(cluster.instances(name)) == 1
