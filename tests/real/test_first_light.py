"""Three data centers, real containers, real requests: the main job, and what may die meanwhile."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.real.conftest import wait_for

from tabane.tools.cli import run
from tabane.tools.cli.cluster import start_cluster, stop_cluster, wait_until_up
from tabane.tools.client import Cluster

pytestmark = pytest.mark.real

DATACENTERS = ["tokyo", "osaka", "ishikari"]
APP = """\
name = "{name}"
image = "host"
command = {command}
port = 8000
hosts = ["{name}.test"]
[resources]
memory = "64MiB"
[reactive]
max = 20
start_timeout = "{timeout}"
stop_after = "{stop_after}"
[placement]
datacenters = {datacenters}
"""
HTTPD = ["busybox", "httpd", "-f", "-p", "8000", "-h", "/usr/share/common-licenses"]


class Local:
    """A running cluster and its gateways."""

    def __init__(self, root: Path) -> None:
        self.root = root
        start_cluster(root, DATACENTERS, 1, 1, "")
        self.api = Cluster(root)
        nodes = self.api.config["nodes"]
        self.gateways = {node["datacenter"]: node["address"] for node in nodes}

    def deploy(self, name: str, command: list[str] = HTTPD, **fields: object) -> None:
        fields = {"timeout": "10s", "stop_after": "1h", "datacenters": '["*"]'} | fields
        file = self.root / f"{name}.toml"
        file.write_text(APP.format(name=name, command=json.dumps(command), **fields))
        assert run(["--root", str(self.root), "deploy", str(file)]) == 0

    def get(self, name: str, datacenter: str = "tokyo") -> tuple[int, bytes]:
        """One request on a connection of its own: status, and all that came."""
        with socket.create_connection((self.gateways[datacenter], 80), timeout=60) as sock:
            head = f"GET /GPL-3 HTTP/1.1\r\nHost: {name}.test\r\nConnection: close\r\n\r\n"
            sock.sendall(head.encode())
            answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
        return int(answer.split(b" ", 2)[1]), answer

    def instances(self, name: str) -> list[dict[str, object]]:
        found = self.api.get("/api/v1/instances")["instances"]
        return [i for i in found if i["app"] == f"default/{name}"]

    def known(self, name: str) -> list[dict[str, object]]:
        """The same, when their engines have told their pids, too."""

        def look() -> list[dict[str, object]]:
            found = self.instances(name)
            return found if all("pid" in instance for instance in found) else []

        return wait_for(look, f"{name} and its pids")

    def kill(self, part: str, node: str = "tokyo-1") -> None:
        """kill -9 one of Tabane's own processes, by its pid as this machine sees it; it is gone
        when this returns, so its sessions are over, too."""
        holder = json.loads((self.root / "nodes/tokyo" / node / "process.json").read_bytes())
        children = Path(f"/proc/{holder['pid']}/task/{holder['pid']}/children").read_text()
        for pid in map(int, children.split()):
            if part in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGKILL)
                wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists(), f"the end of {part}")
                return
        raise AssertionError(f"{node} has no {part}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    root = tmp_path_factory.mktemp("cluster")
    for directory in (root, *root.parents[:3]):
        directory.chmod(0o755)
    local = Local(root)
    yield local
    stop_cluster(root)


def test_a_request_starts_a_program_and_ps_shows_it(cluster: Local, capsys) -> None:
    cluster.deploy("hello")
    assert cluster.instances("hello") == []
    status, answer = cluster.get("hello")
    assert status == 200
    assert b"GNU GENERAL PUBLIC LICENSE" in answer
    (instance,) = cluster.known("hello")
    assert (instance["node"], instance["state"]) == ("tokyo/tokyo-1", "ready")
    assert all(cluster.get("hello")[0] == 200 for _ in range(20))
    assert cluster.instances("hello") == [instance]
    capsys.readouterr()
    assert run(["--root", str(cluster.root), "ps", "--app", "hello"]) == 0
    assert "tokyo-1 hello container" in capsys.readouterr().out
    assert cluster.get("hello", "osaka")[0] == 200
    assert {i["node"] for i in cluster.instances("hello")} == {"tokyo/tokyo-1", "osaka/osaka-1"}


def test_a_burst_is_served_by_as_many_instances_as_it_needs(cluster: Local) -> None:
    cluster.deploy("burst")
    with ThreadPoolExecutor(200) as threads:
        statuses = [s for s, _ in threads.map(lambda _: cluster.get("burst"), range(200))]
    assert statuses == [200] * 200
    assert len(cluster.instances("burst")) <= 20


@pytest.mark.parametrize("part", ["agentd", "hubd", "gatewayd"])
def test_what_is_killed_comes_back_and_instances_never_notice(cluster: Local, part: str) -> None:
    name = f"steady-{part}"
    cluster.deploy(name)
    cluster.get(name)
    before = cluster.known(name)
    cluster.kill(part)
    assert cluster.get(name)[0] == 200
    wait_until_up(cluster.api)
    cluster.deploy(f"after-{part}")
    assert cluster.get(f"after-{part}")[0] == 200
    assert cluster.instances(name) == before


def test_a_data_center_that_may_not_run_it_forwards(cluster: Local) -> None:
    cluster.deploy("only-tokyo", datacenters='["tokyo"]')
    assert cluster.get("only-tokyo", "ishikari")[0] == 200
    (instance,) = cluster.instances("only-tokyo")
    assert instance["node"] == "tokyo/tokyo-1"


@pytest.mark.parametrize(
    ("name", "command", "reason"),
    [
        ("exits", ["sh", "-c", "echo no config >&2; exit 3"], b"exited with code 3"),
        ("silent", ["sleep", "60"], b"did not become ready (listen on port 8000) within 1 s"),
        ("nothing", ["no-such-program"], b"no program 'no-such-program'"),
    ],
)
def test_what_does_not_start_is_said_with_its_reason(
    cluster: Local, name: str, command: list[str], reason: bytes
) -> None:
    cluster.deploy(name, command, timeout="1s")
    status, answer = cluster.get(name)
    assert status == 503
    assert reason in answer
    assert b"\r\nRetry-After: " in answer
    shown = cluster.api.get(f"/api/v1/apps/default/{name}")
    assert any(reason.decode() in home["reason"] for home in shown["homes"])


def test_a_new_revision_is_ready_before_the_old_one_goes(cluster: Local) -> None:
    cluster.deploy("rolling")
    cluster.get("rolling")
    with ThreadPoolExecutor(4) as threads:
        answers = threads.map(lambda _: cluster.get("rolling")[0], range(400))
        cluster.deploy("rolling")
        assert set(answers) == {200}
    assert cluster.get("rolling")[0] == 200


def test_a_request_after_an_idle_stop_is_not_lost(cluster: Local) -> None:
    cluster.deploy("naps", stop_after="50ms")
    with ThreadPoolExecutor(3) as threads:
        assert set(threads.map(lambda _: cluster.get("naps")[0], range(150))) == {200}


def test_the_control_ports_want_to_know_who_asks(cluster: Local) -> None:
    with socket.create_connection((cluster.gateways["tokyo"], 7070), timeout=60) as sock:
        host = cluster.gateways["tokyo"]
        sock.sendall(f"GET /api/v1/instances HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
        assert b" 401 " in sock.recv(4096)
    with socket.create_connection((cluster.gateways["tokyo"], 7070), timeout=60) as sock:
        sock.sendall(b"GET /api/v1/instances HTTP/1.0\r\nHost: evil.test\r\n\r\n")
        assert b" 403 " in sock.recv(4096)
