"""A bench for the conformance suite, and for tests of what containers are like, by any engine that
runs the test image (`make_tree`)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from tabane.model import App, ExitStatus
from tabane.runtimes import load
from tabane.runtimes.api import Driver, Handle, Image, InstanceSpec
from tabane.testing.containers import ID_BASE, SMALL, find_left, make_instance
from tabane.testing.drivers import SAID, Behaviour
from tabane.testing.spawner import PlainSpawner
from tabane.testing.talks import run_inside

SAY = f"echo {SAID.decode()}"
COMMANDS = {
    Behaviour.WAITS: ("sleep", "1000"),
    Behaviour.SAYS: ("sh", "-c", SAY),
    Behaviour.EXITS: ("sh", "-c", "exit 3"),
    Behaviour.STAYS: ("sh", "-c", f"trap '' TERM; {SAY}; sleep 1000"),
    Behaviour.EATS: ("dd", "if=/dev/zero", "of=/dev/null", "bs=256M"),
    Behaviour.BREAKS: ("true",),
}


def make_app(command: tuple[str, ...] = (), *, name: str = "app", **fields: object) -> App:
    app = App(name=name, image="test", command=command, resources=SMALL, id_base=ID_BASE)
    return replace(app, **fields)


@dataclass
class Running:
    """A container that runs."""

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


@dataclass
class ContainerBench:
    """`ground`: a directory for instances and, below it, for what drivers share."""

    driver: Driver
    spawner: PlainSpawner
    ground: Path
    image: Image

    def restarted(self) -> Driver:
        return load(self.driver.name, self.spawner, self.ground / self.driver.name)

    @asynccontextmanager
    async def instance(self, behaviour: Behaviour) -> AsyncIterator[InstanceSpec]:
        workdir = "/bin/busybox" if behaviour is Behaviour.BREAKS else ""
        app = make_app(COMMANDS[behaviour], name=behaviour, workdir=workdir)
        async with make_instance(self.ground, self.image, app) as spec:
            yield spec

    def left_of(self, spec: InstanceSpec) -> list[str]:
        state = self.ground / self.driver.name / "state" / spec.id
        return find_left(spec) + ([str(state)] if state.exists() else [])

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
