"""gVisor's sandboxes keep to the interface, and are confined as the table says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec.structs import replace

from tabane.model import App, ExitStatus
from tabane.runtimes import load
from tabane.runtimes.api import Driver, Handle, Image, InstanceSpec
from tabane.runtimes.runsc.driver import RunscDriver
from tabane.testing.containers import (
    ID_BASE,
    SMALL,
    find_left,
    make_instance,
    make_tree,
    open_directory,
)
from tabane.testing.drivers import DRIVER_CHECKS, SAID, Behaviour, Check
from tabane.testing.spawner import PlainSpawner
from tabane.testing.talks import run_inside

pytestmark = pytest.mark.real

SAY = f"echo {SAID.decode()}"
COMMANDS = {
    Behaviour.WAITS: ("sleep", "1000"),
    Behaviour.SAYS: ("sh", "-c", SAY),
    Behaviour.EXITS: ("sh", "-c", "exit 3"),
    Behaviour.STAYS: ("sh", "-c", f"trap '' TERM; {SAY}; sleep 1000"),
    Behaviour.EATS: ("dd", "if=/dev/zero", "of=/dev/null", "bs=256M"),
    Behaviour.BREAKS: ("true",),
}


@pytest.fixture(scope="module")
def ground() -> Iterator[Path]:
    with open_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def image(ground: Path) -> Image:
    return make_tree(ground)


@dataclass
class RunscBench:
    driver: Driver
    spawner: PlainSpawner
    ground: Path
    image: Image

    def restarted(self) -> Driver:
        return load("runsc", self.spawner, self.ground / "runsc")

    @asynccontextmanager
    async def instance(self, behaviour: Behaviour) -> AsyncIterator[InstanceSpec]:
        workdir = "/bin/busybox" if behaviour is Behaviour.BREAKS else ""
        app = make_app(COMMANDS[behaviour], name=behaviour, workdir=workdir)
        async with make_instance(self.ground, self.image, app) as spec:
            yield spec

    def left_of(self, spec: InstanceSpec) -> list[str]:
        return find_left(spec)

    @asynccontextmanager
    async def running(self, app: App, image: Image | None = None) -> AsyncIterator[Running]:
        """A container of `app` (of the test image, unless told), which must leave nothing."""
        async with make_instance(self.ground, image or self.image, app) as spec:
            handle = await self.driver.prepare(spec)
            try:
                handle = await self.driver.start(spec, handle)
                yield Running(self.driver, spec, handle)
            finally:
                await self.driver.destroy(handle)
            assert self.left_of(spec) == []


@dataclass
class Running:
    driver: Driver
    spec: InstanceSpec
    handle: Handle

    async def run(self, script: str) -> str:
        """The output of a shell script inside; whatever it writes to stderr, too."""
        argv = ("/bin/sh", "-c", f"exec 2>&1; {script}")
        return (await run_inside(self.driver, self.handle, argv)).stdout.decode()

    async def end(self) -> tuple[ExitStatus, str]:
        status = await self.driver.wait(self.handle)
        return status, self.spec.log.read_text()


def make_app(command: tuple[str, ...] = (), *, name: str = "app", **fields: object) -> App:
    app = App(name=name, image="test", command=command, resources=SMALL, id_base=ID_BASE)
    return replace(app, **fields)


@pytest.fixture
async def bench(ground: Path, image: Image) -> AsyncIterator[RunscBench]:
    spawner = PlainSpawner()
    driver = load("runsc", spawner, ground / "runsc")
    assert isinstance(driver, RunscDriver)
    yield RunscBench(driver, spawner, ground, image)
    driver.close()
    await spawner.aclose()


@pytest.mark.parametrize("check", DRIVER_CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check: Check, bench: RunscBench) -> None:
    await check(bench)
