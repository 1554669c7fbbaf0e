"""Trying checkpoints for real: a program is saved, and goes on as another instance."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from contextlib import AsyncExitStack
from pathlib import Path

from msgspec.structs import replace

from tabane.errors import TabaneError, Unsupported
from tabane.model import new_instance_id
from tabane.runtimes import mounts
from tabane.runtimes.api import Driver, InstanceSpec, Link
from tabane.runtimes.criu.engine import FEATURES, Criu, learn_features
from tabane.runtimes.threads import to_thread
from tabane.runtimes.trial import ID_BASE, make_spec, parked

MARKS = Path("/run/tabane/criu")
TIMEOUT_S = 20.0
COMMAND = ("/usr/bin/sleep", "infinity")


async def try_checkpoints(driver: Driver, criu: Criu, engine: str, directory: Path) -> str:
    """Why `driver` can make none here; empty when it can. `engine`: which it is, with its version.

    What worked since the machine's start with the same versions is not tried again, by any node.
    """
    if recall(criu, engine, directory):
        return ""
    mark = mark_of(criu, engine)
    try:
        await to_thread(learn_features, criu, directory)
    except Unsupported as refusal:
        return refusal.message
    if not (problem := await _try_in(directory / "trial", driver)):
        _remember(mark, directory / FEATURES)
    return problem


def recall(criu: Criu, engine: str, directory: Path) -> bool:
    """Whether they worked since the machine's start, so that they need not be tried. Then the
    driver's directory has what CRIU found out of the kernel."""
    mark = mark_of(criu, engine)
    if mark.exists():
        shutil.copy(mark, directory / FEATURES)
    return mark.exists()


def mark_of(criu: Criu, engine: str) -> Path:
    """The file that is there once these worked together: with what CRIU found out of the kernel."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return MARKS / f"{boot}-criu-{criu.version}-{re.sub('[^a-z0-9.]+', '-', engine.lower())}"


def _remember(mark: Path, features: Path) -> None:
    """Also forget what worked before the machine was started last."""
    mark.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    boot = mark.name.partition("-criu-")[0]
    for other in mark.parent.iterdir():
        if not other.name.startswith(boot):
            other.unlink(missing_ok=True)
    fresh = mark.with_name(f"{mark.name}.{os.getpid()}")
    shutil.copy(features, fresh)
    fresh.replace(mark)


async def _try_in(place: Path, driver: Driver) -> str:
    """What is left when the node's agent is killed meanwhile, its next `try_driver` removes."""
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
