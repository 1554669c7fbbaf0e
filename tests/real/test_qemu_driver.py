"""Machines keep to the interface of drivers, and are confined as the table says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec.structs import replace

from tabane.model import App
from tabane.runtimes import load
from tabane.runtimes.api import Driver, Image, InstanceSpec
from tabane.runtimes.qemu.driver import QemuDriver
from tabane.testing import drivers
from tabane.testing.containers import (
    ID_BASE,
    SMALL,
    find_left,
    make_tree,
    open_directory,
)
from tabane.testing.drivers import DRIVER_CHECKS, SAID, Behaviour, Check
from tabane.testing.machines import make_machine
from tabane.testing.spawner import PlainSpawner

pytestmark = pytest.mark.real

SAY = f"echo {SAID.decode()}"
COMMANDS = {
    Behaviour.WAITS: ("sleep", "1000"),
    Behaviour.SAYS: ("sh", "-c", SAY),
    Behaviour.EXITS: ("sh", "-c", "exit 3"),
    Behaviour.STAYS: ("sh", "-c", f"trap '' TERM; {SAY}; sleep 1000"),
    Behaviour.EATS: ("dd", "if=/dev/zero", "of=/dev/null", "bs=128M"),
    Behaviour.BREAKS: ("true",),
}


@pytest.fixture(scope="module")
def ground() -> Iterator[Path]:
    with open_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def image(ground: Path) -> Image:
    return make_tree(ground)


def make_app(command: tuple[str, ...] = (), *, name: str = "app", **fields: object) -> App:
    app = App(name=name, image="test", command=command, resources=SMALL, id_base=ID_BASE)
    return replace(app, **fields)


@dataclass
class QemuBench:
    driver: QemuDriver
    spawner: PlainSpawner
    ground: Path
    image: Image
    again: list[QemuDriver]

    def restarted(self) -> Driver:
        self.driver.abort()
        driver = load(self.driver.name, self.spawner, self.ground / self.driver.name)
        assert isinstance(driver, QemuDriver)
        self.again.append(driver)
        return driver

    @asynccontextmanager
    async def instance(self, behaviour: Behaviour) -> AsyncIterator[InstanceSpec]:
        workdir = "/bin/busybox" if behaviour is Behaviour.BREAKS else ""
        app = make_app(COMMANDS[behaviour], name=behaviour, workdir=workdir)
        async with make_machine(self.ground, self.image, app) as spec:
            yield spec

    def left_of(self, spec: InstanceSpec) -> list[str]:
        return find_left(spec)


@pytest.fixture
async def bench(driver_name: str, ground: Path, image: Image) -> AsyncIterator[QemuBench]:
    spawner = PlainSpawner()
    driver = load(driver_name, spawner, ground / driver_name)
    assert isinstance(driver, QemuDriver)
    made = QemuBench(driver, spawner, ground, image, [])
    yield made
    for one in (driver, *made.again):
        await one.aclose()
    await spawner.aclose()


OF_PC = (
    drivers.check_life,
    drivers.check_out_of_memory,
    drivers.check_freeze,
    drivers.check_terminal,
    drivers.check_copy,
    drivers.check_guest_processes,
    drivers.check_recover,
)
"""What a PC is put through: where devices, clock and reset come in. All else the two machines have
in common, and a boot takes seconds here."""
CASES = [
    *(("qemu-microvm", check) for check in DRIVER_CHECKS),
    *(("qemu", check) for check in OF_PC),
]


@pytest.mark.parametrize(
    ("driver_name", "check"), CASES, ids=lambda case: getattr(case, "__name__", case)
)
async def test_conformance(driver_name: str, check: Check, bench: QemuBench) -> None:
    await check(bench)
