"""Instances of several containers with real engines: they keep to the interface, and share what
they are to share and nothing else."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from tabane.model import Container, ExitStatus, Resources
from tabane.runtimes import load
from tabane.runtimes.api import Image
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.pods import Pods, log_of, split, with_pods
from tabane.testing.container_bench import SAY, ContainerBench, make_app
from tabane.testing.containerd import make_bench
from tabane.testing.drivers import DRIVER_CHECKS, Check, wait_until_said
from tabane.testing.pods import PART_CHECKS, POD_CHECKS, InPods
from tabane.testing.pods import Check as PodCheck
from tabane.testing.spawner import PlainSpawner

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("no_hybrid")]


@pytest.fixture(params=["crun", "runc", "containerd", "runsc"])
async def bench(
    request: pytest.FixtureRequest, ground: Path, image: Image
) -> AsyncIterator[ContainerBench]:
    if request.param == "containerd":
        made = make_bench(ground, image, pods=True)
        yield made
        await made.aclose()
        return
    spawner = PlainSpawner()
    driver = load(request.param, spawner, ground / request.param)
    yield ContainerBench(with_pods(driver), spawner, ground, image)
    driver.close()  # type: ignore[attr-defined]
    await spawner.aclose()


@pytest.mark.parametrize("check", POD_CHECKS + PART_CHECKS, ids=lambda check: check.__name__)
async def test_pods(check: PodCheck, bench: ContainerBench) -> None:
    await check(bench)


@pytest.mark.parametrize("bench", ["crun", "containerd", "runsc"], indirect=True)
@pytest.mark.parametrize("check", DRIVER_CHECKS, ids=lambda check: check.__name__)
async def test_conformance_with_a_sidecar(check: Check, bench: ContainerBench) -> None:
    await check(InPods(bench))


SLEEPER = Container("sleeper", command=("sleep", "1000"))


async def test_what_they_share(bench: ContainerBench) -> None:
    """One name and, where the node's kernel has it, one network namespace; files and processes are
    each one's own. (That they reach each other is seen in a node: here no loopback is up.)"""
    keep = ("sh", "-c", "echo mine > /tmp/file; exec sleep 1001")
    app = make_app(name="sharing", containers=(Container("keeper", command=keep), SLEEPER))
    async with bench.running(app) as inside:
        for name in ("main", "keeper", "sleeper"):
            assert (
                await inside.run("hostname; cat /etc/hostname", name) == f"{inside.spec.id}\n" * 2
            )
            first = (await inside.run("cat /proc/1/cmdline", name)).split("\0")
            assert first[0] == "/.tabane/init" and ("sh" in first) == (name == "keeper")
        assert await inside.run("cat /tmp/file", "keeper") == "mine\n"
        for name in ("main", "sleeper"):
            assert "No such file" in await inside.run("cat /tmp/file", name)
        if not bench.driver.capabilities.own_stack:
            pids = [part.data["pid"] for part in split(inside.handle).values()]
            for kind, count in (("net", 1), ("user", 1), ("pid", 3), ("mnt", 3), ("ipc", 3)):
                found = {Path(f"/proc/{pid}/ns/{kind}").readlink() for pid in pids}
                assert len(found) == count, kind


@pytest.mark.parametrize("bench", ["crun", "runsc"], indirect=True)
async def test_who_sees_whose_processes(bench: ContainerBench) -> None:
    """In a sandbox, the first container sees all."""
    first = Container("first", command=("sleep", "1001"))
    async with bench.running(make_app(name="seen", containers=(first, SLEEPER))) as inside:
        list_all = "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"
        of_others = {"first": "1000", "sleeper": "1001", "main": "1001"}
        for name, other in of_others.items():
            sees = f"sleep {other}" in await inside.run(list_all, name)
            assert sees == (name == "first" and bench.driver.capabilities.own_stack), name


async def test_limits_are_the_pod_s(bench: ContainerBench) -> None:
    resources = Resources(cpu=0.5, memory_bytes=48 << 20, pids=32, disk_bytes=1 << 20)
    app = make_app(name="bounded", resources=resources, containers=(SLEEPER,))
    async with bench.running(app) as inside:
        cgroup = Cgroup(inside.spec.cgroup)
        first = cgroup.limits()
        assert first["cpu"] == 0.5 and first["memory_bytes"] >= 49 << 20
        below = [Cgroup(f"{inside.spec.cgroup}/{name}") for name in ("main", "sleeper")]
        assert [each.limits() for each in below] == [{}, {}]
        assert all(each.pids() for each in below)
        assert set(cgroup.pids()) == {pid for each in below for pid in each.pids()}
        await bench.driver.limit(inside.handle, replace(resources, cpu=1.0, memory_bytes=64 << 20))
        second = cgroup.limits()
        assert second["cpu"] == 1.0
        assert second["memory_bytes"] == first["memory_bytes"] + (16 << 20)
        stats = await bench.driver.stats(inside.handle)
        assert stats.pids >= 4 and stats.memory_bytes > 0


async def test_the_disk_quota_is_the_pod_s(bench: ContainerBench) -> None:
    async with bench.running(make_app(name="full", containers=(SLEEPER,))) as inside:
        write = "dd if=/dev/zero of=/srv/file bs=1k count=700 2>&1"
        assert "No space left" not in await inside.run(write)
        assert "No space left" in await inside.run(write, "sleeper")
        await inside.run("rm /srv/file")
        assert "No space left" not in await inside.run(write, "sleeper")


async def test_memory_is_the_pod_s(bench: ContainerBench) -> None:
    """Which container is killed for it is told; with a sandbox that is all of them."""
    until_told = "while ! [ -e /tmp/go ]; do sleep 0.1; done; sleep 0.5"
    eat = ("sh", "-c", f"{until_told}; exec dd if=/dev/zero of=/dev/null bs=256M")
    app = make_app(name="hungry", containers=(Container("eater", command=eat), SLEEPER))
    async with bench.running(app) as inside:
        await inside.run("echo > /tmp/go", "eater")
        end = await bench.driver.wait(inside.handle)
        whole = bench.driver.capabilities.own_stack
        expected = [ExitStatus(signal=9, oom=True, container="" if whole else "eater")]
        refused = ExitStatus(1, container="eater")  # where a kernel says that there is no more
        assert end in (*expected, refused), end


async def test_a_killed_sandbox_is_the_instance_s_end(bench: ContainerBench) -> None:
    async with bench.running(make_app(name="shot", containers=(SLEEPER,))) as inside:
        pid = inside.handle.data["pid"]
        assert isinstance(pid, int)
        ended = asyncio.ensure_future(bench.driver.wait(inside.handle))
        await asyncio.sleep(0)
        os.kill(pid, 9)
        assert await ended == ExitStatus(signal=9)


async def test_a_log_each(bench: ContainerBench) -> None:
    talker = Container("talker", command=("sh", "-c", f"{SAY} >&2; exec sleep 1000"))
    async with bench.running(make_app(name="logs", containers=(talker,))) as inside:
        log = log_of(inside.spec.log, "talker")
        await wait_until_said(replace(inside.spec, log=log))
        assert log.name == "talker.log" and log.parent == inside.spec.log.parent


async def test_recovered_by_another_agent(bench: ContainerBench) -> None:
    async with bench.running(make_app(name="kept", containers=(SLEEPER,))) as inside:
        again = bench.restarted()
        assert isinstance(again, Pods)
        found = await again.recover(inside.spec, inside.handle)
        assert found is not None
        assert {name: part.data["pid"] for name, part in split(found).items()} == {
            name: part.data["pid"] for name, part in split(inside.handle).items()
        }
