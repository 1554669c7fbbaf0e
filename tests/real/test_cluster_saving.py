"""Instances that are saved after their first ready, and others that begin as their copies: a
program whose start takes long, in a cluster as people have it."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.real.conftest import Factory, LocalCluster, wait_for

pytestmark = pytest.mark.real

NODE = "tokyo/tokyo-1"
SLOW = """
import asyncio, ctypes, decimal, email.message, http.server, json, os, pathlib, socketserver
import sqlite3, ssl, unittest, urllib.request, uuid, xml.dom.minidom, xmlrpc.server
for _ in range(3):
    {x: str(decimal.Decimal(x).sqrt()) for x in range(60000)}
started, told = str(uuid.uuid4()), []

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        epoch = pathlib.Path("/run/tabane/epoch")
        here = {"started": started, "told": told, "host": os.uname().nodename,
                "epoch": epoch.read_text().strip() if epoch.exists() else ""}
        if self.command == "POST":
            told.append(here["epoch"])
        body = json.dumps(here).encode()
        self.send_response(500 if pathlib.Path("/tmp/refuse").exists() else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer

http.server.ThreadingHTTPServer(("", 8000), Handler).serve_forever()
"""
COMMAND = ["python3", "-c", SLOW]
CLONES = 10


@pytest.fixture(scope="module")
def cluster(make_cluster: Factory) -> LocalCluster:
    """One node, which knows by now what its engines can save."""
    cluster = make_cluster(["tokyo"])
    wait_for(lambda: is_tried(cluster), "the trial of checkpoints")
    return cluster


def is_tried(cluster: LocalCluster) -> bool:
    told = cluster.tabane("doctor", "--json").out
    return bool(told) and "still being tried" not in told


def deploy(cluster: LocalCluster, name: str, **sections: dict[str, Any]) -> None:
    reactive = {"checkpoint": True, "stop_after": "1s", "start_timeout": "1m"}
    reactive |= sections.pop("reactive", {})
    memory = {"memory": "128MiB"}
    cluster.deploy(name, COMMAND, driver="crun", reactive=reactive, resources=memory, **sections)


def ask(cluster: LocalCluster, name: str) -> dict[str, Any]:
    answer = cluster.get(name)
    assert answer.status == 200, answer
    told: dict[str, Any] = json.loads(answer.body)
    return told


def wakes(cluster: LocalCluster, name: str, least: int) -> list[dict[str, Any]]:
    """Its records, once there are so many."""

    def enough() -> list[dict[str, Any]] | None:
        found = cluster.records("wakes", name)
        return found if len(found) >= least else None

    return wait_for(enough, f"{least} wake records of {name}")


def checkpoints(cluster: LocalCluster, name: str) -> list[dict[str, Any]]:
    told = json.loads(cluster.tabane("checkpoint", "ls", "--json").out)["checkpoints"]
    return [one for one in told if name in json.dumps(one)]


def rest(cluster: LocalCluster, name: str) -> None:
    """Until nothing of it runs, and it is saved."""
    wait_for(lambda: not cluster.instances(name), f"the end of {name}")
    wait_for(lambda: checkpoints(cluster, name), f"a checkpoint of {name}")


def test_what_takes_long_to_start_is_there_in_a_moment_the_next_time(
    cluster: LocalCluster,
) -> None:
    deploy(cluster, "slow", hooks={"restored": "http:/"})
    first = ask(cluster, "slow")
    assert first["epoch"] == "" and first["told"] == []
    rest(cluster, "slow")
    states = [event["state"] for event in cluster.records("events", "slow")]
    assert states == ["starting", "ready", "checkpointing", "ready", "stopping", "absent"]
    second = ask(cluster, "slow")
    assert second["started"] == first["started"] and second["host"] != first["host"]
    assert second["told"] == [second["epoch"]] != [""]
    cold, restored = wakes(cluster, "slow", 2)
    assert (cold["option"], restored["option"]) == ("cold", "restore")
    assert restored["phases_us"]["open"] > 0 and restored["phases_us"]["engine"] > 0
    assert restored["total_us"] < cold["total_us"]
    rest(cluster, "slow")
    third = ask(cluster, "slow")
    assert third["started"] == first["started"] and third["epoch"] != second["epoch"]


def test_ten_begin_from_one_at_the_same_time(cluster: LocalCluster) -> None:
    deploy(cluster, "many", reactive={"concurrency": 1, "max": CLONES, "stop_after": "2s"})
    first = ask(cluster, "many")
    rest(cluster, "many")
    with ThreadPoolExecutor(CLONES) as threads:
        told = list(threads.map(lambda _: ask(cluster, "many"), range(CLONES)))
    assert {one["started"] for one in told} == {first["started"]}
    options = [wake["option"] for wake in wakes(cluster, "many", 2)]
    assert options[0] == "cold" and "cold" not in options[1:]
    assert len({one["epoch"] for one in told}) == len({one["host"] for one in told}) > 1


def test_a_hook_that_refuses_has_it_begin_cold(cluster: LocalCluster) -> None:
    deploy(cluster, "refusing", hooks={"restored": "http:/"}, reactive={"stop_after": "1h"})
    first = ask(cluster, "refusing")
    wait_for(lambda: checkpoints(cluster, "refusing"), "a checkpoint")
    cluster.tabane("checkpoint", "rm", "refusing")
    assert cluster.inside("refusing", "touch", "/tmp/refuse")[0] == 0
    # its copies would have the file, so it is saved anew with it
    cluster.kill("agentd")
    cluster.wait_whole()
    wait_for(lambda: checkpoints(cluster, "refusing"), "another checkpoint")
    cluster.tabane("stop", cluster.instances("refusing")[0]["id"])
    wait_for(lambda: not cluster.instances("refusing"), "its end")
    second = ask(cluster, "refusing")
    assert second["started"] != first["started"] and second["epoch"] == ""
    wake = wakes(cluster, "refusing", 2)[-1]
    assert wake["option"] == "cold" and "POST /, is answered 500" in wake["note"]
    assert "POST /, is answered 500" in cluster.tabane("why", "refusing").out


def test_an_agent_that_is_killed_at_any_moment_leaves_an_instance_that_serves(
    cluster: LocalCluster,
) -> None:
    deploy(cluster, "shaken", reactive={"stop_after": "1h", "max": 1})
    first = ask(cluster, "shaken")
    wait_for(lambda: is_in(cluster, "shaken", "checkpointing"), "its dump")
    cluster.kill("agentd")
    assert ask(cluster, "shaken")["started"] == first["started"]
    cluster.wait_whole()
    wait_for(lambda: checkpoints(cluster, "shaken"), "a checkpoint")
    left = [*opened_at(cluster).iterdir()]
    assert len(left) <= len(
        json.loads(cluster.tabane("checkpoint", "ls", "--json").out)["checkpoints"]
    )


def opened_at(cluster: LocalCluster) -> Path:
    """Where its node has opened checkpoints, as this machine sees it."""
    holder = cluster.holder(NODE)
    lines = Path(f"/proc/{holder}/mounts").read_text().splitlines()
    (point,) = (p for _, p, *_ in map(str.split, lines) if p.endswith("/run/checkpoints"))
    return Path(f"/proc/{holder}/root{point}")


def is_in(cluster: LocalCluster, name: str, state: str) -> bool:
    return any(event["state"] == state for event in cluster.records("events", name))


def test_an_agent_that_is_killed_while_it_restores_loses_no_session(cluster: LocalCluster) -> None:
    """At moments that differ, as nobody tells when a restore has got where."""
    deploy(cluster, "halved", reactive={"max": 1})
    first = ask(cluster, "halved")
    for moment in range(3):
        rest(cluster, "halved")
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(cluster.get, "halved")
            time.sleep(moment * 0.035)
            cluster.kill("agentd")
            answer = waiting.result()
        assert answer.status == 200, answer
        assert json.loads(answer.body)["started"] == first["started"]
        cluster.wait_whole()
        assert len(cluster.instances("halved")) <= 1


def test_a_new_revision_begins_cold_and_the_old_checkpoint_goes(cluster: LocalCluster) -> None:
    deploy(cluster, "revised")
    first = ask(cluster, "revised")
    rest(cluster, "revised")
    deploy(cluster, "revised", reactive={"max": 3})
    second = ask(cluster, "revised")
    assert second["started"] != first["started"]
    rest(cluster, "revised")
    cluster.tabane("checkpoint", "gc")
    wait_for(lambda: len(checkpoints(cluster, "revised")) == 1, "the old one gone")
    assert ask(cluster, "revised")["started"] == second["started"]
    assert cluster.tabane("rm", "revised").code == 0
    cluster.tabane("checkpoint", "gc")
    wait_for(lambda: not checkpoints(cluster, "revised"), "all gone")
