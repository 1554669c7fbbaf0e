"""Trying checkpoints for real: a program is saved, and goes on as another instance."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from msgspec.structs import replace

from tabane.errors import TabaneError, Unsupported
from tabane.model import new_instance_id
from tabane.runtimes import mounts
from tabane.runtimes.api import Driver, InstanceSpec, Link
from tabane.runtimes.criu.engine import Criu, learn_features
from tabane.runtimes.threads import to_thread
from tabane.runtimes.trial import ID_BASE, make_spec, parked

TIMEOUT_S = 20.0
COMMAND = ("/usr/bin/sleep", "infinity")


async def try_checkpoints(driver: Driver, criu: Criu, directory: Path) -> str:
    """Why `driver` can make none here; empty when it can. What is left when the node's agent is
    killed meanwhile, its next `try_driver` removes."""
    try:
        await to_thread(learn_features, criu, directory)
    except Unsupported as problem:
        return problem.message
    place = directory / "trial"
    place.mkdir(mode=0o711)
    try:
        async with asyncio.timeout(TIMEOUT_S), parked(ID_BASE) as one, parked(ID_BASE) as two:
            await _try(driver, place, one, two)
    except (TabaneError, OSError) as error:
        return f"a trial failed: {error}"
    except TimeoutError:
        return f"a trial did not end in {TIMEOUT_S:.0f} s"
    finally:
        mounts.remove_tree(place)
    return ""


async def _try(driver: Driver, place: Path, one: Link, two: Link) -> None:
    images = place / "images"
    images.mkdir(mode=0o700)
    first = _describe(one, place)
    second = _clone(first, two)
    async with AsyncExitStack() as stack:
        prepared = await driver.prepare(first)
        stack.push_async_callback(driver.destroy, prepared)
        handle = await driver.start(first, prepared)
        await driver.checkpoint(handle, images, leave_running=False)
        prepared = await driver.prepare(second)
        stack.push_async_callback(driver.destroy, prepared)
        handle = await driver.restore(second, prepared, images)
        await driver.stats(handle)


def _describe(link: Link, place: Path) -> InstanceSpec:
    """The node's own `sleep`, which lies below /usr with its libraries."""
    spec = make_spec(link, place)
    for name in ("lib", "lib64"):
        (spec.image.tree / name).symlink_to(f"usr/{name}")
    app = replace(spec.app, command=COMMAND)
    return replace(spec, app=app, image=replace(spec.image, host_usr=True))


def _clone(spec: InstanceSpec, link: Link) -> InstanceSpec:
    identity = new_instance_id()
    directory = spec.directory.with_name(identity)
    directory.mkdir()
    log, cgroup = directory / "log", f"/tabane-trial-{identity}"
    return replace(spec, id=identity, link=link, directory=directory, log=log, cgroup=cgroup)
