"""The drivers there are: one table, name -> import string, loaded when first asked for.

A driver whose engine is missing stays listed; `probe_all` tells why it does not work here.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec

from tabane.errors import NotFound
from tabane.runtimes.api import Driver, Probe, Spawner

DRIVERS = {
    "crun": "tabane.runtimes.criu.driver:crun",
    "runc": "tabane.runtimes.criu.driver:runc",
    "containerd": "tabane.runtimes.containerd.driver:containerd",
    "runsc": "tabane.runtimes.runsc.driver:make",
    "wasmtime": "tabane.runtimes.unikernel.wasmtime:make",
    "solo5-spt": "tabane.runtimes.unikernel.solo5:spt",
    "solo5-hvt": "tabane.runtimes.unikernel.solo5:hvt",
    "firecracker": "tabane.runtimes.firecracker.driver:make",
    "qemu-microvm": "tabane.runtimes.qemu.driver:microvm",
    "containerd-firecracker": "tabane.runtimes.containerd.guests:firecracker",
    "qemu": "tabane.runtimes.qemu.driver:q35",
    "kata": "tabane.runtimes.containerd.guests:kata",
    "fake": "tabane.runtimes.fake:make",
}
"""By class; best first within one: what is picked when an app names no driver."""


class Maker(Protocol):
    def __call__(self, spawner: Spawner, directory: Path) -> Driver: ...


def load(name: str, spawner: Spawner, directory: Path) -> Driver:
    """A driver that starts engines through `spawner` and keeps its shared parts in `directory`.

    `directory` is one node's for one driver; like the instances' directories it must lie below
    directories that every user may enter (mode 0711), and is made if need be. Raises `NotFound`.
    """
    if name not in DRIVERS:
        raise NotFound(f"there is no driver {name!r} (known: {', '.join(DRIVERS)})")
    module, _, attribute = DRIVERS[name].partition(":")
    maker = cast(Maker, getattr(import_module(module), attribute))
    return maker(spawner, directory)


async def probe_all(spawner: Spawner, directory: Path) -> dict[str, Probe]:
    """Every driver's own word on whether it works here; each has `directory/NAME`."""
    return {name: await probe_whole(load(name, spawner, directory / name)) for name in DRIVERS}


async def probe_whole(driver: Driver) -> Probe:
    """With what it would leave for later."""
    probe = await driver.probe()
    return await driver.probe() if probe.pending else probe


def names() -> list[str]:
    """Of the drivers that start something real."""
    return [name for name in DRIVERS if name != "fake"]


def describe(driver: Driver, probe: Probe) -> dict[str, Any]:
    """A driver as `tabane doctor` shows it."""
    return {
        "driver": driver.name,
        "class": driver.isolation,
        "works": probe.works,
        "reason": probe.reason,
        "emulated": probe.emulated,
        "detail": probe.detail,
        "capabilities": msgspec.to_builtins(driver.capabilities),
        "defaults": msgspec.to_builtins(driver.enforcements()),
    }
