"""Engines of containers for tests of checkpoints, with logs as a node has them."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tabane.images import ImageStore
from tabane.model import App
from tabane.runtimes.api import Command, Handle, Image, InstanceSpec
from tabane.testing.container_bench import ContainerBench, open_bench
from tabane.testing.containers import make_instance, open_directory, without_unified
from tabane.testing.drivers import until
from tabane.testing.spawner import PlainSpawner


class PipedSpawner(PlainSpawner):
    """With logs written to pipes, as those that a node's holder keeps."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: list[threading.Thread] = []

    async def spawn(self, command: Command) -> int:
        if command.log is None:
            return await super().spawn(command)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        copy = threading.Thread(target=self._copy, args=(reader, command.log))
        copy.start()
        self._copies.append(copy)
        try:
            return await super().spawn(replace(command, log=Path(f"/proc/self/fd/{writer}")))
        finally:
            os.close(writer)

    def _copy(self, reader: int, log: Path) -> None:
        with os.fdopen(reader, "rb", 0) as source, log.open("ab", 0) as target:
            while data := source.read(4096):
                target.write(data)

    async def aclose(self) -> None:
        await super().aclose()
        for copy in self._copies:
            copy.join()


@pytest.fixture(scope="module", autouse=True)
def no_hybrid() -> Iterator[None]:
    with without_unified():
        yield


@pytest.fixture(scope="module")
def ground() -> Iterator[Path]:
    with open_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def host(ground: Path) -> Image:
    return asyncio.run(ImageStore(ground / "store").prepare("host"))


@pytest.fixture(params=["crun", "runc"])
async def bench(
    request: pytest.FixtureRequest, ground: Path, host: Image
) -> AsyncIterator[ContainerBench]:
    async with open_bench(request.param, PipedSpawner(), ground, host) as bench:
        yield bench


def said(spec: InstanceSpec) -> list[dict[str, Any]]:
    """The whole lines of JSON in its log."""
    text = spec.log.read_text() if spec.log.exists() else ""
    return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]


async def wait_said(spec: InstanceSpec, least: int = 1) -> list[dict[str, Any]]:
    async def enough() -> bool:
        return len(said(spec)) >= least

    await until(enough)
    return said(spec)


@asynccontextmanager
async def clone(
    bench: ContainerBench, app: App, images: Path
) -> AsyncIterator[tuple[InstanceSpec, Handle]]:
    """A copy that begins from a checkpoint, and leaves nothing."""
    async with make_instance(bench.ground, bench.image, app) as spec:
        handle = await bench.driver.prepare(spec)
        try:
            yield spec, await bench.driver.restore(spec, handle, images)
        finally:
            await bench.driver.destroy(handle)
        assert bench.left_of(spec) == []
