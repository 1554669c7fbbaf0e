"""`class = "auto"`: who is trusted gets a container, anyone else a sandbox."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from tests.real.conftest import Answer, LocalCluster, wait_for

from tabane.node.control import FIRST_ID_BASE, ID_RANGE

pytestmark = pytest.mark.real

APP = """
name = "auto"
image = "host"
class = "auto"
command = ["sh", "-c", "cat /proc/version >/tmp/v; exec busybox httpd -f -p 8000 -h /tmp"]
port = 8000
hosts = ["auto.test"]
[resources]
memory = "128MiB"
[reactive]
stop_after = "1h"
stop_timeout = "1s"
"""


@pytest.fixture(scope="module")
def cluster(borrowed: LocalCluster) -> LocalCluster:
    return borrowed


def ask(cluster: LocalCluster, token: str = "") -> Answer:
    with socket.create_connection((cluster.addresses["tokyo/tokyo-1"], 80), timeout=60) as sock:
        field = f"tabane-token: {token}\r\n" if token else ""
        head = f"GET /v HTTP/1.1\r\nHost: auto.test\r\n{field}Connection: close\r\n\r\n"
        sock.sendall(head.encode())
        answer = b"".join(iter(lambda: sock.recv(1 << 16), b"")).decode()
    head, _, body = answer.partition("\r\n\r\n")
    return Answer(int(head.split(" ", 2)[1]), head, body)


def classes(cluster: LocalCluster) -> dict[str, str]:
    """Class of the instances for each trust."""
    found: list[dict[str, Any]] = cluster.instances("auto", "ready")
    assert len({i["trust"] for i in found}) == len(found), found
    return {i["trust"]: i.get("isolation", "container") for i in found}


@pytest.fixture(scope="module")
def token(cluster: LocalCluster) -> str:
    return (Path(cluster.root) / "token").read_text().strip()


def test_the_caller_decides_what_stands_between(cluster: LocalCluster, token: str) -> None:
    assert cluster.tabane("deploy", "-", stdin=APP).code == 0
    stranger, friend = ask(cluster), ask(cluster, token)
    assert stranger.status == friend.status == 200
    host = Path("/proc/version").read_text().strip()
    assert host in friend.body, "a container sees the node's kernel"
    assert host not in stranger.body, "a sandbox has one of its own"
    expected = {"anonymous": "sandbox", "trusted": "container"}
    assert wait_for(lambda: classes(cluster) if len(classes(cluster)) == 2 else None) == expected
    for guess in ("", "guessed"):
        assert ask(cluster, guess).body == stranger.body
    assert len(cluster.instances("auto")) == 2


def test_strangers_and_friends_share_no_ids_on_the_host(cluster: LocalCluster) -> None:
    node = f"/proc/{cluster.holder('tokyo/tokyo-1')}/root"
    instances = cluster.instances("auto", "ready")
    maps = [Path(f"{node}/proc/{i['pid']}/uid_map").read_text().split() for i in instances]
    (first, other) = sorted(int(base) for _, base, _ in maps)
    assert first >= FIRST_ID_BASE
    assert other - first >= ID_RANGE
    assert {size for _, _, size in maps} == {str(ID_RANGE)}


def test_no_stranger_becomes_a_friend_by_an_instance_for_strangers(cluster: LocalCluster) -> None:
    stranger = next(i for i in cluster.instances("auto", "ready") if i["trust"] == "anonymous")
    command = ("busybox", "wget", "-q", "-O", "-", "http://auto.tabane/v")
    told = cluster.tabane("exec", stranger["id"], "--", *command)
    assert told.code == 0, told.err
    assert told.out == ask(cluster).body


def test_it_is_explained_and_recorded(cluster: LocalCluster) -> None:
    told = cluster.tabane("show", "auto").out
    assert "waiting sessions of anonymous callers 0" in told
    assert "can run it with runsc (each of crun, runc" in told and "can run it with crun" in told
    rows = [line.split() for line in told.splitlines() if " ready " in line and "100.64." in line]
    assert {(row[5], row[6]) for row in rows} >= {("container", "crun"), ("sandbox", "runsc")}, told
    wakes = wait_for(
        lambda: [w for w in cluster.records("wakes", "auto") if w["trust"] == "trusted"]
    )
    assert wakes[0]["option"] == "cold"


def test_an_app_can_stop_choosing(cluster: LocalCluster) -> None:
    fixed = APP.replace('class = "auto"', 'class = "sandbox"')
    assert cluster.tabane("deploy", "-", stdin=fixed).code == 0
    assert ask(cluster).status == 200
    wait_for(lambda: [i.get("trust") for i in cluster.instances("auto")] == [None], "one cohort")
    assert cluster.tabane("rm", "auto").code == 0
    wait_for(lambda: not cluster.instances("auto"), "its end")
