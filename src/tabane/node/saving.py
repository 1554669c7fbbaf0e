"""Has checkpoints made of instances, as their homes order.

When is up to the home (`tabane.gateway.activation`): after the first `ready`, as soon as nobody
holds a slot. The instance stands still for its dump alone; what was dumped is sealed while it goes
on. `checkpointing` is on disk before the engine is told, so the next agent knows that it may stand
still. What comes of it is said in any case: to the home (`InstanceAwake`), and in an event when it
failed. The checkpoint is a node's and a revision's, not the instance's: one that ends after its
dump has left one all the same.
"""

from __future__ import annotations

import asyncio
import logging

from msgspec.structs import replace

from tabane.errors import TabaneError, Unsupported
from tabane.gateway.activation import InstanceAwake
from tabane.lifecycle import Event
from tabane.model import AppName, InstanceId, State
from tabane.node.register import Register
from tabane.node.running import Checkpoints, Notify, Running
from tabane.runtimes.api import Handle
from tabane.supervise import Supervisor, harmless

log = logging.getLogger(__name__)

Key = tuple[AppName, int, str]
HELD_AGAIN_S = 3.0
"""After so long it is tried again with one that a person uses, or that is being saved elsewhere."""


class Saver:
    """See the module's text."""

    def __init__(
        self, register: Register, checkpoints: Checkpoints, tasks: Supervisor, notify: Notify
    ) -> None:
        self._register = register
        self._checkpoints = checkpoints
        self._tasks = tasks
        self._notify = notify
        self._busy: set[Key] = set()
        """What checkpoints are being made of now: one at a time of each."""

    def is_wanted(self, running: Running) -> bool:
        """Whether a checkpoint of it is to be made, now or later."""
        app, driver = running.record.app, running.driver
        able = app.reactive.checkpoint and driver.capabilities.checkpoint
        if not able:
            return False
        attempts = self._checkpoints.attempts(app, driver.name)
        return not attempts.is_final and self._checkpoints.choose(app, driver.name)[0] is None

    def tell_wishes(self, running: Running, puttable: bool) -> None:
        """Have it known of an instance what its home may have done with it."""
        wishes = {"savable": self.is_wanted(running), "puttable": puttable}
        running.record = replace(running.record, instance=replace(running.instance, **wishes))

    def save(self, instance_id: InstanceId, number: int) -> None:
        """By the home's order of that number. Of one that is gone, or ends: nothing."""
        running = self._register.running.get(instance_id)
        if running is None or running.stopping:
            return
        instance = replace(running.instance, freezes=number)
        running.record = replace(running.record, instance=instance)
        if instance.state is not State.READY:
            return
        again_s = self._again_s(running)
        if again_s != 0:
            self._tell(running, again_s)
            return
        self._busy.add(self._key(running))
        running.is_wanted = False
        running.goes_on.clear()
        self._register.become(running, Event.CHECKPOINT)
        saving = self._tasks.start(f"save {instance_id}", self._save(running))
        running.saving = saving
        saving.add_done_callback(lambda _: self._busy.discard(self._key(running)))

    def adopt(self, running: Running) -> None:
        """Another agent left it, and may have ended in the middle of its dump: that is void, and
        the driver, when it took the instance over, had it go on."""
        if running.instance.state is State.CHECKPOINTING:
            self._register.become(running, Event.BACK_TO_READY, "the agent that saved it ended")
        self.tell_wishes(running, running.instance.puttable)

    async def let_go(self, running: Running) -> None:
        """It is about to end. A dump that goes on is broken off as far as its engine can."""
        if (saving := running.saving) is not None:
            saving.cancel()
            await asyncio.wait({saving})

    def _key(self, running: Running) -> Key:
        app = running.record.app
        return app.cohort, app.revision, running.driver.name

    def _again_s(self, running: Running) -> float | None:
        """0: it can be saved now; None: it need not be; else after how long to try again."""
        app, driver = running.record.app, running.driver
        if not self.is_wanted(running):
            return None
        wait_s = self._checkpoints.attempts(app, driver.name).dump_in_s(self._register.clock.now())
        if wait_s:
            return wait_s
        held = running.paused or self._register.clock.now() < running.held_until
        busy = self._key(running) in self._busy
        return (
            HELD_AGAIN_S if held or busy or not self._checkpoints.is_tried(driver.name) else wait_s
        )

    def _tell(self, running: Running, again_s: float | None = None, reason: str = "") -> None:
        instance = running.instance
        told = instance.cohort, instance.id, instance.freezes
        app, driver = running.record.app, running.driver.name
        saved = self._checkpoints.choose(app, driver)[0] is not None
        event = InstanceAwake(*told, used=False, again_s=again_s, reason=reason, saved=saved)
        self._notify(event)

    async def _save(self, running: Running) -> None:
        app, handle = running.record.app, running.record.handle
        assert handle is not None
        attempts = self._checkpoints.attempts(app, running.driver.name)
        try:
            if await self._dump(running, handle):
                attempts.on_dumped()
        except (TabaneError, OSError) as error:
            now = self._register.clock.now()
            attempts.on_dump_failed(str(error), now, final=isinstance(error, Unsupported))
            self._on_failed(running, str(error), attempts.dump_in_s(now))
        finally:
            self._go_on(running)

    async def _dump(self, running: Running, handle: Handle) -> bool:
        """Whether it was; False: a session came first. Raises what is in the way."""
        app, driver = running.record.app, running.driver
        about = self._checkpoints.about(app, driver.name, running.instance.id)
        expected_bytes = (
            (await driver.stats(handle)).memory_bytes if driver.capabilities.stats else 0
        )
        async with self._checkpoints.dump(app, expected_bytes) as dump:
            if running.is_wanted:  # it does not stand still yet: the session wins
                self._go_on(running)
                self._tell(running, again_s=0.0)
                return False
            await driver.checkpoint(handle, dump.directory, leave_running=True)
            self._go_on(running)
            await dump.keep(about)
            return True

    def _go_on(self, running: Running, reason: str = "") -> None:
        """Its dump is over, one way or the other. Idempotent."""
        running.saving = None
        running.goes_on.set()
        if running.instance.state is not State.CHECKPOINTING:
            return
        self._register.step(running, Event.BACK_TO_READY, reason)
        instance = replace(running.instance, savable=False)
        running.record = replace(running.record, instance=instance)
        harmless("record", self._register.save)(running)
        self._register.say(instance.id, instance.app, instance.state, reason)
        self._tell(running)

    def _on_failed(self, running: Running, why: str, again_s: float | None) -> None:
        reason = f"no checkpoint of it could be made: {why}"
        log.warning("%s of %s: %s", running.instance.id, running.instance.app, reason)
        if running.instance.state is State.CHECKPOINTING:
            self._go_on(running, reason)
        else:
            state = running.instance.state
            self._register.say(running.instance.id, running.instance.app, state, reason)
        self._tell(running, again_s, reason)
