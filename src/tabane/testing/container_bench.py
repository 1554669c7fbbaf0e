"""A bench for the conformance suite, and for tests of what containers are like, by any engine that
runs the test image (`make_tree`)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from tabane.model import App, Container, ExitStatus
from tabane.runtimes import load
from tabane.runtimes.api import Driver, Handle, Image, InstanceSpec, Storage
from tabane.runtimes.oci import OciDriver
from tabane.runtimes.pods import Pods, with_pods
from tabane.testing.containers import ID_BASE, SMALL, find_left, make_instance
from tabane.testing.drivers import SAID, Behaviour
from tabane.testing.pods import FIRST, SECOND, with_sidecars
from tabane.testing.spawner import PlainSpawner
from tabane.testing.talks import run_inside

SAY = f"echo {SAID.decode()}"
COUNT = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done"
COMMANDS = {
    Behaviour.COUNTS: ("sh", "-c", COUNT),
    Behaviour.WAITS: ("sleep", "1000"),
    Behaviour.SAYS: ("sh", "-c", SAY),
    Behaviour.EXITS: ("sh", "-c", "exit 3"),
    Behaviour.STAYS: ("sh", "-c", f"trap '' TERM; {SAY}; sleep 1000"),
    Behaviour.EATS: ("dd", "if=/dev/zero", "of=/dev/null", "bs=256M"),
    Behaviour.BREAKS: ("true",),
}


def workdir_for(behaviour: Behaviour) -> str:
    """No engine starts a program in a file."""
    return "/bin/busybox" if behaviour is Behaviour.BREAKS else ""


def make_app(command: tuple[str, ...] = (), *, name: str = "app", **fields: object) -> App:
    app = App(name=name, image="test", command=command, resources=SMALL, id_base=ID_BASE)
    return replace(app, **fields)


class Running(NamedTuple):
    """A container that runs."""

    driver: Driver
    spec: InstanceSpec
    handle: Handle

    async def run(self, script: str, container: str = "") -> str:
        """The output of a shell script inside; whatever it writes to stderr, too."""
        argv = ("/bin/sh", "-c", f"exec 2>&1; {script}")
        ended = await run_inside(self.driver, self.handle, argv, container=container)
        return ended.stdout.decode()

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
        again = load(self.driver.name, self.spawner, self.ground / self.driver.name)
        return with_pods(again) if isinstance(self.driver, Pods) else again

    @asynccontextmanager
    async def instance(self, behaviour: Behaviour) -> AsyncIterator[InstanceSpec]:
        app = make_app(COMMANDS[behaviour], name=behaviour, workdir=workdir_for(behaviour))
        async with make_instance(self.ground, self.image, app) as spec:
            yield spec

    @asynccontextmanager
    async def pod(self, main: Behaviour, *sidecars: Behaviour) -> AsyncIterator[InstanceSpec]:
        async with self.instance(main) as spec:
            containers = [
                Container(name, command=COMMANDS[each], workdir=workdir_for(each))
                for name, each in zip((FIRST, SECOND), sidecars, strict=False)
            ]
            name = "-".join((main, *sidecars))  # one name, one revision, one program
            spec = replace(spec, app=replace(spec.app, name=name))
            yield with_sidecars(spec, *containers)

    def left_of(self, spec: InstanceSpec) -> list[str]:
        state = self.ground / self.driver.name / "state"
        return find_left(spec) + [str(path) for path in state.glob(f"*{spec.id}")]

    @asynccontextmanager
    async def running(
        self, app: App, image: Image | None = None, volumes: tuple[Storage, ...] = ()
    ) -> AsyncIterator[Running]:
        """A container of `app` (of the test image, unless told), which must leave nothing, nor what
        is beside it."""
        async with make_instance(self.ground, image or self.image, app) as spec:
            spec = with_sidecars(replace(spec, volumes=volumes), *app.containers)
            handle = await self.driver.prepare(spec)
            try:
                handle = await self.driver.start(spec, handle)
                yield Running(self.driver, spec, handle)
            finally:
                await self.driver.destroy(handle)
            assert self.left_of(spec) == []


@asynccontextmanager
async def open_bench(
    engine: str, spawner: PlainSpawner, ground: Path, image: Image
) -> AsyncIterator[ContainerBench]:
    """Closed with its driver and spawner."""
    driver = load(engine, spawner, ground / engine)
    assert isinstance(driver, OciDriver)
    yield ContainerBench(driver, spawner, ground, image)
    driver.close()
    await spawner.aclose()
