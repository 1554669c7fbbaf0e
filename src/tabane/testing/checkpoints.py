"""What every `Driver` with `Capabilities.checkpoint` and `restore` must do, beside the checks of
`tabane.testing.drivers`. Those that are told to count (`Behaviour.COUNTS`) show by it that they go
on from where they were."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from tabane.errors import Corrupt, EngineError, Unsupported
from tabane.model import ExitStatus
from tabane.runtimes.api import Handle, InstanceSpec
from tabane.testing.drivers import (
    DRIVER_CHECKS,
    PATIENCE_S,
    Behaviour,
    Check,
    DriverBench,
    prepared,
    refused,
    started,
    until,
)

ENOUGH = 5
"""Who has counted so far was not just started."""


@contextmanager
def place() -> Iterator[Path]:
    """For a checkpoint: of root's alone, below what others may enter."""
    with tempfile.TemporaryDirectory(prefix="tabane-test-checkpoint-") as directory:
        Path(directory).chmod(0o711)
        images = Path(directory) / "images"
        images.mkdir(mode=0o700)
        yield images


def counted(spec: InstanceSpec) -> list[int]:
    """The numbers in its log, whole lines only; a line may have a time before it."""
    text = spec.log.read_text() if spec.log.exists() else ""
    lines = text.rpartition("\n")[0].splitlines()
    return [int(line.split()[-1]) for line in lines]


async def wait_counted(spec: InstanceSpec, least: int) -> list[int]:
    async def enough() -> bool:
        return bool(found := counted(spec)) and found[-1] >= least

    await until(enough)
    return counted(spec)


@asynccontextmanager
async def counting(bench: DriverBench) -> AsyncIterator[tuple[InstanceSpec, Handle]]:
    async with started(bench, Behaviour.COUNTS) as (spec, handle):
        await wait_counted(spec, ENOUGH)
        yield spec, handle


@asynccontextmanager
async def restored(bench: DriverBench, images: Path) -> AsyncIterator[tuple[InstanceSpec, Handle]]:
    """A clone that runs; nothing may be left of it."""
    async with prepared(bench, Behaviour.COUNTS) as (spec, handle):
        yield spec, await bench.driver.restore(spec, handle, images)


def is_able(bench: DriverBench) -> bool:
    able = bench.driver.capabilities
    assert able.checkpoint == able.restore
    return able.checkpoint


async def check_clones(bench: DriverBench) -> None:
    """Several go on at the same time from one checkpoint, and what it was made of goes on, too;
    each ends for itself."""
    if not is_able(bench):
        return
    with place() as images:
        async with counting(bench) as (spec, handle):
            await bench.driver.checkpoint(handle, images, leave_running=True)
            last = counted(spec)[-1]
            async with restored(bench, images) as one, restored(bench, images) as two:
                for clone, running in (one, two):
                    numbers = await wait_counted(clone, last + ENOUGH)
                    assert numbers[0] > 1
                    assert numbers == [*range(numbers[0], numbers[-1] + 1)]
                    assert running.id == clone.id != spec.id
                pids = {one[1].data["pid"], two[1].data["pid"], handle.data["pid"]}
                assert len(pids) == 3
                await bench.driver.stop(one[1], PATIENCE_S)
                assert await bench.driver.wait(one[1]) == ExitStatus(signal=signal.SIGTERM)
                await wait_counted(two[0], counted(two[0])[-1] + ENOUGH)
            await wait_counted(spec, counted(spec)[-1] + ENOUGH)


async def check_checkpoint_ends(bench: DriverBench) -> None:
    """Without `leave_running` it has ended; what goes on later begins there, not where it was when
    somebody last looked."""
    if not is_able(bench):
        return
    with place() as images:
        async with counting(bench) as (spec, handle):
            await bench.driver.checkpoint(handle, images, leave_running=False)
            await bench.driver.wait(handle)
            last = counted(spec)[-1]
            assert await bench.driver.processes(handle) == []
        async with restored(bench, images) as (clone, _):
            assert (await wait_counted(clone, last + ENOUGH))[0] == last + 1


async def check_checkpoint_frozen(bench: DriverBench) -> None:
    """What is frozen can be checkpointed, and is frozen afterwards."""
    driver = bench.driver
    if not is_able(bench) or not driver.capabilities.freeze:
        return
    with place() as images:
        async with counting(bench) as (spec, handle):
            await driver.freeze(handle)
            await driver.checkpoint(handle, images, leave_running=True)
            before = counted(spec)
            async with restored(bench, images) as (clone, _):
                await wait_counted(clone, before[-1] + ENOUGH)
            assert counted(spec) == before
            await driver.thaw(handle)
            await wait_counted(spec, before[-1] + ENOUGH)


async def check_checkpoint_of_clone(bench: DriverBench) -> None:
    """What was restored can be checkpointed itself."""
    if not is_able(bench):
        return
    with place() as images, place() as again:
        async with counting(bench) as (_, handle):
            await bench.driver.checkpoint(handle, images, leave_running=False)
        async with restored(bench, images) as (clone, handle):
            last = (await wait_counted(clone, counted(clone)[0] if counted(clone) else 1))[-1]
            await bench.driver.checkpoint(handle, again, leave_running=False)
        async with restored(bench, again) as (clone, _):
            assert (await wait_counted(clone, last + ENOUGH))[0] >= last


async def check_restored_recovers(bench: DriverBench) -> None:
    """After a restart of the agent a clone is found, and led to its end, also if the agent ended
    before it wrote down that the restore was done."""
    if not is_able(bench):
        return
    with place() as images:
        async with counting(bench) as (_, handle):
            await bench.driver.checkpoint(handle, images, leave_running=False)
        async with prepared(bench, Behaviour.COUNTS) as (spec, before):
            done = await bench.driver.restore(spec, before, images)
            for known in (before, done):
                again = bench.restarted()
                found = await again.recover(spec, known)
                assert found is not None and found.data["pid"] == done.data["pid"]
            await again.stop(done, PATIENCE_S)
            assert await again.wait(done) == ExitStatus(signal=signal.SIGTERM)


async def check_broken_checkpoint(bench: DriverBench) -> None:
    """What is not whole is not restored, and leaves nothing: any of its files cut off or gone."""
    if not is_able(bench):
        return
    with place() as images:
        async with counting(bench) as (_, handle):
            await bench.driver.checkpoint(handle, images, leave_running=False)
        largest = max(images.iterdir(), key=lambda path: path.stat().st_size)
        whole = largest.read_bytes()
        largest.write_bytes(whole[: len(whole) // 3])
        await _refuse_restore(bench, images)
        largest.unlink()
        await _refuse_restore(bench, images)
        for path in images.iterdir():
            path.unlink()
        await _refuse_restore(bench, images)


async def _refuse_restore(bench: DriverBench, images: Path) -> None:
    async with prepared(bench, Behaviour.COUNTS) as (spec, handle):
        try:
            await bench.driver.restore(spec, handle, images)
        except (Corrupt, EngineError) as problem:
            assert problem.message
        else:
            raise AssertionError("a checkpoint that is not whole was restored")


async def check_no_room(bench: DriverBench) -> None:
    """Where there is no room for it, a checkpoint fails and says so, and the instance goes on."""
    if not is_able(bench):
        return
    from tabane.runtimes import mounts

    with place() as images:
        mounts.mount("tmpfs", images, "size=32k")
        try:
            async with counting(bench) as (spec, handle):
                try:
                    await bench.driver.checkpoint(handle, images, leave_running=True)
                except EngineError as problem:
                    assert problem.message
                else:
                    raise AssertionError("a checkpoint had no room and was made")
                await wait_counted(spec, counted(spec)[-1] + ENOUGH)
        finally:
            mounts.unmount(images)


async def check_cancelled_restore(bench: DriverBench) -> None:
    """A restore that is given up at any point leaves nothing after `destroy`."""
    if not is_able(bench):
        return
    with place() as images:
        async with counting(bench) as (_, handle):
            await bench.driver.checkpoint(handle, images, leave_running=False)
        for turns in (0, 1, 3, 6):
            async with prepared(bench, Behaviour.COUNTS) as (spec, handle):
                restore = asyncio.ensure_future(bench.driver.restore(spec, handle, images))
                for _ in range(turns):
                    await asyncio.sleep(0)
                restore.cancel()
                with suppress(asyncio.CancelledError):
                    await restore


async def check_checkpoint_unable(bench: DriverBench) -> None:
    """Who has ended cannot be checkpointed, nor can anything by a driver that is not able."""
    async with started(bench, Behaviour.EXITS) as (_, handle):
        await bench.driver.wait(handle)
        able = is_able(bench)
        with place() as images:
            verb = bench.driver.checkpoint(handle, images, leave_running=True)
            await refused(verb, Exception if able else Unsupported)
            assert [*images.iterdir()] == []


CHECKPOINT_CHECKS: tuple[Check, ...] = (
    check_clones,
    check_checkpoint_ends,
    check_checkpoint_frozen,
    check_checkpoint_of_clone,
    check_restored_recovers,
    check_broken_checkpoint,
    check_no_room,
    check_cancelled_restore,
    check_checkpoint_unable,
)


async def check_driver(bench: DriverBench) -> None:
    """Run every check there is."""
    for check in DRIVER_CHECKS + CHECKPOINT_CHECKS:
        await check(bench)
