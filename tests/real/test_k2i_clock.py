"""A real node whose clock is an hour fast: what is said of its processes, and done to them."""

from __future__ import annotations

import json
import os
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from tests.real.conftest import DATACENTERS, Factory, LocalCluster, wait_for

from tabane.clock import SYSTEM
from tabane.errors import Stale
from tabane.k2i import Client, Process
from tabane.k2i.client import Changes
from tabane.k2i.host import HostReader
from tabane.k2i.procfs import TICKS_PER_S, start_ticks
from tabane.node import cluster as node_cluster
from tabane.node.config import NodeConfig

pytestmark = pytest.mark.real

TOKYO, FAST, ISHIKARI = (f"{dc}/{dc}-1" for dc in DATACENTERS)
OFF_S = 3600.0
CLOSE_S = 60.0
"""No machine is so slow, and no hour so short."""
FAKETIME = {"FAKETIME": f"+{OFF_S:.0f}", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


@pytest.fixture(scope="module")
def cluster(make_cluster: Factory) -> LocalCluster:
    """Osaka's processes have another time of day, in all that they ask the kernel. Its own clocks
    that only count are not touched, as no wrong time of day touches them."""
    (library,) = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")

    def holder_config(node: NodeConfig) -> dict[str, Any]:
        config = whole(node)
        if node.key == FAST:
            config["environment"] |= FAKETIME | {"LD_PRELOAD": str(library)}
        return config

    whole = node_cluster.holder_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_cluster, "holder_config", holder_config)
        cluster = make_cluster()
    cluster.deploy("web")
    for dc in DATACENTERS:
        cluster.wake("web", dc)
    return cluster


@pytest.fixture
def k2i(cluster: LocalCluster) -> Client:
    """Of a node whose clock is right."""
    return Client(f"unix://{cluster.api.socket_of(TOKYO)}", timeout_s=CLOSE_S)


def web_at(k2i: Client, node: str) -> Process:
    """Once the copies of itself have ended that httpd makes for requests."""

    def alone() -> list[Process] | None:
        found = k2i.processes(scope="cluster", app="web", node=node, name="busybox")
        return found if len(found) == 1 else None

    return wait_for(alone, f"the server at {node} alone")[0]


def on_machine(process: Process) -> int:
    """Its pid as this machine has it."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            cgroup, name = (path / "cgroup").read_text(), (path / "comm").read_text()
        except OSError:
            continue
        if process.instance in cgroup and name == "busybox\n":
            return int(path.name)
    raise AssertionError(f"there is no process of {process.instance} on this machine")


def test_the_node_does_have_another_time_of_day(k2i: Client) -> None:
    wall = {f"{host.dc}/{host.node}": host.wall for host in k2i.host(scope="cluster")}
    assert abs(wall[FAST] - wall[TOKYO] - OFF_S) < CLOSE_S
    assert abs(wall[ISHIKARI] - wall[TOKYO]) < CLOSE_S


def test_ages_and_start_times_are_right(k2i: Client) -> None:
    here, there = web_at(k2i, TOKYO), web_at(k2i, FAST)
    for process in (here, there):
        assert process.start_ticks == start_ticks(on_machine(process))
        age_s = HostReader().uptime_s() - process.start_ticks / TICKS_PER_S
        assert 0 <= age_s - process.elapsed_s < CLOSE_S
    apart_s = (there.start_ticks - here.start_ticks) / TICKS_PER_S
    assert abs(there.started_at - here.started_at - apart_s - OFF_S) < 2, "by its own clock"
    for node in k2i.processes(scope="cluster").nodes:
        assert 0 <= node.age_s < CLOSE_S


def test_people_are_shown_when_it_started_by_their_own_clock(
    cluster: LocalCluster, k2i: Client
) -> None:
    process = web_at(k2i, FAST)
    began = SYSTEM.wall() - HostReader().uptime_s() + process.start_ticks / TICKS_PER_S
    options = ("--node", "osaka-1", "-p", str(process.pid), "-o", "lstart=,etimes=")
    ended = cluster.tabane("ps", *options)
    assert ended.code == 0, ended.err
    *moment, seconds = ended.out.split()
    shown = datetime.strptime(" ".join(moment), "%a %b %d %H:%M:%S %Y").astimezone()
    assert abs(shown.timestamp() - began) < 2
    assert int(seconds) < CLOSE_S + process.elapsed_s


def test_history_is_as_old_as_it_is(k2i: Client) -> None:
    points = wait_for(lambda: k2i.history(scope="cluster", node=FAST), "samples")
    assert all(0 <= point.age_s < OFF_S / 2 for point in points)
    assert all(0 < point.over_s < OFF_S / 2 for point in points)


def test_changes_are_told_when_they_are(k2i: Client) -> None:
    with closing(k2i.changes(scope="cluster", node=FAST)) as changes:
        theirs = (it for it in changes if isinstance(it, Changes) and it.node == FAST)
        told = next(it for it in theirs if it.source == "events")
    assert 0 <= told.age_s < CLOSE_S
    assert told.missed == ""


def test_an_order_reaches_who_is_meant_and_nobody_else(cluster: LocalCluster, k2i: Client) -> None:
    process = web_at(k2i, FAST)
    later = replace(process, start_ticks=process.start_ticks + int(OFF_S * TICKS_PER_S))
    with pytest.raises(Stale):
        k2i.signal(later, "KILL")
    pid = on_machine(process)
    assert start_ticks(pid) == process.start_ticks
    assert k2i.nice(process, 5).after == 5
    assert os.getpriority(os.PRIO_PROCESS, pid) == 5
    for _ in range(2):  # an idempotency key is kept for an hour: not for one on the wall
        assert k2i.nice(process, 1, relative=True, idempotency_key="once").after == 6
    k2i.signal(process, "KILL")
    wait_for(lambda: start_ticks(pid) != process.start_ticks, "its end")
    log = cluster.root / "nodes" / FAST / "audit.log"
    killed = [json.loads(line) for line in log.read_bytes().splitlines()][-1]
    assert (killed["action"], killed["outcome"]) == ("signal 9", "done")
    assert abs(killed["at"] - SYSTEM.wall() - OFF_S) < CLOSE_S, "by its own clock"
