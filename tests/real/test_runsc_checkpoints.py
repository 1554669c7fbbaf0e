"""Checkpoints of sandboxes: what a copy has of its own, what goes on in it, and what is refused."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.real.cloning import PipedSpawner, clone, ground, host, no_hybrid, said, wait_said

from tabane.clock import SYSTEM
from tabane.errors import Conflict, EngineError, Unsupported
from tabane.model import App, InstanceId, Resources
from tabane.runtimes import load, mounts
from tabane.runtimes.api import Execution, Handle, Image, InstanceSpec
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.runsc import engine, saving
from tabane.runtimes.volumes import MOUNTED
from tabane.testing.checkpoints import counted, counting, place, wait_counted
from tabane.testing.container_bench import ContainerBench, make_app
from tabane.testing.containers import make_instance
from tabane.testing.drivers import until
from tabane.testing.talks import run_inside

__all__ = ["ground", "host", "no_hybrid"]
pytestmark = pytest.mark.real

RESOURCES = Resources(cpu=2.0, memory_bytes=128 << 20, pids=32, disk_bytes=8 << 20)
PROGRAM = """
import json, os, socket, threading, time
listener = socket.create_server(("0.0.0.0", 8000))
open("/tmp/kept", "w").write("kept")
kept = open("/tmp/kept")
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
count = 0
while True:
    count += 1
    epoch = ""
    if os.path.exists("/run/tabane/epoch"):
        epoch = open("/run/tabane/epoch").read().strip()
    kept.seek(0)
    print(json.dumps({
        "count": count, "epoch": epoch, "host": socket.gethostname(), "wall": time.time(),
        "monotonic": time.monotonic(), "kept": kept.read(), "threads": threading.active_count(),
        "hosts": open("/etc/hosts").read(), "listens": listener.getsockname()[1],
    }), flush=True)
    time.sleep(0.02)
"""


@pytest.fixture
async def bench(ground: Path, host: Image) -> AsyncIterator[ContainerBench]:
    spawner = PipedSpawner()
    driver = load("runsc", spawner, ground / "runsc")
    yield ContainerBench(driver, spawner, ground, host)
    driver.close()  # type: ignore[attr-defined]
    await spawner.aclose()


def program(**fields: Any) -> App:
    command = ("/usr/bin/python3", "-c", PROGRAM)
    return make_app(command, name="subject", resources=RESOURCES, **fields)


async def test_each_copy_is_an_instance_of_its_own(bench: ContainerBench) -> None:
    app = program()
    with place() as images:
        async with bench.running(app) as origin:
            before = (await wait_said(origin.spec, 3))[-1]
            assert before["epoch"] == ""
            await bench.driver.checkpoint(origin.handle, images, leave_running=False)
            last = said(origin.spec)[-1]
        async with clone(bench, app, images) as one, clone(bench, app, images) as two:
            for spec, _ in (one, two):
                first = (await wait_said(spec, 3))[0]
                assert first["count"] == last["count"] + 1
                assert first["host"] == last["host"]  # as docs/drivers/runsc.md says
                assert spec.link is not None and spec.link.address in first["hosts"]
                assert abs(first["wall"] - SYSTEM.wall()) < 60
                assert 0 <= first["monotonic"] - last["monotonic"] < 60
                for name in ("kept", "threads", "listens"):
                    assert first[name] == last[name], name
            epochs = {uuid.UUID(said(spec)[-1]["epoch"]) for spec, _ in (one, two)}
            assert len(epochs) == 2
            await run_inside(bench.driver, one[1], ("sh", "-c", "echo changed >/tmp/kept"))
            assert (await run_inside(bench.driver, two[1], ("cat", "/tmp/kept"))).stdout == b"kept"
            await until(lambda: is_said(one[0], "kept", "changed\n"))
            assert said(two[0])[-1]["kept"] == "kept"


async def is_said(spec: InstanceSpec, name: str, value: str) -> bool:
    return bool(said(spec)[-1][name] == value)


async def test_what_is_frozen_does_nothing_more_than_its_copy_knows(bench: ContainerBench) -> None:
    with place() as images:
        async with counting(bench) as (spec, handle):
            await bench.driver.freeze(handle)
            await bench.driver.checkpoint(handle, images, leave_running=True)
            assert Cgroup(spec.cgroup).is_frozen()
            at_rest = counted(spec)[-1]
            async with make_instance(bench.ground, bench.image, spec.app) as copy:
                made = await bench.driver.prepare(copy)
                try:
                    await bench.driver.restore(copy, made, images)
                    assert (await wait_counted(copy, at_rest + 1))[0] == at_rest + 1
                finally:
                    await bench.driver.destroy(made)
            await bench.driver.thaw(handle)
            assert (await wait_counted(spec, at_rest + 2))[-2:] == [at_rest + 1, at_rest + 2]


async def test_an_agent_that_is_killed_in_the_middle_leaves_none_paused(
    bench: ContainerBench,
) -> None:
    async with counting(bench) as (spec, handle):
        await saving.Pause(bench.driver._ask, handle).begin()  # type: ignore[attr-defined]
        again = bench.restarted()
        found = await again.recover(spec, handle)
        assert found is not None
        await wait_counted(spec, counted(spec)[-1] + 2)
        assert not (spec.directory / saving.PAUSED).exists()


async def test_an_engine_that_fails_leaves_it_running(
    bench: ContainerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(argv: tuple[str, ...], timeout_s: float | None) -> str:
        if "checkpoint" in argv:
            raise EngineError("runsc failed: told to", argv=argv, status=1)
        return await ask(argv, timeout_s)

    ask = engine.ask
    monkeypatch.setattr(engine, "ask", fail)
    with place() as images:
        async with counting(bench) as (spec, handle):
            with pytest.raises(EngineError, match="told to"):
                await bench.driver.checkpoint(handle, images, leave_running=True)
            await wait_counted(spec, counted(spec)[-1] + 2)


async def test_a_command_inside_is_in_the_way(bench: ContainerBench) -> None:
    with place() as images:
        async with counting(bench) as (spec, handle):
            command = await bench.driver.exec(handle, Execution(("sleep", "1000")))
            try:
                with pytest.raises(Conflict, match="a command runs inside"):
                    await bench.driver.checkpoint(handle, images, leave_running=True)
            finally:
                await command.aclose()
            await wait_counted(spec, counted(spec)[-1] + 2)
            await bench.driver.checkpoint(handle, images, leave_running=True)


def test_sockets_of_the_node_volumes_and_pods_are_refused(tmp_path: Path) -> None:
    data = {"services": True, "directory": str(tmp_path)}
    handle = Handle("runsc", 1, InstanceId("i"), data)
    with pytest.raises(Unsupported, match="services"):
        saving.check_possible(handle, 1)
    with pytest.raises(Unsupported, match="several containers"):
        saving.check_possible(handle, 2)
    (tmp_path / MOUNTED / "data").mkdir(parents=True)
    with pytest.raises(Unsupported, match="volumes"):
        saving.check_possible(handle, 1)


FILLED = """
import os, time
held = [os.urandom(1 << 20) for _ in range(100)]
count = 0
while True:
    count += 1
    print(count, flush=True)
    time.sleep(0.02)
"""


async def test_the_image_is_not_taken_from_the_programs_memory(bench: ContainerBench) -> None:
    """Nor does it count as such afterwards."""
    small = Resources(cpu=2.0, memory_bytes=128 << 20, pids=32, disk_bytes=4 << 20)
    app = make_app(("/usr/bin/python3", "-c", FILLED), name="filled", resources=small)
    with in_memory() as images:
        async with bench.running(app) as filled:
            await wait_counted(filled.spec, 5)
            cgroup = Cgroup(filled.spec.cgroup)
            before, limits = cgroup.stats().memory_bytes, cgroup.limits()
            await bench.driver.checkpoint(filled.handle, images, leave_running=True)
            assert sum(path.stat().st_size for path in images.iterdir()) > 100 << 20
            assert cgroup.stats().memory_bytes < before + (16 << 20)
            assert (cgroup.limits(), cgroup.oom_kills()) == (limits, 0)
            await wait_counted(filled.spec, counted(filled.spec)[-1] + 5)
        async with clone(bench, app, images) as (spec, _):
            await wait_counted(spec, 5)


@contextmanager
def in_memory() -> Iterator[Path]:
    """As a node has its checkpoints."""
    with place() as images:
        mounts.mount("tmpfs", images, "size=1g,mode=0700")
        try:
            yield images
        finally:
            mounts.unmount(images)
