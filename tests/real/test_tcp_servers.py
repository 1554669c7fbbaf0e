"""More real servers as TCP apps, and Apache and nginx over HTTP; killed gateways, ports in use."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time

import pytest
from tests.real.conftest import Factory, LocalCluster, wait_for
from tests.real.test_tcp_apps import PATIENCE_S, REDIS, ask, deploy, dial

pytestmark = pytest.mark.real

POSTGRES = r"""
echo 'postgres:x:105:110::/tmp:/bin/sh' >>/etc/passwd
install -d -o 105 -g 110 /tmp/db
exec setpriv --reuid 105 --regid 110 --clear-groups sh -ec '
bin=$(echo /usr/lib/postgresql/*/bin)
$bin/initdb -D /tmp/db -A trust -U postgres --no-sync >/dev/null
echo "host all all 0.0.0.0/0 trust" >>/tmp/db/pg_hba.conf
exec $bin/postgres -D /tmp/db -h 0.0.0.0 -k /tmp -c fsync=off -c shared_buffers=16MB \
  -c dynamic_shared_memory_type=mmap -c max_connections=10
'
"""
SSHD = r"""
echo 'sshd:x:104:65534::/run/sshd:/usr/sbin/nologin' >>/etc/passwd
mkdir -p /run/sshd /etc/ssh /root
ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/key
exec /usr/sbin/sshd -D -e -f /dev/null -h /etc/ssh/key -p 22 -o UsePAM=no
"""
APACHE = r"""
echo 'www-data:x:33:33::/tmp:/usr/sbin/nologin' >>/etc/passwd
echo 'www-data:x:33:' >>/etc/group
mkdir -p /tmp/www && echo 'by Apache' >/tmp/www/index.html
cat >/tmp/httpd.conf <<'END'
ServerName web
Listen 8000
PidFile /tmp/httpd.pid
ErrorLog /dev/stderr
User www-data
Group www-data
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule dir_module /usr/lib/apache2/modules/mod_dir.so
DocumentRoot /tmp/www
END
exec apache2 -f /tmp/httpd.conf -D FOREGROUND
"""
NGINX = r"""
mkdir -p /tmp/www /var/lib/nginx && echo 'by nginx' >/tmp/www/index.html
cat >/tmp/nginx.conf <<'END'
daemon off; user root; pid /tmp/nginx.pid; error_log stderr;
events { worker_connections 64; }
http { access_log off; server { listen 8000; root /tmp/www; } }
END
exec nginx -c /tmp/nginx.conf
"""


@pytest.fixture(scope="module")
def cluster(make_cluster: Factory) -> LocalCluster:
    return make_cluster(("tokyo",), nodes=2)


def test_postgresql_serves_two_sessions_at_once(cluster: LocalCluster) -> None:
    command = ["sh", "-ec", POSTGRES]
    deploy(
        cluster,
        "db",
        command,
        {"port": 5432},
        memory="256MiB",
        start_timeout="1m",
        ready="health",  # it listens before it takes sessions
        health={"command": ["pg_isready", "-q", "-h", "127.0.0.1"]},
    )
    dial(cluster, 5432).close()
    url = f"postgresql://postgres@{cluster.addresses['tokyo/tokyo-1']}:5432/postgres"
    waits = "SELECT pg_advisory_lock(7), 'first'"
    comes = "SELECT 'second'; SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%advisory%'"
    with psql(url) as one:
        assert one.stdin is not None
        one.stdin.write(f"{waits};\n")
        one.stdin.flush()
        assert one.stdout is not None
        assert one.stdout.readline() == "|first\n"
        with psql(url) as two:
            out, _ = two.communicate(f"{comes};\n", timeout=PATIENCE_S)
            assert out.split() == ["second", "2"]
    assert cluster.starts("db") == 1


def psql(url: str) -> subprocess.Popen[str]:
    argv = ("psql", "-XAtq", url)
    return subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_sshd_is_woken_by_a_client_that_waits_for_its_greeting(cluster: LocalCluster) -> None:
    chroot = {"capabilities": ["CAP_SYS_CHROOT"]}
    command = ["sh", "-ec", SSHD]
    deploy(cluster, "shell", command, {"port": 2222, "target": 22}, security=chroot)
    with dial(cluster, 2222) as sock:
        assert sock.recv(100).startswith(b"SSH-2.0-OpenSSH")
    node = cluster.addresses["tokyo/tokyo-2"]
    argv = ("ssh-keyscan", "-p", "2222", "-T", "20", "-t", "ed25519", node)
    keys = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert f"[{node}]:2222 ssh-ed25519 " in keys.stdout
    assert cluster.starts("shell") == 1


@pytest.mark.parametrize(("name", "script"), [("Apache", APACHE), ("nginx", NGINX)])
def test_web_servers_are_woken_by_a_request(cluster: LocalCluster, name: str, script: str) -> None:
    app = f"by-{name.lower()}"
    cluster.deploy(app, ["sh", "-ec", script], resources={"pids": 256, "memory": "128MiB"})
    answer = cluster.get(app)
    assert (answer.status, answer.body) == (200, f"by {name}\n")
    assert cluster.starts(app) == 1


def test_one_side_may_end_and_wait_for_the_other(cluster: LocalCluster) -> None:
    """`nc -N` ends its side after what it reads: the answer comes all the same."""
    command = ["socat", "TCP-LISTEN:9000,fork,reuseaddr", "EXEC:md5sum"]
    deploy(cluster, "sums", command, {"port": 9000})
    dial(cluster, 9000).close()
    for node in cluster.addresses.values():
        done = subprocess.run(
            ("nc", "-N", node, "9000"), input=b"hello\n", capture_output=True, timeout=PATIENCE_S
        )
        assert done.stdout == b"b1946ac92492d2347c6235b4d2611184  -\n"


def test_an_app_calls_another_by_name_and_wakes_it(cluster: LocalCluster) -> None:
    deploy(cluster, "cache", REDIS, {"port": 6390, "target": 6379})
    cluster.deploy("caller", network={"egress": False})
    cluster.wake("caller")
    assert cluster.instances("cache") == []
    code, out = cluster.inside("caller", "redis-cli", "-h", "cache.tabane", "-p", "6390", "PING")
    assert (code, out) == (0, "PONG\n")
    for port in ("7070", "7073", "6391"):
        refused = cluster.inside("caller", "nc", "-z", "-w", "1", "cache.tabane", port)
        assert refused[0] == 1


def test_a_killed_gateway_loses_its_own_sessions_and_no_connection(cluster: LocalCluster) -> None:
    with dial(cluster, 6390) as before:
        assert ask(before, b"PING") == b"+PONG\r\n"
        pid = cluster.part("gatewayd")
        os.kill(pid, signal.SIGSTOP)
        with dial(cluster, 6390) as waits:
            waits.sendall(b"PING\r\n")
            os.kill(pid, signal.SIGKILL)
            assert waits.recv(100) == b"+PONG\r\n"
        assert is_over(before)
        with dial(cluster, 6390) as after:
            assert ask(after, b"PING") == b"+PONG\r\n"
    assert cluster.starts("cache") == 1


def test_a_session_that_outlives_its_instances_age_is_cut_at_last(cluster: LocalCluster) -> None:
    ages = {"max_age": "1s", "drain_timeout": "1s"}
    deploy(cluster, "aged", REDIS, {"port": 6402, "target": 6379}, **ages)
    with dial(cluster, 6402) as sock:
        assert ask(sock, b"PING") == b"+PONG\r\n"
        (first,) = cluster.instances("aged")
        assert is_over(sock)
    with dial(cluster, 6402) as sock:
        assert ask(sock, b"PING") == b"+PONG\r\n"
    ends = [e for e in cluster.records("events", "aged") if e["instance"] == first["id"]]
    assert "older than its max_age of 1 s" in [event.get("reason") for event in ends]


def test_a_program_at_work_is_not_idle_though_it_has_no_session(cluster: LocalCluster) -> None:
    work = "until test -e /tmp/done; do sleep 0.05; done | nc -N -U /run/tabane/lease.sock"
    command = ["sh", "-ec", f"({work}) & exec {' '.join(REDIS[:-2])}"]
    lease = {"lease": True}
    deploy(cluster, "job", command, {"port": 6401, "target": 6379}, stop_after="0s", services=lease)
    with dial(cluster, 6401) as sock:
        assert ask(sock, b"PING") == b"+PONG\r\n"
        wait_for(lambda: "at work, by 1 lease" in cluster.tabane("show", "job").out, "the lease")
    time.sleep(4.0)  # longer than what was said before the end of the session counts
    (instance,) = cluster.instances("job")
    timed = "curl -sS -X PUT --unix-socket /run/tabane/lease.sock http://localhost/lease?for=1h"
    code, out = cluster.inside("job", *timed.split())
    assert (code, json.loads(out)["leases"]) == (0, 2)
    assert cluster.inside("job", "touch", "/tmp/done")[0] == 0
    wait_for(lambda: [i["leases"] for i in cluster.instances("job")] == [1], "the job's end")
    gone = "curl -sS -X DELETE --unix-socket /run/tabane/lease.sock http://localhost/lease"
    assert json.loads(cluster.inside("job", *gone.split())[1])["leases"] == 0
    wait_for(lambda: not cluster.instances("job"), "its end")
    assert instance["leases"] == 1


def test_a_sandbox_is_woken_and_its_end_ends_the_session(cluster: LocalCluster) -> None:
    """Its network stack goes with it, so no packet tells of its end."""
    ports = {"port": 6403, "target": 6379}, {"port": 6404, "target": 6379}
    deploy(cluster, "boxed", REDIS, *ports, isolation="sandbox", memory="256MiB")
    with dial(cluster, 6403) as one, dial(cluster, 6404) as two:
        assert ask(one, b"PING") == ask(two, b"PING") == b"+PONG\r\n"
        (instance,) = cluster.instances("boxed")
        process = f"{instance['node']}:{instance['pid']}"
        assert cluster.tabane("kill", "-KILL", process).code in (0, 1)
        assert is_over(one)
        assert is_over(two)


def is_over(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_an_idle_instance_stops_after_its_last_session(cluster: LocalCluster) -> None:
    deploy(cluster, "brief", REDIS, {"port": 6400, "target": 6379}, stop_after="500ms")
    with dial(cluster, 6400) as sock:
        assert ask(sock, b"PING") == b"+PONG\r\n"
        (instance,) = cluster.instances("brief")
        time.sleep(1.0)
        assert ask(sock, b"PING") == b"+PONG\r\n"
        assert [i["id"] for i in cluster.instances("brief")] == [instance["id"]]
    wait_for(lambda: not cluster.instances("brief"), "its end")


def test_a_port_that_another_program_has_is_told_and_taken_later(cluster: LocalCluster) -> None:
    address = cluster.addresses["tokyo/tokyo-2"]
    holder = cluster.holder("tokyo/tokyo-2")
    argv = ("nsenter", "-t", str(holder), "-n", "nc", "-l", "-k", address, "6410")
    with subprocess.Popen(argv) as other:
        try:
            wait_for(lambda: can_dial(address, 6410), "the other program")
            deploy(cluster, "late", REDIS, {"port": 6410, "target": 6379})
            with dial(cluster, 6410, "tokyo/tokyo-1") as sock:
                assert ask(sock, b"PING") == b"+PONG\r\n"
            problem = "tokyo/tokyo-2 takes no sessions at TCP port 6410: "
            wait_for(lambda: problem in cluster.tabane("apps").err, "the complaint")
            assert "Address already in use" in cluster.tabane("show", "late").out
            assert "TCP port 6410 of default/late" in cluster.tabane("events", "-n", "100").out
        finally:
            other.kill()
    wait_for(lambda: problem not in cluster.tabane("apps").err, "its being taken")
    with dial(cluster, 6410, "tokyo/tokyo-2") as sock:
        assert ask(sock, b"PING") == b"+PONG\r\n"


def can_dial(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


def test_a_removed_app_frees_its_port(cluster: LocalCluster) -> None:
    assert "6410/tcp" in cluster.tabane("apps").out
    assert cluster.tabane("rm", "late").code == 0
    for address in cluster.addresses.values():
        wait_for(lambda a=address: not can_dial(a, 6410), "its end")
    deploy(cluster, "heir", REDIS, {"port": 6410, "target": 6379})
    with dial(cluster, 6410) as sock:
        assert ask(sock, b"PING") == b"+PONG\r\n"
