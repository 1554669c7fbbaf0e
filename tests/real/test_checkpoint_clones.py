"""Checkpoints all the way: a container is dumped, sealed, opened in another life of the store, and
clones go on from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from msgspec.structs import replace
from tests.real.cloning import bench, ground, host, no_hybrid

from tabane.images.checkpoint import CheckpointStore, Stored
from tabane.model import App, Resources
from tabane.node.checkpoints import mount_memory
from tabane.runtimes import mounts
from tabane.runtimes.api import Handle, InstanceSpec
from tabane.testing.container_bench import ContainerBench, make_app
from tabane.testing.containers import make_instance
from tabane.testing.drivers import until
from tabane.testing.dumps import about, cool, make_store, read_tree

__all__ = ["bench", "ground", "host", "no_hybrid"]

pytestmark = pytest.mark.real

SECRET = "a secret that the program has decided on"
PROGRAM = f"""
import itertools, time
secret = " ".join({SECRET.split()!r})
for count in itertools.count():
    print(count, secret, flush=True)
    time.sleep(0.02)
"""
RESOURCES = Resources(cpu=1.0, memory_bytes=128 << 20, pids=32, disk_bytes=4 << 20)


@pytest.fixture
def place(ground: Path) -> Iterator[Path]:
    """Of a store, with its memory mounted as a node does."""
    directory = ground / "checkpoints"
    directory.mkdir()
    mount_memory(directory / "memory", 256 << 20)
    yield directory
    while mounts.unmount(directory / "memory"):
        pass
    mounts.remove_tree(directory)


def counted(spec: InstanceSpec) -> list[int]:
    text = spec.log.read_text() if spec.log.exists() else ""
    return [int(line.split()[0]) for line in text.rpartition("\n")[0].splitlines()]


async def wait_counted(spec: InstanceSpec, least: int) -> list[int]:
    async def enough() -> bool:
        return bool(found := counted(spec)) and found[-1] >= least

    await until(enough)
    return counted(spec)


async def begin(
    stack: AsyncExitStack, bench: ContainerBench, app: App, images: Path
) -> tuple[InstanceSpec, Handle]:
    spec = await stack.enter_async_context(make_instance(bench.ground, bench.image, app))
    handle = await bench.driver.prepare(spec)
    stack.push_async_callback(bench.driver.destroy, handle)
    return spec, await bench.driver.restore(spec, handle, images)


async def make(store: CheckpointStore, bench: ContainerBench, app: App) -> tuple[Stored, int]:
    """A checkpoint, and how far its program had counted."""
    what = about(driver=bench.driver.name, id_base=app.id_base)
    async with bench.running(app) as origin, store.dump(app.id_base, 64 << 20) as dump:
        await wait_counted(origin.spec, 3)
        await bench.driver.checkpoint(origin.handle, dump.directory, leave_running=False)
        return await dump.keep(what), counted(origin.spec)[-1]


async def test_clones_of_what_was_sealed(bench: ContainerBench, place: Path) -> None:
    app = make_app(("/usr/bin/python3", "-c", PROGRAM), name="counter", resources=RESOURCES)
    store = make_store(place)
    await store.load()
    stored, last = await make(store, bench, app)
    async with await store.open(stored.digest) as directory:
        dumped = read_tree(directory)
        assert any(SECRET.encode() in data for data in dumped.values()), "it is in its memory"
    sealed = [path.read_bytes() for path in (place / "disk").rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in data for data in sealed)
    assert sum(map(len, sealed)) < stored.bytes / 2

    again = make_store(place)
    await again.load()
    assert [replace(one, used_at=0.0) for one in again.all()] == [replace(stored, used_at=0.0)]
    async with AsyncExitStack() as stack, await again.open(stored.digest) as directory:
        assert read_tree(directory) == dumped
        for _ in range(3):
            spec, handle = await begin(stack, bench, app, directory)
            numbers = await wait_counted(spec, last + 3)
            assert numbers[0] == last + 1 and handle.id == spec.id
        assert read_tree(directory) == dumped, "clones change nothing of it"
    await cool(again, stored.digest)
    assert await again.remove(stored.digest) > 0
