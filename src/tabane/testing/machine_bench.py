"""A bench for machines: instances of the test image with a wire, by either of QEMU's drivers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from msgspec.structs import replace

from tabane.model import App, Container, ExitStatus
from tabane.runtimes import load
from tabane.runtimes.api import Driver, Handle, Image, InstanceSpec, User
from tabane.runtimes.qemu.driver import QemuDriver
from tabane.testing.containers import ID_BASE, SMALL, find_left
from tabane.testing.drivers import SAID, Behaviour
from tabane.testing.machines import make_machine
from tabane.testing.pods import FIRST, SECOND, with_sidecars
from tabane.testing.spawner import PlainSpawner
from tabane.testing.talks import run_inside

SAY = f"echo {SAID.decode()}"
COMMANDS = {
    Behaviour.WAITS: ("sleep", "1000"),
    Behaviour.SAYS: ("sh", "-c", SAY),
    Behaviour.EXITS: ("sh", "-c", "exit 3"),
    Behaviour.STAYS: ("sh", "-c", f"trap '' TERM; {SAY}; sleep 1000"),
    Behaviour.EATS: ("dd", "if=/dev/zero", "of=/dev/null", "bs=128M"),
    Behaviour.BREAKS: ("true",),
    Behaviour.COUNTS: ("sh", "-c", "i=0; while i=$((i+1)); do echo $i; sleep 0.02; done"),
}


def workdir_for(behaviour: Behaviour) -> str:
    """Nobody starts a program in a file."""
    return "/bin/busybox" if behaviour is Behaviour.BREAKS else ""


def make_app(command: tuple[str, ...] = (), *, name: str = "app", **fields: object) -> App:
    app = App(name=name, image="test", command=command, resources=SMALL, id_base=ID_BASE)
    return replace(app, **fields)


@dataclass
class Running:
    """A machine whose program runs."""

    driver: QemuDriver
    spec: InstanceSpec
    handle: Handle

    async def run(self, script: str, user: User | None = None, container: str = "") -> str:
        """The output of a shell script inside; whatever it writes to stderr, too."""
        argv = ("/bin/sh", "-c", f"exec 2>&1; {script}")
        ended = await run_inside(self.driver, self.handle, argv, user=user, container=container)
        return ended.stdout.decode()

    async def end(self) -> tuple[ExitStatus, str]:
        status = await self.driver.wait(self.handle)
        return status, self.spec.log.read_text()


@dataclass
class MachineBench:
    """`ground`: a directory for instances and, below it, for what drivers share. Close it."""

    driver: QemuDriver
    spawner: PlainSpawner
    ground: Path
    image: Image
    again: list[QemuDriver] = field(default_factory=list)

    def restarted(self) -> Driver:
        """The connections of the one before break off, as when an agent is killed."""
        self.driver.abort()
        driver = load(self.driver.name, self.spawner, self.ground / self.driver.name)
        assert isinstance(driver, QemuDriver)
        self.again.append(driver)
        return driver

    @asynccontextmanager
    async def instance(self, behaviour: Behaviour) -> AsyncIterator[InstanceSpec]:
        app = make_app(COMMANDS[behaviour], name=behaviour, workdir=workdir_for(behaviour))
        async with make_machine(self.ground, self.image, app) as spec:
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
        return find_left(spec)

    @asynccontextmanager
    async def prepared(
        self, app: App, image: Image | None = None, beside: Image | None = None
    ) -> AsyncIterator[tuple[InstanceSpec, Handle]]:
        """A machine of `app` (of the test image, unless told), which must leave nothing. `beside`:
        the image of the first container beside the main one."""
        async with make_machine(self.ground, image or self.image, app) as spec:
            spec = with_sidecars(spec, *app.containers)
            if beside is not None:
                first, *others = spec.sidecars
                spec = replace(spec, sidecars=(replace(first, image=beside), *others))
            handle = await self.driver.prepare(spec)
            try:
                yield spec, handle
            finally:
                await self.driver.destroy(handle)
            assert self.left_of(spec) == []

    @asynccontextmanager
    async def running(
        self, app: App, image: Image | None = None, beside: Image | None = None
    ) -> AsyncIterator[Running]:
        async with self.prepared(app, image, beside) as (spec, handle):
            yield Running(self.driver, spec, await self.driver.start(spec, handle))

    async def aclose(self) -> None:
        for driver in (self.driver, *self.again):
            await driver.aclose()
        await self.spawner.aclose()


def make_bench(name: str, ground: Path, image: Image) -> MachineBench:
    spawner = PlainSpawner()
    driver = load(name, spawner, ground / name)
    assert isinstance(driver, QemuDriver)
    return MachineBench(driver, spawner, ground, image)


class KeptDriver:
    """A driver that gives the same running machine to whoever starts one, and keeps it."""

    def __init__(self, inside: Running) -> None:
        self._inside = inside

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inside.driver, name)

    async def prepare(self, spec: InstanceSpec) -> Handle:
        return self._inside.handle

    async def start(self, spec: InstanceSpec, handle: Handle) -> Handle:
        return handle

    async def destroy(self, handle: Handle) -> None:
        """Its owner does that."""


class KeptBench:
    """For checks that need a machine that waits, and leave it so: a boot may take seconds."""

    def __init__(self, inside: Running) -> None:
        self.driver = cast(Driver, KeptDriver(inside))
        self._inside = inside

    def restarted(self) -> Driver:
        raise AssertionError("the machine is kept by this driver")

    @asynccontextmanager
    async def instance(self, behaviour: Behaviour) -> AsyncIterator[InstanceSpec]:
        assert behaviour is Behaviour.WAITS
        yield self._inside.spec

    @asynccontextmanager
    async def pod(self, main: Behaviour, *sidecars: Behaviour) -> AsyncIterator[InstanceSpec]:
        """Whoever wants less gets all that it has."""
        assert {main, *sidecars} == {Behaviour.WAITS}
        yield self._inside.spec

    def left_of(self, spec: InstanceSpec) -> list[str]:
        return []
