"""What tests of containerd's drivers need: instances, and ways to kill what keeps them."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from tabane.model import App
from tabane.runtimes import load
from tabane.runtimes.api import Handle, Image, InstanceSpec
from tabane.runtimes.containerd.driver import ContainerdDriver
from tabane.runtimes.containerd.shims import find_shims
from tabane.testing.containers import ID_BASE, SMALL, find_left, make_instance
from tabane.testing.drivers import SAID, Behaviour
from tabane.testing.spawner import PlainSpawner

SAY = f"echo {SAID.decode()}"
COMMANDS = {
    Behaviour.WAITS: ("sleep", "1000"),
    Behaviour.SAYS: ("sh", "-c", SAY),
    Behaviour.EXITS: ("sh", "-c", "exit 3"),
    Behaviour.STAYS: ("sh", "-c", f"trap '' TERM; {SAY}; exec sleep 1000"),
    Behaviour.EATS: ("dd", "if=/dev/zero", "of=/dev/null", "bs=128M"),
    Behaviour.BREAKS: ("true",),
}


@dataclass
class ContainerdBench:
    driver: ContainerdDriver
    spawner: PlainSpawner
    ground: Path
    image: Image

    def __post_init__(self) -> None:
        self.more: list[ContainerdDriver] = []

    def restarted(self) -> ContainerdDriver:
        driver = make_driver(self.spawner, self.ground, self.driver.name)
        self.more.append(driver)
        return driver

    async def aclose(self) -> None:
        for driver in self.more:
            await driver.aclose()
        await self.driver.end()
        await self.spawner.aclose()

    @asynccontextmanager
    async def running(self, app: App) -> AsyncIterator[tuple[InstanceSpec, Handle]]:
        """A container that must leave nothing."""
        async with make_instance(self.ground, self.image, app) as spec:
            handle = await self.driver.prepare(spec)
            try:
                handle = await self.driver.start(spec, handle)
                yield spec, handle
            finally:
                await self.driver.destroy(handle)
            assert self.left_of(spec) == []

    async def daemon_up(self) -> None:
        """Have it started, as a first instance does."""
        async with self.running(make_app(("true",))):
            pass

    def pid_of(self, program: str, word: str) -> int:
        """The process with this word in its command line; 0: there is none."""
        return next(find_shims(program, word), 0)

    def kill_containerd(self) -> None:
        """Returns when it is gone."""
        pid = self.pid_of("containerd", str(self.ground / self.driver.name / "daemon/config.toml"))
        descriptor = os.pidfd_open(pid)
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        select.select([descriptor], [], [])
        os.close(descriptor)

    @asynccontextmanager
    async def instance(self, behaviour: Behaviour) -> AsyncIterator[InstanceSpec]:
        workdir = "/bin/busybox" if behaviour is Behaviour.BREAKS else ""
        app = make_app(COMMANDS[behaviour], name=behaviour, workdir=workdir)
        async with make_instance(self.ground, self.image, app) as spec:
            yield spec

    def left_of(self, spec: InstanceSpec) -> list[str]:
        state = self.ground / self.driver.name
        return find_left(spec) + [str(path) for path in state.rglob(spec.id)]


def make_app(command: tuple[str, ...] = (), *, name: str = "app", **fields: object) -> App:
    app = App(name=name, image="test", command=command, resources=SMALL, id_base=ID_BASE)
    return replace(app, **fields)


def make_driver(spawner: PlainSpawner, ground: Path, name: str = "containerd") -> ContainerdDriver:
    driver = load(name, spawner, ground / name)
    assert isinstance(driver, ContainerdDriver)
    return driver
