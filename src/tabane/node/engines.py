"""Which drivers work on this node, found out by trying them."""

from __future__ import annotations

from tabane.errors import Unsupported
from tabane.model import App, Class
from tabane.node.config import NodeConfig
from tabane.runtimes import registry
from tabane.runtimes.api import Driver, Probe, Spawner
from tabane.scheduler.placement import NodeView


class Engines:
    """The node's drivers. `probe()` before use."""

    def __init__(self, config: NodeConfig, spawner: Spawner) -> None:
        self._config = config
        self.drivers: dict[str, Driver] = {
            name: registry.load(name, spawner, config.paths.drivers / name)
            for name in registry.DRIVERS
            if name != "fake"
        }
        self.probes: dict[str, Probe] = {}
        self._working: list[Driver] = []
        """The preferred first."""

    async def probe(self) -> None:
        for name, driver in self.drivers.items():
            self.probes[name] = await driver.probe()
        names = [name for name, probe in self.probes.items() if probe.works]
        names.sort(key=lambda name: name != self._config.driver)
        self._working = [self.drivers[name] for name in names]

    def driver_for(self, app: App) -> Driver:
        """Raises `Unsupported` when no driver here runs the app's class; never a weaker one."""
        for driver in self._working:
            if driver.isolation is app.isolation and app.driver in ("", driver.name):
                return driver
        wanted = f"driver {app.driver}" if app.driver else f"class {app.isolation}"
        reasons = "; ".join(f"{name}: {probe.reason}" for name, probe in self.probes.items())
        raise Unsupported(f"nothing on {self._config.key} runs {wanted} ({reasons})")

    def view(self, instances: int, memory_available_bytes: int) -> NodeView:
        """This node, as placement wants to see it."""
        classes: tuple[Class, ...] = tuple({driver.isolation: None for driver in self._working})
        names = tuple(driver.name for driver in self._working)
        return NodeView(self._config.key, names, classes, instances, memory_available_bytes)
