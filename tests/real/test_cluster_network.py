"""What an instance can reach: other apps by name, the outside if it may, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address

import pytest
from tests.real.conftest import HTTPD, LocalCluster, saying, wait_for

from tabane.network import netlink
from tabane.network.netlink import Rtnetlink

pytestmark = pytest.mark.real

INSIDE = "100.64.0.1"
NODE_PORTS = (7070, 7071, 7072)
SECONDS = "2"
OUTSIDE = IPv4Address("198.51.100.1")


@pytest.fixture(scope="module")
def cluster(borrowed: LocalCluster) -> LocalCluster:
    return borrowed


class Outside(BaseHTTPRequestHandler):
    """The world: a server that is in no network of the cluster's."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "7")
        self.end_headers()
        self.wfile.write(b"outside")

    def log_message(self, *_: object) -> None:
        """Tests are silent."""


@pytest.fixture(scope="module")
def outside() -> Iterator[str]:
    """Its URL. This test run's network namespace is the machine of the cluster's nodes."""
    with Rtnetlink() as machine:
        machine.perform([netlink.add_address(netlink.LOOPBACK_INDEX, OUTSIDE, 32)])
    server = ThreadingHTTPServer((str(OUTSIDE), 0), Outside)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://{OUTSIDE}:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def caller(cluster: LocalCluster) -> str:
    cluster.deploy("caller")
    cluster.wake("caller")
    return "caller"


def fetch(cluster: LocalCluster, name: str, url: str) -> tuple[int, str]:
    return cluster.inside(name, "busybox", "timeout", SECONDS, "busybox", "wget", "-qO-", url)


@pytest.mark.parametrize("host", ["other-{}.tabane", "other-{}.default.tabane", "other-{}.test"])
def test_an_instance_wakes_another_app_by_name(
    cluster: LocalCluster, caller: str, host: str
) -> None:
    number = ["other-{}.tabane", "other-{}.default.tabane", "other-{}.test"].index(host)
    cluster.deploy(f"other-{number}", saying("the other"))
    assert cluster.instances(f"other-{number}") == []
    assert fetch(cluster, caller, f"http://{host.format(number)}/") == (0, "the other\n")
    assert len(cluster.instances(f"other-{number}")) == 1


def test_a_name_of_no_app_is_not_found(cluster: LocalCluster, caller: str) -> None:
    code, _ = cluster.inside(caller, "busybox", "nslookup", "nobody.tabane")
    assert code != 0


def test_the_nodes_own_ports_are_out_of_reach(cluster: LocalCluster, caller: str) -> None:
    addresses = (INSIDE, *cluster.addresses.values())
    urls = [f"http://{address}:{port}/" for address in addresses for port in NODE_PORTS]
    reached = f"busybox timeout {SECONDS} busybox wget -qO- $url && echo reached $url"
    script = f"for url in {' '.join(urls)} $1; do ({reached}) & done; wait"
    sure = "http://caller.tabane/"
    _, out = cluster.inside(caller, "sh", "-c", script, "sh", f"{sure}GPL-3")
    assert [line for line in out.splitlines() if "reached" in line] == [f"reached {sure}GPL-3"]


def test_other_instances_are_out_of_reach(cluster: LocalCluster, caller: str) -> None:
    cluster.deploy("neighbour")
    address = cluster.wake("neighbour")["address"]
    assert address != cluster.instances(caller)[0]["address"]
    code, out = fetch(cluster, caller, f"http://{address}:8000/GPL-3")
    assert (code != 0, out) == (True, "")
    assert fetch(cluster, "neighbour", f"http://{address}:8000/GPL-3")[0] == 0


def test_the_outside_is_reached_by_those_who_may(
    cluster: LocalCluster, caller: str, outside: str
) -> None:
    cluster.deploy("enclosed", network={"egress": False})
    cluster.wake("enclosed")
    assert fetch(cluster, caller, outside) == (0, "outside")
    code, out = fetch(cluster, "enclosed", outside)
    assert (code != 0, out) == (True, "")
    assert fetch(cluster, "enclosed", "http://caller.tabane/GPL-3")[0] == 0


def test_low_ports_can_be_bound(cluster: LocalCluster) -> None:
    command = [word.replace("8000", "80") for word in HTTPD]
    cluster.deploy("low", command, port=80)
    assert cluster.get("low", path="/GPL-3").status == 200


def test_a_call_between_apps_survives_an_idle_stop(cluster: LocalCluster, caller: str) -> None:
    cluster.deploy("dozes", saying("awake"), reactive={"stop_after": "100ms"})
    for _ in range(3):
        assert fetch(cluster, caller, "http://dozes.tabane/") == (0, "awake\n")
        wait_for(lambda: not cluster.instances("dozes"), "its idle stop")
