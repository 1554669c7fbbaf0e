"""Real servers as TCP apps: woken by their first session, whoever speaks first."""

from __future__ import annotations

import hashlib
import json
import smtplib
import socket
from typing import Any

import pytest
from tests.real.conftest import Factory, LocalCluster, wait_for

pytestmark = pytest.mark.real

REDIS = [
    "redis-server",
    "--port",
    "6379",
    "--bind",
    "0.0.0.0",
    "--protected-mode",
    "no",
    "--save",
    "",
]
EXIM_CONFIG = r"""
primary_hostname = mail.test
daemon_smtp_ports = 25
spool_directory = /tmp/spool
log_file_path = /tmp/log-%s
pid_file_path = /tmp/exim.pid
exim_path = /usr/sbin/exim4
deliver_drop_privilege
host_lookup =
rfc1413_query_timeout = 0s
tls_advertise_hosts =
acl_smtp_rcpt = accept
begin acl
begin routers
keep:
  driver = accept
  transport = box
begin transports
box:
  driver = appendfile
  file = /tmp/spool/box
"""
EXIM = f"""
echo 'Debian-exim:x:101:102::/tmp:/usr/sbin/nologin' >>/etc/passwd
echo 'Debian-exim:x:102:' >>/etc/group
mkdir -p /tmp/spool && chown 101:102 /tmp/spool
mkdir -p /etc/exim4
cat >/etc/exim4/exim4.conf <<'END'
{EXIM_CONFIG}
END
exec exim4 -bdf -q1h
"""
SECTIONS = ("health", "placement", "security", "services")
PATIENCE_S = 60.0


def deploy(
    cluster: LocalCluster, name: str, command: list[str], *tcp: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """An app with these TCP ports; `more` are fields of `[reactive]`, or other sections."""
    memory, isolation = more.pop("memory", "128MiB"), more.pop("isolation", "container")
    sections = {name: more.pop(name) for name in SECTIONS if name in more}
    rest = "".join(f"[{name}]\n{fields(table)}" for name, table in sections.items())
    tables = "".join(f"[[tcp]]\n{fields(table)}" for table in tcp)
    reactive = fields({"stop_after": "1h", "stop_timeout": "1s"} | more)
    limits = fields({"memory": memory, "pids": 128})
    top = fields({"name": name, "image": "host", "command": command, "class": isolation})
    text = f"{top}{tables}[reactive]\n{reactive}[resources]\n{limits}{rest}"
    body = {"text": text, "file": f"{name}.toml", "image": "host"}
    deployed: dict[str, Any] = cluster.api.post("/api/v1/apps", body)
    return deployed


def fields(table: dict[str, Any]) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in table.items())


def dial(cluster: LocalCluster, port: int, at: str = "tokyo/tokyo-1") -> socket.socket:
    """A session: nodes listen there when the deploy is acknowledged."""
    return socket.create_connection((cluster.addresses[at], port), timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def cluster(make_cluster: Factory) -> LocalCluster:
    """Two data centers, the first with two nodes, so that sessions are handed on."""
    return make_cluster(("tokyo", "osaka"), nodes=2)


def test_redis_is_woken_by_a_session_and_keeps_two_apart(cluster: LocalCluster) -> None:
    deploy(cluster, "redis", REDIS, {"port": 6380, "target": 6379}, memory="512MiB")
    assert cluster.instances("redis") == []
    with dial(cluster, 6380) as one, dial(cluster, 6380) as two:
        assert ask(one, b"SELECT 1") == b"+OK\r\n"
        assert ask(two, b"SELECT 2") == b"+OK\r\n"
        assert ask(one, b"SET here one") == ask(two, b"SET here two") == b"+OK\r\n"
        assert ask(one, b"GET here") == b"$3\r\none\r\n"
        assert ask(two, b"GET here") == b"$3\r\ntwo\r\n"
    assert cluster.starts("redis") == 1
    wakes = cluster.records("wakes", "redis")
    assert {wake.get("outcome", "ok") for wake in wakes} == {"ok"}
    assert wakes[0]["option"] == "cold"
    assert wakes[0]["phases_us"]["first_byte"] > 0


def ask(sock: socket.socket, line: bytes) -> bytes:
    sock.sendall(line + b"\r\n")
    return sock.recv(4096)


def test_a_session_at_another_node_is_handed_on(cluster: LocalCluster) -> None:
    before = cluster.instances("redis")
    for node in cluster.addresses:
        with dial(cluster, 6380, node) as sock:
            assert ask(sock, b"PING") == b"+PONG\r\n"
    here = [i["id"] for i in cluster.instances("redis") if i["node"].startswith("tokyo")]
    assert here == [i["id"] for i in before]


def test_a_session_goes_to_the_data_center_that_may_run_the_app(cluster: LocalCluster) -> None:
    placement = {"datacenters": ["osaka"]}
    deploy(cluster, "far", REDIS, {"port": 6381, "target": 6379}, placement=placement)
    with dial(cluster, 6381) as sock:
        assert ask(sock, b"PING") == b"+PONG\r\n"
        (instance,) = cluster.instances("far")
        assert instance["node"].startswith("osaka")


def test_much_passes_whole_in_both_directions(cluster: LocalCluster) -> None:
    data = hashlib.shake_256(b"seed").digest(1 << 20) * 64
    for node in ("tokyo/tokyo-1", "tokyo/tokyo-2"):
        with dial(cluster, 6380, node) as sock:
            sock.sendall(b"*3\r\n$3\r\nSET\r\n$3\r\nbig\r\n$%d\r\n" % len(data))
            sock.sendall(data + b"\r\n")
            file = sock.makefile("rb")
            assert file.readline() == b"+OK\r\n"
            sock.sendall(b"GET big\r\n")
            assert file.readline() == b"$%d\r\n" % len(data)
            got = hashlib.sha256(file.read(len(data))).digest()
            assert got == hashlib.sha256(data).digest()
            sock.sendall(b"DEL big\r\n")
            assert file.readline() == b"\r\n"
            assert file.readline() == b":1\r\n"


def test_a_mail_server_greets_whoever_wakes_it(cluster: LocalCluster) -> None:
    """`concurrency = 1`: each session has a server of its own."""
    deploy(cluster, "mail", ["sh", "-c", EXIM], {"port": 25}, concurrency=1, max=2)
    dial(cluster, 25).close()
    node = cluster.addresses["tokyo/tokyo-1"]
    with (
        smtplib.SMTP(node, 25, "client.test", timeout=PATIENCE_S) as one,
        smtplib.SMTP(node, 25, "client.test", timeout=PATIENCE_S) as two,
    ):
        assert len(cluster.instances("mail", "ready")) == 2
        for number, server in enumerate((one, two)):
            text = f"Subject: {number}\r\n\r\nhello\r\n"
            assert server.sendmail("a@mail.test", ["b@mail.test"], text) == {}
    found = []
    for instance in cluster.instances("mail"):
        box = wait_for(lambda i=instance: read_box(cluster, i["id"]), "the mail")
        found.append([line for line in box.splitlines() if line.startswith("Subject:")])
    assert sorted(found) == [["Subject: 0"], ["Subject: 1"]]


def read_box(cluster: LocalCluster, instance: str) -> str:
    return cluster.tabane("exec", instance, "--", "cat", "/tmp/spool/box").out
