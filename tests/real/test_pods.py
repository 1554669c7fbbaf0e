"""Instances of several containers with real engines: they keep to the interface, and share what
they are to share and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tabane.runtimes import load
from tabane.runtimes.api import Image
from tabane.runtimes.pods import with_pods
from tabane.testing.container_bench import ContainerBench
from tabane.testing.containers import make_tree, open_directory, without_unified
from tabane.testing.drivers import DRIVER_CHECKS, Check
from tabane.testing.pods import POD_CHECKS, InPods
from tabane.testing.pods import Check as PodCheck
from tabane.testing.spawner import PlainSpawner

pytestmark = pytest.mark.real


@pytest.fixture(scope="module", autouse=True)
def no_hybrid() -> Iterator[None]:
    with without_unified():
        yield


@pytest.fixture(scope="module")
def ground() -> Iterator[Path]:
    with open_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def image(ground: Path) -> Image:
    return make_tree(ground)


@pytest.fixture(params=["crun", "runc", "runsc"])
async def bench(
    request: pytest.FixtureRequest, ground: Path, image: Image
) -> AsyncIterator[ContainerBench]:
    spawner = PlainSpawner()
    driver = load(request.param, spawner, ground / request.param)
    yield ContainerBench(with_pods(driver), spawner, ground, image)
    driver.close()  # type: ignore[attr-defined]
    await spawner.aclose()


@pytest.mark.parametrize("check", POD_CHECKS, ids=lambda check: check.__name__)
async def test_pods(check: PodCheck, bench: ContainerBench) -> None:
    await check(bench)


@pytest.mark.parametrize("check", DRIVER_CHECKS, ids=lambda check: check.__name__)
async def test_conformance_with_a_sidecar(check: Check, bench: ContainerBench) -> None:
    await check(InPods(bench))
