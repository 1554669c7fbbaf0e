"""A program may open its outputs anew, by the names that images are made for."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tabane.model import App
from tabane.testing.checkpoints import place
from tabane.testing.container_bench import ContainerBench, make_app
from tabane.testing.containers import make_instance
from tabane.testing.drivers import wait_until_said

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("no_hybrid")]

SCRIPT = """
trap 'echo again >>/dev/stdout; echo again >>/dev/stderr; echo told' HUP
echo first >>/dev/stdout
echo second >>/dev/stderr
echo third
while :; do sleep 0.05; done
"""
APP = make_app(("/bin/sh", "-c", SCRIPT))


@pytest.fixture
def bench(containers: ContainerBench) -> ContainerBench:
    return containers


@pytest.mark.parametrize("user", ["", "1000:1000"])
async def test_at_its_start(bench: ContainerBench, user: str) -> None:
    image = replace(bench.image, user=user, digest=f"test-{user}")
    async with bench.running(named(APP, user), image) as inside:
        await wait_until_said(inside.spec, b"third")
        assert inside.spec.log.read_text().splitlines() == ["first", "second", "third"]


async def test_in_a_copy(bench: ContainerBench) -> None:
    with place() as images:
        async with bench.running(named(APP, "saved")) as inside:
            await wait_until_said(inside.spec, b"third")
            await bench.driver.checkpoint(inside.handle, images, leave_running=False)
        async with make_instance(bench.ground, bench.image, named(APP, "saved")) as spec:
            handle = await bench.driver.prepare(spec)
            try:
                handle = await bench.driver.restore(spec, handle, images)
                await bench.spawner.signal(handle.id, 1)
                await wait_until_said(spec, b"told")
                assert spec.log.read_text().splitlines() == ["again", "again", "told"]
            finally:
                await bench.driver.destroy(handle)


def named(app: App, what: str) -> App:
    """Another app for each case: its program is known by its name."""
    return replace(app, name=f"output-{what.replace(':', '-') or 'root'}")
