"""QEMU's machines keep to the interface of drivers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tabane.runtimes.api import Image
from tabane.testing import drivers
from tabane.testing.containers import make_tree, open_directory
from tabane.testing.drivers import DRIVER_CHECKS, Check
from tabane.testing.machine_bench import MachineBench, make_bench

pytestmark = pytest.mark.real

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
