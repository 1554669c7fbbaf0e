"""What an instance is made from, had ready before it is prepared: driver, images, volumes,
services."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tabane.clock import Clock
from tabane.errors import Busy, Unsupported
from tabane.model import App, InstanceId
from tabane.node.register import Register
from tabane.node.running import Beginning, Fetched, Images, Running, Services
from tabane.runtimes.api import Driver, InstanceSpec
from tabane.runtimes.volumes import VolumeFiles


class Fetching:
    """See the module's text."""

    def __init__(
        self,
        images: Images,
        driver_for: Callable[[App], Driver],
        driver_named: Callable[[str], Driver],
        clock: Clock,
    ) -> None:
        self._images = images
        self._driver_for = driver_for
        self._driver_named = driver_named
        self._clock = clock
        self._releasing: dict[InstanceId, asyncio.Task[None]] = {}

    async def fetch(self, begun: Beginning) -> Fetched:
        """The images of its containers, from elsewhere if need be. No other start waits for it."""
        began, app, kept = self._clock.now(), begun.app, begun.kept
        driver = self._driver_named(kept.about.driver) if kept else self._driver_for(app)
        if (releasing := self._releasing.get(begun.instance.id)) is not None:
            await asyncio.wait({releasing})
        apps = (app, *map(app.beside, app.containers))
        images = [await self._images.prepare_for(each) for each in apps]
        return Fetched(driver, images, self._clock.now() - began)

    def after(self, instance: InstanceId, releasing: asyncio.Task[None]) -> None:
        """An earlier life of the instance is just being cleared away: the next waits for it."""
        self._releasing[instance] = releasing
        releasing.add_done_callback(lambda _: self._releasing.pop(instance, None))


async def ready_volumes(register: Register, volumes: VolumeFiles, running: Running) -> None:
    """Have them there, and nobody else's. Raises `Busy`."""
    app = running.record.app
    if not app.volumes:
        return
    if user := register.volume_holder(app.key, but=running):
        raise Busy(f"instance {user} still has the volumes of {app.key}")
    await asyncio.to_thread(volumes.ensure, app)


async def open_services(services: Services, driver: Driver, spec: InstanceSpec) -> None:
    """Those that its app asks for, if any. Raises `Unsupported`."""
    if spec.services is None:
        return
    if not driver.capabilities.services:
        raise Unsupported(f"its driver {driver.name} cannot show services to an instance")
    spec.services.mkdir()
    await services.open(spec)
