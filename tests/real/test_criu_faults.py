"""What goes wrong with checkpoints of containers harms nobody, leaves nothing and says why."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
from tests.real.cloning import bench, ground, host, no_hybrid

from tabane.errors import Corrupt, EngineError
from tabane.runtimes import load
from tabane.runtimes.api import Handle
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.criu import dump, engine, trial
from tabane.runtimes.criu.driver import CriuDriver
from tabane.runtimes.registry import probe_whole
from tabane.testing.checkpoints import counted, counting, place, restored, wait_counted
from tabane.testing.container_bench import ContainerBench
from tabane.testing.drivers import Behaviour, prepared, refused, until
from tabane.testing.spawner import PlainSpawner

__all__ = ["bench", "ground", "host", "no_hybrid"]
pytestmark = pytest.mark.real


AT_ONCE, AMONG_MEMORY, AMONG_PROGRAMS = 1, 3, 5


@pytest.mark.parametrize("fault", [AT_ONCE, AMONG_MEMORY, AMONG_PROGRAMS])
async def test_a_dump_that_breaks_off_harms_nobody(
    bench: ContainerBench, monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    """CRIU's own injected faults: at once, among the memory, before it speaks with the program."""
    monkeypatch.setenv("CRIU_FAULT", str(fault))
    with place() as images:
        async with counting(bench) as (spec, handle):
            with pytest.raises(EngineError, match="could not be checkpointed"):
                await bench.driver.checkpoint(handle, images, leave_running=True)
            await wait_counted(spec, counted(spec)[-1] + 3)
            if fault == AMONG_PROGRAMS:
                return
            monkeypatch.delenv("CRIU_FAULT")
            shutil.rmtree(images)
            images.mkdir(mode=0o700)
            await bench.driver.checkpoint(handle, images, leave_running=True)
        async with restored(bench, images) as (spec, _):
            await wait_counted(spec, 1)


async def test_criu_is_killed_in_the_middle_of_a_dump(bench: ContainerBench) -> None:
    """The instance goes on, or ends with a reason: CRIU had its own code run in it."""
    with place() as images:
        async with counting(bench) as (spec, handle):
            dumping = asyncio.ensure_future(
                bench.driver.checkpoint(handle, images, leave_running=True)
            )

            async def has_begun() -> bool:
                return dumping.done() or any(images.glob("pages-*.img"))

            await until(has_begun)
            assert await bench.spawner.signal(dump.key_of(handle.id), signal.SIGKILL)
            with pytest.raises(EngineError, match=r"killed|signal"):
                await dumping
            assert not Cgroup(spec.cgroup).is_frozen()
            ended = asyncio.ensure_future(bench.driver.wait(handle))
            goes_on = asyncio.ensure_future(wait_counted(spec, counted(spec)[-1] + 3))
            await asyncio.wait([ended, goes_on], return_when=asyncio.FIRST_COMPLETED)
            assert goes_on.done() or ended.result().describe()
            for each in (ended, goes_on):
                each.cancel()
            await asyncio.wait([ended, goes_on])


async def test_the_agent_ends_in_the_middle_of_a_dump(bench: ContainerBench) -> None:
    """The next one waits for what the last has begun; then the instance goes on."""
    with place() as images:
        async with counting(bench) as (spec, handle):
            dumping = asyncio.ensure_future(
                bench.driver.checkpoint(handle, images, leave_running=True)
            )

            async def has_begun() -> bool:
                return dumping.done() or any(images.glob("*.img"))

            await until(has_begun)
            found = await bench.restarted().recover(spec, handle)
            assert found is not None and found.data["pid"] == handle.data["pid"]
            assert not Cgroup(spec.cgroup).is_frozen()
            await wait_counted(spec, counted(spec)[-1] + 3)
            dumping.cancel()
            await asyncio.wait([dumping])
            await wait_counted(spec, counted(spec)[-1] + 3)


async def test_criu_is_killed_in_the_middle_of_a_restore(bench: ContainerBench) -> None:
    with place() as images:
        async with counting(bench) as (_, handle):
            await bench.driver.checkpoint(handle, images, leave_running=False)
        async with prepared(bench, Behaviour.COUNTS) as (spec, handle):
            restoring = asyncio.ensure_future(bench.driver.restore(spec, handle, images))

            async def has_begun() -> bool:
                return restoring.done() or len(Cgroup(spec.cgroup).pids()) > 2

            await until(has_begun)
            for pid in Cgroup(spec.cgroup).pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with pytest.raises(EngineError, match="could not be restored"):
                await restoring


async def test_what_is_not_of_this_format_is_refused(bench: ContainerBench) -> None:
    with place() as images:
        async with counting(bench) as (_, handle):
            await bench.driver.checkpoint(handle, images, leave_running=False)
        record = images / "restore.json"
        whole = json.loads(record.read_text())
        for text, problem in (
            (json.dumps(whole | {"format": 7}), "format 7"),
            ("{", "no whole checkpoint"),
        ):
            record.write_text(text)
            async with prepared(bench, Behaviour.COUNTS) as (spec, handle):
                with pytest.raises(Corrupt, match=problem):
                    await bench.driver.restore(spec, handle, images)


async def test_changed_images_are_not_restored(bench: ContainerBench) -> None:
    """Of the same size, but other words: CRIU says what it does not understand."""
    with place() as images:
        async with counting(bench) as (_, handle):
            await bench.driver.checkpoint(handle, images, leave_running=False)
        for name in ("pstree.img", "mm-1.img", "core-1.img", "mountpoints-*.img"):
            path = next(images.glob(name))
            kept = path.read_bytes()
            path.chmod(0o600)
            path.write_bytes(kept[:12] + b"\xff" * (len(kept) - 12))
            async with prepared(bench, Behaviour.COUNTS) as (spec, handle):
                with pytest.raises(EngineError, match="could not be restored"):
                    await bench.driver.restore(spec, handle, images)
            path.chmod(0o600)
            path.write_bytes(kept)
        async with restored(bench, images) as (spec, _):
            await wait_counted(spec, 1)


async def test_what_worked_is_not_tried_again(
    bench: ContainerBench, ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By any node, until an engine has another version or the machine is started again."""
    monkeypatch.setattr(trial, "MARKS", tmp_path)
    (tmp_path / "another-boot-criu-4.2.1-crun").touch()
    assert (await probe_whole(bench.driver)).detail == f"checkpoints by CRIU {criu_version()}"
    (mark,) = tmp_path.iterdir()
    again = load(bench.driver.name, bench.spawner, ground / f"again-{uuid.uuid4().hex[:6]}")
    assert isinstance(again, CriuDriver)

    async def fail(*given: object, **named: object) -> None:
        raise EngineError("a checkpoint is tried")

    monkeypatch.setattr(again, "checkpoint", fail)
    assert (await probe_whole(again)).versions["criu"] == criu_version()
    mark.unlink()
    once_more = load(bench.driver.name, bench.spawner, ground / f"more-{uuid.uuid4().hex[:6]}")
    assert isinstance(once_more, CriuDriver)
    monkeypatch.setattr(once_more, "checkpoint", fail)
    probe = await probe_whole(once_more)
    assert probe.detail == "no checkpoints: a trial failed: a checkpoint is tried"
    assert list(tmp_path.iterdir()) == []
    for driver in (again, once_more):
        driver.close()


def criu_version() -> str:
    return engine.find_criu().version


async def test_without_criu_there_are_no_checkpoints(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "OWN", tmp_path / "nothing")
    spawner = PlainSpawner()
    driver = load("crun", spawner, ground / "without")
    assert isinstance(driver, CriuDriver)
    probe = await probe_whole(driver)
    assert probe.works and probe.versions == {}
    assert probe.detail.startswith("no checkpoints: CRIU is not installed")
    assert not driver.capabilities.checkpoint and not driver.capabilities.restore
    handle = Handle("crun", 1, "aaaaaaaaaaaa", {"pid": 0, "pid_start": 0})
    await refused(driver.checkpoint(handle, tmp_path, leave_running=True))
    driver.close()
    await spawner.aclose()


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ('echo "Version: 3.17.1"', "CRIU 3.17.1 is too old"),
        (
            '[ "$1" = --version ] && echo "Version: 99.1" && exit; '
            'echo "Error (criu/kerndat.c:5): no such kernel"; exit 1',
            "CRIU 99.1 cannot work with this kernel: no such kernel",
        ),
    ],
)
async def test_a_criu_that_does_not_work_says_why(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, problem: str
) -> None:
    monkeypatch.setattr(engine, "OWN", tmp_path / "nothing")
    program = tmp_path / "criu"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    spawner = PlainSpawner()
    driver = load("runc", spawner, ground / f"broken-{uuid.uuid4().hex[:6]}")
    assert isinstance(driver, CriuDriver)
    probe = await probe_whole(driver)
    assert probe.works
    assert problem in probe.detail
    assert not driver.capabilities.checkpoint
    driver.close()
    await spawner.aclose()
