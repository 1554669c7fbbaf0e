"""What tests of drivers with a network stack of their own need: a link with a wire, but no node."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tabane.model import App, new_instance_id
from tabane.network import links, netlink
from tabane.network.addresses import GATEWAY
from tabane.runtimes.api import Image, InstanceSpec, Link
from tabane.runtimes.trial import parked
from tabane.runtimes.volumes import VolumeFiles
from tabane.testing.leaks import name_cgroup

_slots = itertools.count(2)


@asynccontextmanager
async def linked(id_base: int) -> AsyncIterator[Link]:
    """A link whose wire ends in the network namespace of the test, which is its node."""
    slot = next(_slots)
    async with parked(id_base) as bare:
        link = await asyncio.to_thread(_connect, slot, bare)
        try:
            yield link
        finally:
            await asyncio.to_thread(links.remove, [slot], [])


def _connect(slot: int, bare: Link) -> Link:
    with netlink.Rtnetlink() as node:
        node.perform(
            [
                netlink.set_up(netlink.LOOPBACK_INDEX),
                netlink.add_address(netlink.LOOPBACK_INDEX, GATEWAY, 32),
            ]
        )
    return links.connect(slot, bare.parked_pid, bare.parked_start_ticks)


@asynccontextmanager
async def make_machine(directory: Path, image: Image, app: App) -> AsyncIterator[InstanceSpec]:
    """An instance of `app` with a wire, to be prepared; its directory, and its volumes' files, go
    with the block."""
    identity = new_instance_id()
    place = directory / identity
    place.mkdir()
    volumes = VolumeFiles(directory / f"{identity}.volumes")
    volumes.ensure(app)
    async with linked(app.id_base) as link:
        logs = directory / "logs" / identity
        logs.mkdir(parents=True)
        log = logs / "log"
        cgroup = name_cgroup(identity)
        mine = volumes.of(app)
        yield InstanceSpec(identity, app, image, link, place, log, cgroup, volumes=mine)
    for volume in app.volumes:
        volumes.remove(app.key, volume.name)
    shutil.rmtree(place)
