"""Several gateways of one node on the same ports, and apps that speak HTTP/2 in a whole cluster."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_figures
from tests.real.conftest import Factory, LocalCluster, wait_for

pytestmark = pytest.mark.real

GATEWAYS = 3
ESTABLISHED = "01"
PORT_80 = "0050"
NGINX = r"""
cat >/tmp/nginx.conf <<'END'
daemon off; master_process off; pid /tmp/pid; error_log /tmp/error.log;
events { worker_connections 256; }
http { access_log off; client_body_temp_path /tmp/b; proxy_temp_path /tmp/p;
  fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s;
  server { listen 8000 http2; location / { return 200 "$server_protocol $host $http_te"; } } }
END
exec nginx -c /tmp/nginx.conf
"""


@pytest.fixture(scope="module")
def node(make_cluster: Factory) -> LocalCluster:
    """One node with three gateways."""
    return make_cluster(("tokyo",), gateways=GATEWAYS)


def gateway_pids(cluster: LocalCluster) -> dict[str, int]:
    """Of each that runs, by name."""
    holder = cluster.holder("tokyo/tokyo-1")
    found = {}
    for pid in Path(f"/proc/{holder}/task/{holder}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        name = next((e for e in environment if e.startswith(b"TABANE_PART=gateway-")), b"")
        if name:
            found[name.partition(b"=")[2].decode()] = int(pid)
    return found


def clients_of(pid: int) -> set[int]:
    """The ports of the clients that a gateway has connections of."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        target = str(descriptor.readlink())
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return {
        int(remote.partition(":")[2], 16)
        for _, local, remote, state, *_, inode in (line[:10] for line in lines)
        if inode in inodes and state == ESTABLISHED and local.endswith(f":{PORT_80}")
    }


def ask(sock: socket.socket, host: str) -> bytes:
    """One request on a kept connection: the beginning of its answer."""
    sock.sendall(f"GET /GPL-3 HTTP/1.1\r\nHost: {host}.test\r\n\r\n".encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        data = sock.recv(1 << 16)
        if not data:
            raise ConnectionResetError("closed")
        answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += sock.recv(1 << 16)
    return head.split(b"\r\n")[0]


@pytest.fixture
def kept(node: LocalCluster) -> Iterator[list[socket.socket]]:
    """Sixty connections, some to each gateway."""
    address = node.addresses["tokyo/tokyo-1"]
    with ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection((address, 80), timeout=60))
            for _ in range(60)
        ]


def test_one_instance_is_started_however_many_gateways_ask(
    node: LocalCluster, kept: list[socket.socket]
) -> None:
    wait_for(lambda: len(gateway_pids(node)) == GATEWAYS, "three gateways")
    node.deploy("herd", reactive={"concurrency": 100, "max": 5})
    with ThreadPoolExecutor(len(kept)) as threads:
        answers = list(threads.map(lambda sock: ask(sock, "herd"), kept))
    assert answers == [b"HTTP/1.1 200 OK"] * len(kept)
    assert all(clients_of(pid) for pid in gateway_pids(node).values())
    assert node.starts("herd") == 1
    wait_for(
        lambda: len({wake["gateway"] for wake in node.records("wakes", "herd")}) > 1,
        "wakes of several gateways",
    )


def figures(cluster: LocalCluster) -> dict[tuple[str, ...], float]:
    """What Prometheus would read, by name and labels."""
    socket_path = cluster.root / "nodes/tokyo/tokyo-1/api.sock"
    argv = ("curl", "-sS", "--unix-socket", str(socket_path), "http://tabane/metrics")
    told = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout
    samples = (sample for family in parse_figures(told) for sample in family.samples)
    return {(sample.name, *sorted(sample.labels.values())): sample.value for sample in samples}


def test_figures_tell_of_all_gateways_and_of_wakes(node: LocalCluster) -> None:
    node.deploy("counted")
    wait_for(lambda: len(gateway_pids(node)) == GATEWAYS, "three gateways")
    before = figures(node)
    node.wake("counted")

    def woken() -> float:
        key = "tabane_wake_seconds_count", "cold", "container"
        return figures(node).get(key, 0) - before.get(key, 0)

    wait_for(lambda: woken() == 1, "its wake to be counted")
    after = figures(node)
    gateways = {key[1:] for key, up in after.items() if key[0] == "tabane_gateway_up" and up}
    assert gateways == {(f"gateway-{number}",) for number in range(GATEWAYS)}

    def served(found: dict[tuple[str, ...], float]) -> float:
        requests = "tabane_http_requests_total"
        return sum(v for key, v in found.items() if key[0] == requests and "clients" in key)

    assert served(after) - served(before) == 1
    assert after["tabane_instances", "container", "crun", "ready"] >= 1
    assert after["tabane_apps",] >= 1


def test_a_gateway_that_is_killed_takes_its_own_connections_and_no_others(
    node: LocalCluster, kept: list[socket.socket]
) -> None:
    node.deploy("kill", reactive={"concurrency": 100, "max": 1})
    assert {ask(sock, "kill") for sock in kept} == {b"HTTP/1.1 200 OK"}
    before = gateway_pids(node)
    doomed = clients_of(before["gateway-1"])
    assert 0 < len(doomed) < len(kept)
    os.kill(before["gateway-1"], signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{before['gateway-1']}").exists(), "its end")
    lost = set()
    for sock in kept:
        try:
            assert ask(sock, "kill") == b"HTTP/1.1 200 OK"
        except ConnectionError:
            lost.add(sock.getsockname()[1])
    assert lost == doomed
    with node.requests("kill") as seen:  # some of them in the backlog of the one that was killed
        wait_for(lambda: len(gateway_pids(node)) == GATEWAYS, "the gateway's return")
    assert seen.failures() == []
    after = gateway_pids(node)
    assert after["gateway-0"] == before["gateway-0"]
    assert node.starts("kill") == 1


def curl(cluster: LocalCluster, at: str, name: str, *options: str) -> str:
    address = cluster.addresses[at]
    argv = ["curl", "-sS", "--max-time", "60", *options, "-H", f"Host: {name}.test"]
    done = subprocess.run([*argv, f"http://{address}/"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def two(make_cluster: Factory) -> LocalCluster:
    """Two data centers of one node each."""
    return make_cluster(("tokyo", "osaka"))


def test_apps_of_http2_are_reached_by_all_and_from_everywhere(two: LocalCluster) -> None:
    placement = {"datacenters": ["osaka"]}
    command = ["sh", "-c", NGINX]
    two.deploy("second", command, protocol="h2c", placement=placement)
    for at in ("osaka/osaka-1", "tokyo/tokyo-1"):
        for option in ("--http1.1", "--http2-prior-knowledge"):
            assert curl(two, at, "second", option) == "HTTP/2.0 second.test trailers"
    assert two.starts("second") == 1
