"""Which drivers work on this node, found out by trying them."""

from __future__ import annotations

import asyncio
from collections import deque
from functools import cache
from pathlib import Path
from statistics import median

from tabane.errors import Unsupported
from tabane.gateway.messages import StartTrace
from tabane.model import App
from tabane.node.config import NodeConfig
from tabane.runtimes import registry
from tabane.runtimes.api import Driver, Probe, Spawner
from tabane.runtimes.pods import with_pods
from tabane.scheduler.engines import EngineView, pick_engine, why_not
from tabane.scheduler.placement import NodeView

FEATURES = ("services", "volumes", "pods", "exec", "limit")
"""The capabilities that an app may need (`App.needs`)."""
NO_PORT = {"port": "gives its instances no network, and the app listens on a port"}
LONGEST = 120
"""Characters of a reason that all nodes are told with each change of this one."""
LATEST = 15
"""Cold starts whose median is how long one takes."""


@cache
def boot_id() -> str:
    """Of the kernel that runs here: what shares it ends with it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _shorten(reason: str) -> str:
    return reason if len(reason) <= LONGEST else f"{reason[:LONGEST]}..."


class Engines:
    """The node's drivers. `probe()` before use."""

    def __init__(self, config: NodeConfig, spawner: Spawner) -> None:
        self._config = config
        self.drivers: dict[str, Driver] = {
            name: with_pods(registry.load(name, spawner, config.paths.drivers / name))
            for name in registry.DRIVERS
            if name != "fake"
        }
        self.probes = dict.fromkeys(self.drivers, Probe(False, "it is still being tried"))
        self._views: tuple[EngineView, ...] = ()
        """Those that work come first, and of them the preferred."""
        self._starts: dict[str, deque[float]] = {
            name: deque(maxlen=LATEST) for name in self.drivers
        }
        """How long the latest cold starts took, s."""

    async def probe(self, *, machines: bool) -> None:
        """Try the drivers, all at once: those that start machines, which takes seconds, and what
        others left for later; or the others, first. Meanwhile the node runs what these can."""
        names = [
            name
            for name, driver in self.drivers.items()
            if (driver.capabilities.needs_kvm or self.probes[name].pending) == machines
        ]
        probes = await asyncio.gather(*(self.drivers[name].probe() for name in names))
        self.probes |= zip(names, probes, strict=True)
        names = sorted(self.probes, key=self._rank)
        self._views = tuple(map(self._view, names))

    def _rank(self, name: str) -> tuple[bool, bool]:
        return not self.probes[name].works, name != self._config.driver

    def note_start(self, name: str, trace: StartTrace) -> None:
        """An instance is ready. What a cold start costs is learnt from those that were."""
        if trace.option != "cold" or trace.note:
            return
        self._starts[name].append(trace.total_us / 1e6)
        self._views = tuple(self._view(engine.name) for engine in self._views)

    def _view(self, name: str) -> EngineView:
        driver = self.drivers[name]
        probe = self.probes[name]
        emulated = probe.emulated and not self._config.allow_emulation
        starts = self._starts[name]
        wake_s = median(starts) if starts else None
        able = driver.capabilities
        features = tuple(name for name in FEATURES if getattr(able, name))
        return EngineView(
            name,
            driver.isolation,
            able.images,
            emulated,
            features,
            able.layer_in_memory,
            wake_s,
            "" if probe.works else _shorten(probe.reason),
            able.refuses if able.network else able.refuses | NO_PORT,
        )

    def driver_for(self, app: App) -> Driver:
        """Raises `Unsupported` when no driver here runs the app's class; never a weaker one."""
        if name := pick_engine(app, self._views):
            return self.drivers[name]
        wanted = f"driver {app.driver}" if app.driver else f"class {app.isolation}"
        reasons = "; ".join(self._reason(app, name) for name in self.probes)
        raise Unsupported(f"nothing on {self._config.key} runs {wanted} ({reasons})")

    def _reason(self, app: App, name: str) -> str:
        """Why a driver does not run an app: what is in the way, or that it does not work."""
        probe = self.probes[name]
        return f"{name}: {probe.reason if not probe.works else why_not(app, self._view(name))}"

    def view(self, instances: int, memory_available_bytes: int) -> NodeView:
        """This node, as placement wants to see it."""
        return NodeView(
            self._config.key,
            self._views,
            instances,
            memory_available_bytes,
            boot_id(),
        )
