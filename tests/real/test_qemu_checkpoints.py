"""Machines of QEMU's keep to what checkpoints have to do, and their clones are others."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tabane.runtimes.api import Image
from tabane.testing import checkpoints
from tabane.testing.checkpoints import CHECKPOINT_CHECKS
from tabane.testing.containers import make_tree, open_directory
from tabane.testing.drivers import Check
from tabane.testing.machine_bench import MachineBench, make_bench

pytestmark = pytest.mark.real

CASES = [
    *(("qemu-microvm", check) for check in CHECKPOINT_CHECKS),
    ("qemu", checkpoints.check_clones),
]
"""What the two machines do not have in common is in what QEMU saves of its devices."""


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
