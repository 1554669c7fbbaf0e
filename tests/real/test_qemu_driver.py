"""QEMU's machines keep to the interface of drivers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tabane.runtimes.api import Image
from tabane.testing import drivers
from tabane.testing.containers import make_tree, open_directory
from tabane.testing.drivers import DRIVER_CHECKS, Behaviour, Check
from tabane.testing.machine_bench import COMMANDS, KeptBench, MachineBench, make_app, make_bench

pytestmark = pytest.mark.real

ON_ONE = (
    drivers.check_handle,
    drivers.check_exec,
    drivers.check_left_holding,
    drivers.check_terminal,
    drivers.check_copy,
    drivers.check_stats,
    drivers.check_limit,
    drivers.check_guest_processes,
    drivers.check_unsupported,
)
"""They leave a machine as they find it, so that one is enough: a boot takes seconds here."""
OF_PC = (drivers.check_out_of_memory, drivers.check_freeze, drivers.check_recover)
"""What a PC is put through beside them: clock, reset, another agent. All else the two machines have
in common."""
CASES = [
    *(("qemu-microvm", check) for check in DRIVER_CHECKS if check not in ON_ONE),
    *(("qemu", check) for check in OF_PC),
]


@pytest.fixture(scope="module")
def ground() -> Iterator[Path]:
    with open_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def image(ground: Path) -> Image:
    return make_tree(ground)


@pytest.fixture
async def bench(name: str, ground: Path, image: Image) -> AsyncIterator[MachineBench]:
    bench = make_bench(name, ground, image)
    yield bench
    await bench.aclose()


@pytest.mark.parametrize(("name", "check"), CASES, ids=lambda case: getattr(case, "__name__", case))
async def test_conformance(name: str, check: Check, bench: MachineBench) -> None:
    await check(bench)


@pytest.mark.parametrize("name", ["qemu-microvm", "qemu"])
async def test_conformance_on_one_machine(name: str, bench: MachineBench) -> None:
    async with bench.running(make_app(COMMANDS[Behaviour.WAITS])) as inside:
        for check in ON_ONE:
            await check(KeptBench(inside))
