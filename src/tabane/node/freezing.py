"""Freezes instances and thaws them, as their homes order, and as people's doings need.

An order changes the instance's state at once, so that whoever asks what runs here is told of an
order that came before; `_rest` then brings the engine to that state, whichever way it was going. A
thaw breaks a freeze off: the session wins. What an engine cannot freeze, and what a person uses, is
`InstanceAwake` for its home. `freezing` is on disk before the engine is told, so the next agent
knows that it may stand still; a thaw is written afterwards, as a session waits.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from contextlib import suppress

from msgspec.structs import replace

from tabane.errors import TabaneError
from tabane.gateway.activation import InstanceAwake
from tabane.lifecycle import AT_REST, Event
from tabane.model import InstanceId, State
from tabane.node.register import Register
from tabane.node.running import Notify, Running
from tabane.runtimes.api import Handle
from tabane.runtimes.cgroups import Cgroup
from tabane.supervise import Supervisor, harmless

log = logging.getLogger(__name__)

HOLD_S = 3.0
"""What a person has just used is not frozen for so long."""


class Freezer:
    """See the module's text. `fail` ends an instance that cannot be thawed, with the reason."""

    def __init__(
        self,
        register: Register,
        tasks: Supervisor,
        notify: Notify,
        fail: Callable[[Running, str], None],
    ) -> None:
        self._register = register
        self._tasks = tasks
        self._notify = notify
        self._fail = fail

    def freeze(self, instance_id: InstanceId, number: int, reason: str = "") -> None:
        """By the home's order of that number. Of one that is gone, or ends: nothing."""
        running = self._register.running.get(instance_id)
        if running is None or running.stopping:
            return
        instance = replace(running.instance, freezes=number)
        running.record = replace(running.record, instance=instance)
        if instance.state is not State.READY:
            return
        if self._may_freeze(running):
            self._register.become(running, Event.FREEZE, reason)
            self._follow(running)
        else:
            self._tell_awake(running)

    def thaw(self, instance_id: InstanceId) -> None:
        """Sessions come to it, and wait."""
        running = self._register.running.get(instance_id)
        if running is None or running.stopping:
            return
        running.is_wanted = True
        if running.instance.state in AT_REST:
            self._wake(running)

    def hold(self, running: Running) -> None:
        """Somebody uses it beside its sessions: have it run for a while."""
        running.held_until = max(running.held_until, self._register.clock.now() + HOLD_S)
        running.is_wanted = running.is_wanted or running.saving is not None
        if not running.stopping and running.instance.state in AT_REST:
            self._wake(running)
            self._tell_awake(running)

    async def wait_awake(self, running: Running) -> None:
        """`hold` it, and wait until it runs."""
        self.hold(running)
        if running.saving is not None:
            await running.goes_on.wait()
        if running.resting is not None:
            await asyncio.wait({running.resting})

    async def let_go(self, running: Running) -> None:
        """It is about to end, which what is frozen does not."""
        if running.freezing is not None:
            running.freezing.cancel()
        if running.resting is not None:
            await asyncio.wait({running.resting})
        if running.is_frozen and (handle := running.record.handle) is not None:
            try:
                await running.driver.thaw(handle)
            except (TabaneError, OSError) as error:
                log.warning("%s is ended while it is frozen: %s", running.instance.id, error)
            running.is_frozen = False

    async def adopt(self, running: Running) -> None:
        """Another agent left it, frozen or not; what was on its way there comes back."""
        running.is_frozen = running.instance.state in AT_REST
        if running.instance.state is State.FREEZING:
            self._register.step(running, Event.SESSION_WON)
            await self._thaw(running, _handle(running))

    def _may_freeze(self, running: Running) -> bool:
        handle = running.record.handle
        able = running.driver.capabilities.freeze and handle is not None and handle.data["pid"]
        held = running.paused or self._register.clock.now() < running.held_until
        return bool(able) and not held

    def _tell_awake(self, running: Running) -> None:
        instance = running.instance
        self._notify(InstanceAwake(instance.cohort, instance.id, instance.freezes))

    def _wake(self, running: Running) -> None:
        is_frozen = running.instance.state is State.FROZEN
        self._register.step(running, Event.THAW if is_frozen else Event.SESSION_WON)
        if running.freezing is not None:
            running.freezing.cancel()
        self._follow(running)

    def _follow(self, running: Running) -> None:
        if running.resting is None:
            name = f"rest {running.instance.id}"
            running.resting = self._tasks.start(name, self._rest(running))

    async def _rest(self, running: Running) -> None:
        """Until the engine is where the instance's state says."""
        handle = _handle(running)
        try:
            while not running.stopping and running.is_frozen != (running.instance.state in AT_REST):
                if running.is_frozen:
                    await self._thaw(running, handle)
                else:
                    await self._freeze(running, handle)
        finally:
            running.resting = None

    async def _thaw(self, running: Running, handle: Handle) -> None:
        """The slots that are granted with it go out first: their gateways connect meanwhile, and
        the many threads of a sandbox that wakes would take the processor from us."""
        await asyncio.sleep(0)
        try:
            await running.driver.thaw(handle)
        except (TabaneError, OSError) as error:
            self._fail(running, f"it could not be thawed: {error}")
        running.is_frozen = False
        asyncio.get_running_loop().call_soon(self._write, running)  # once its slots are granted

    async def _freeze(self, running: Running, handle: Handle) -> None:
        running.is_frozen = True  # or may be, from here on
        freezing = self._tasks.start(f"freeze {running.instance.id}", running.driver.freeze(handle))
        running.freezing = freezing
        await asyncio.wait({freezing})
        running.freezing = None
        if freezing.cancelled():
            return
        if (error := freezing.exception()) is not None:
            self._give_up(running, error)
        elif running.instance.state is State.FREEZING:
            self._register.become(running, Event.FROZEN)
            if running.record.app.reactive.reclaim:
                self._tasks.start(f"reclaim {running.instance.id}", _reclaim(running))

    def _give_up(self, running: Running, error: BaseException) -> None:
        """Its engine cannot freeze it, and is not asked to again."""
        running.held_until = math.inf
        if running.instance.state is State.FREEZING:
            self._register.step(running, Event.SESSION_WON, f"it could not be frozen: {error}")
            self._tell_awake(running)

    def _write(self, running: Running) -> None:
        instance = running.instance
        if instance.state is State.READY:
            harmless("record", self._register.save)(running)
            self._register.say(instance.id, instance.app, instance.state, instance.reason)


async def _reclaim(running: Running) -> None:
    """Give the kernel back what it can have of the instance's memory."""
    with suppress(OSError):
        await asyncio.to_thread(Cgroup(running.instance.cgroup).reclaim)


def _handle(running: Running) -> Handle:
    handle = running.record.handle
    assert handle is not None
    return handle
