"""What tests of containerd's drivers need: instances, and ways to kill what keeps them."""

from __future__ import annotations

import os
import select
import signal
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tabane.runtimes import load
from tabane.runtimes.api import Driver, Image, InstanceSpec
from tabane.runtimes.containerd.driver import ContainerdDriver
from tabane.runtimes.containerd.shims import find_shims
from tabane.runtimes.pods import Pods, with_pods
from tabane.testing.container_bench import ContainerBench, make_app
from tabane.testing.containers import find_left
from tabane.testing.spawner import PlainSpawner


@dataclass
class ContainerdBench(ContainerBench):
    """Close it."""

    def __post_init__(self) -> None:
        self._more: list[Driver] = []

    def restarted(self) -> Driver:
        self._more.append(super().restarted())
        return self._more[-1]

    async def aclose(self) -> None:
        for driver in self._more:
            await engine_of(driver).aclose()
        await engine_of(self.driver).end()
        await self.spawner.aclose()

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

    def left_of(self, spec: InstanceSpec) -> list[str]:
        """By `os.walk`, as containerd removes what is others' meanwhile."""
        kept = os.walk(self.ground / self.driver.name / "daemon")
        names = (Path(at, name) for at, *inside in kept for name in chain(*inside))
        return find_left(spec) + [str(path) for path in names if path.name.endswith(spec.id)]


def make_bench(
    ground: Path, image: Image, name: str = "containerd", *, pods: bool = False
) -> ContainerdBench:
    spawner = PlainSpawner()
    driver: Driver = make_driver(spawner, ground, name)
    return ContainerdBench(with_pods(driver) if pods else driver, spawner, ground, image)


def make_driver(spawner: PlainSpawner, ground: Path, name: str = "containerd") -> ContainerdDriver:
    return engine_of(load(name, spawner, ground / name))


def engine_of(driver: Driver) -> ContainerdDriver:
    engine = driver.engine if isinstance(driver, Pods) else driver
    assert isinstance(engine, ContainerdDriver)
    return engine
