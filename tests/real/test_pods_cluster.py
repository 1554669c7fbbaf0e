"""Apps with containers beside the main one, from deploy to their end: nginx in front of a server
that only it reaches, and a shell that looks after what both see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.real.conftest import LocalCluster, wait_for

from tabane.testing.containers import make_tree

pytestmark = pytest.mark.real

PROXY = """
cat >/tmp/nginx.conf <<END
daemon off; pid /tmp/pid; user root; error_log stderr;
events {}
http { access_log off; client_body_temp_path /tmp/b; proxy_temp_path /tmp/p;
  fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s;
  server { listen 8000; location / { proxy_pass http://127.0.0.1:9000; } } }
END
exec nginx -e stderr -c /tmp/nginx.conf
"""
SERVER = """
date +%s.%N >/srv/data/began
echo hello from the server >/tmp/index.html
echo serving $WORD
exec busybox httpd -f -p 127.0.0.1:9000 -h /tmp
"""
APP = """
name = "NAME"
image = "host"
class = "CLASS"
driver = "DRIVER"
command = ["sh", "-c", '''PROXY''']
port = 8000
hosts = ["NAME.test"]
[resources]
memory = "96MiB"
[reactive]
stop_after = "1h"
stop_timeout = "2s"
start_timeout = "1m"
ready = "http:/"
[[volumes]]
name = "data"
path = "/srv/data"
size = "16MiB"
[[containers]]
name = "server"
image = "host"
command = ["sh", "-c", '''SERVER''']
env = {WORD = "always"}
volumes = ["data"]
[[containers]]
name = "clerk"
image = "rootfs:IMAGE"
command = ["sh", "-c", "echo clerk; exec sleep 1000"]
workdir = "/srv"
"""
ENGINES = {
    "crun": "container",
    "runc": "container",
    "containerd": "container",
    "runsc": "sandbox",
}


@pytest.fixture(scope="module")
def cluster(borrowed: LocalCluster) -> LocalCluster:
    return borrowed


@pytest.fixture(params=ENGINES)
def app(request: pytest.FixtureRequest, cluster: LocalCluster, tmp_path: Path) -> str:
    """The name of one that is deployed, and the driver's."""
    driver = str(request.param)
    tree = make_tree(tmp_path).tree
    text = APP.replace("PROXY", PROXY).replace("SERVER", SERVER).replace("IMAGE", str(tree))
    text = text.replace("NAME", f"pod-{driver}")
    text = text.replace("CLASS", ENGINES[driver]).replace("DRIVER", driver)
    done = cluster.tabane("deploy", "-", stdin=text)
    assert done.code == 0, done.err
    return f"pod-{driver}"


def inside(cluster: LocalCluster, app: str, container: str, *argv: str) -> str:
    done = cluster.tabane("exec", "--container", container, app, *argv)
    assert done.code == 0, done.err
    return str(done.out)


def check_containers(cluster: LocalCluster, app: str) -> None:
    """Each process is told to be in its container; a sandbox tells those within it in a moment."""

    def named() -> set[tuple[str, str]]:
        done = cluster.tabane("ps", "-o", "container=,comm=", "--app", app)
        return {(words[0], words[1]) for line in done.out.splitlines() if (words := line.split())}

    programs = {("main", "nginx"), ("server", "busybox"), ("clerk", "sleep")}
    wait_for(lambda: named() >= programs, "a process of each container")
    assert not {container for container, _ in named()} - {"main", "server", "clerk", "-"}


def only(cluster: LocalCluster, app: str) -> dict[str, Any]:
    (found,) = cluster.instances(app)
    return found


def test_the_life_of_a_pod(cluster: LocalCluster, app: str, tmp_path: Path) -> None:
    assert cluster.get(app).body == "hello from the server\n"
    first = only(cluster, app)
    node = first["node"]

    assert "hello" in inside(cluster, app, "clerk", "busybox", "wget", "-qO-", "127.0.0.1:9000")
    names = {inside(cluster, app, name, "cat", "/etc/hostname") for name in ("main", "clerk")}
    assert names == {f"{app}-{first['id']}\n"}
    began = inside(cluster, app, "server", "cat", "/srv/data/began")
    assert inside(cluster, app, "main", "cat", "/srv/data/began") == began
    refused = cluster.tabane("exec", "-c", "clerk", app, "cat", "/srv/data/began")
    assert refused.code == 1, "it did not ask for the volume"
    assert (
        "has no container x (it has: main, server, clerk)"
        in cluster.tabane("exec", "-c", "x", app, "true").err
    )

    (tmp_path / "words").write_text("copied")
    where = f"{first['id']}:/tmp/words"
    assert cluster.tabane("cp", "-c", "clerk", str(tmp_path / "words"), where).code == 0
    assert inside(cluster, app, "clerk", "cat", "/tmp/words") == "copied"
    assert cluster.tabane("exec", app, "cat", "/tmp/words").code == 1, "files of its own"

    assert cluster.tabane("logs", "--container", "server", app).out == "serving always\n"
    assert cluster.tabane("logs", "-c", "clerk", app).out == "clerk\n"
    assert "serving" not in cluster.tabane("logs", app).out
    shown = cluster.tabane("show", app).out
    assert "beside    clerk: sh -c echo clerk; exec sleep 1000, in rootfs:" in shown

    rows = json.loads(cluster.tabane("ps", "--json", "--app", app).out)["processes"]
    assert {row["instance"] for row in rows} == {first["id"]}
    check_containers(cluster, app)

    cluster.kill("agent", node)
    wait_for(lambda: cluster.answers(node), "the next agent")
    assert cluster.get(app).body == "hello from the server\n"
    assert only(cluster, app)["id"] == first["id"]
    assert inside(cluster, app, "clerk", "cat", "/tmp/words") == "copied"

    cluster.tabane("stop", first["id"])
    wait_for(lambda: not cluster.instances(app), "its end")
    assert cluster.tabane("logs", "-c", "server", first["id"]).out == "serving always\n"
    assert cluster.get(app).body == "hello from the server\n", "and a new one when it is asked for"
    cluster.tabane("stop", only(cluster, app)["id"])
    wait_for(lambda: not cluster.instances(app), "its end")


def test_the_end_of_a_sidecar_is_the_instance_s(cluster: LocalCluster, app: str) -> None:
    assert cluster.get(app).status == 200
    first = only(cluster, app)
    cluster.tabane("exec", "-c", "server", app, "pkill", "-KILL", "-x", "busybox")
    wait_for(lambda: first["id"] not in [i["id"] for i in cluster.instances(app)], "its end")
    (end,) = [
        event
        for event in cluster.records("events", app)
        if event["instance"] == first["id"] and event["state"] == "absent"
    ]
    assert end["reason"] == "container server was killed by SIGKILL; its last line: serving always"
    assert cluster.get(app).body == "hello from the server\n"
    again = only(cluster, app)
    assert again["id"] != first["id"]
    cluster.tabane("stop", again["id"])
    wait_for(lambda: not cluster.instances(app), "its end")


def test_what_a_class_cannot_have_is_refused(cluster: LocalCluster) -> None:
    text = APP.replace("PROXY", "x").replace("SERVER", "x").replace("IMAGE", "/")
    text = text.replace("NAME", "no-pod").replace("CLASS", "unikernel")
    text = text.replace("DRIVER", "wasmtime").replace('image = "rootfs:/"\n', 'image = "host"\n')
    done = cluster.tabane("deploy", "-", stdin=text)
    assert done.code == 2 and "containers: driver wasmtime has only the main one" in done.err
