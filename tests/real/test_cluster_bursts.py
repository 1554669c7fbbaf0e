"""A hundred instances at once, a herd on an app that is broken, and users who have enough."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.real.conftest import Factory, LocalCluster, to_toml, wait_for

from tabane.gateway.decisions import UNPROVEN_AT_ONCE

pytestmark = pytest.mark.real

BURST = 100
HERD = 200
ECHO = ["busybox", "nc", "-ll", "-p", "7000", "-e", "cat"]
BETWEEN = 8 + 2 * len(os.sched_getaffinity(0))
"""Starts of a burst that may begin between another app's session and its own start: some while it
is asked for, and one for each that is under way then."""


@pytest.fixture(scope="module")
def cluster(make_cluster: Factory) -> LocalCluster:
    return make_cluster(("tokyo",))


def deploy_echo(cluster: LocalCluster, name: str, port: int, **reactive: Any) -> None:
    """Its session is a TCP connection, and lasts as long; each has an instance of its own."""
    limits = {"concurrency": 1, "max": BURST, "start_timeout": "90s"}
    limits |= {"stop_after": "1h", "stop_timeout": "1s"}
    top = {"name": name, "image": "host", "command": ECHO}
    sections = {"reactive": limits | reactive, "resources": {"memory": "16MiB", "disk": "1MiB"}}
    text = to_toml(top, sections) + f"\n[[tcp]]\nport = {port}\ntarget = 7000\n"
    cluster.api.post("/api/v1/apps", {"text": text, "file": f"{name}.toml", "image": "host"})


def remove(cluster: LocalCluster, name: str) -> None:
    assert f"default/{name} removed" in cluster.tabane("rm", name).out
    wait_for(lambda: not cluster.instances(name), f"the end of {name}")


class Held:
    """A session that is being used until it is closed."""

    def __init__(self, cluster: LocalCluster, port: int) -> None:
        self.sock = socket.create_connection((cluster.addresses["tokyo/tokyo-1"], port), timeout=90)

    def ask(self) -> bytes:
        """What comes back; nothing when it was closed."""
        try:
            self.sock.sendall(b"x")
            return self.sock.recv(1)
        except ConnectionError:
            return b""


@contextmanager
def held(cluster: LocalCluster, port: int, count: int) -> Iterator[list[bytes]]:
    """So many sessions at the same time: what came back in each, once all have been answered."""
    with ThreadPoolExecutor(count) as threads, ExitStack() as stack:
        sessions = list(threads.map(lambda _: Held(cluster, port), range(count)))
        for session in sessions:
            stack.enter_context(session.sock)
        yield list(threads.map(Held.ask, sessions))


def starts_at(cluster: LocalCluster, name: str) -> list[float]:
    """When its instances began to start."""
    return [each["at"] for each in cluster.records("events", name) if each["state"] == "starting"]


def test_a_hundred_instances_at_once_and_another_app_wakes_in_the_middle(
    cluster: LocalCluster,
) -> None:
    """In counts: how many of the burst's starts are before the other's."""
    deploy_echo(cluster, "burst", 7100)
    cluster.deploy("other")

    def wake_other() -> int:
        wait_for(lambda: len(cluster.instances("burst", "ready")) >= BURST // 10, "the burst")
        return cluster.get("other", path="/GPL-3").status

    with ThreadPoolExecutor(1) as thread:
        status = thread.submit(wake_other)
        with held(cluster, 7100, BURST) as answers:
            assert answers == [b"x"] * BURST
            assert status.result() == 200
            assert len(cluster.instances("burst", "ready")) == BURST
    burst, (other,) = starts_at(cluster, "burst"), starts_at(cluster, "other")
    assert len(burst) == BURST, "one for each session, none twice"
    (wake,) = cluster.records("wakes", "other")
    came = wake["at"] - wake["total_us"] / 1e6
    assert sum(came < at < other for at in burst) <= BETWEEN
    wakes = cluster.records("wakes", "burst")
    assert len({wake["instance"] for wake in wakes}) == BURST
    remove(cluster, "burst")


def test_a_herd_at_a_broken_app_is_few_starts_and_says_why(cluster: LocalCluster) -> None:
    broken = ["sh", "-c", "echo no database >&2; exit 3"]
    cluster.deploy("broken", broken, reactive={"concurrency": 1, "max": BURST})
    cluster.deploy("well")
    begin = threading.Barrier(HERD)

    def ask(number: int) -> Any:
        begin.wait()
        return cluster.get("broken" if number else "well", path="/GPL-3")

    with ThreadPoolExecutor(HERD) as threads:
        well, *answers = threads.map(ask, range(HERD))
    assert well.status == 200, "the herd is not in its way"
    assert {answer.status for answer in answers} == {503}
    assert all("no database" in answer.body for answer in answers)
    assert all("Retry-After: " in answer.head for answer in answers)
    assert cluster.starts("broken") <= UNPROVEN_AT_ONCE + 3
    again = cluster.get("broken")
    assert again.status == 503 and "did not start" in again.body
    why = cluster.tabane("why", "broken")
    assert "it did not start" in why.out and "no database" in why.out


@pytest.fixture
def limits(cluster: LocalCluster) -> Iterator[Path]:
    file = cluster.root / "limits.toml"
    yield file
    file.unlink()


def test_a_user_who_has_enough_gets_no_more(cluster: LocalCluster, limits: Path) -> None:
    """All apps here are root's, who is limited only by name."""
    before = len(cluster.api.get("/api/v1/instances")["instances"])
    most = before + 3
    limits.write_text(f'[default]\ninstances = 0\n[[user]]\nname = "root"\ninstances = {most}\n')
    deploy_echo(cluster, "mine", 7101)
    cluster.deploy("mine-too")
    with held(cluster, 7101, 3) as answers:
        assert answers == [b"x"] * 3
        refused = cluster.get("mine-too", path="/GPL-3")
        assert refused.status == 503
        assert f"user 0 has {most} instances on it, and may have {most}" in refused.body
        why = cluster.tabane("why", "mine-too")
        assert "in tokyo the next instance would be refused" in why.out
        assert f"user 0 has {most} instances on it" in why.out
        limits.write_text(f'[[user]]\nname = "root"\ninstances = {most + 1}\n')
        wait_for(lambda: cluster.get("mine-too", path="/GPL-3").status == 200, "more instances")
    remove(cluster, "mine")
