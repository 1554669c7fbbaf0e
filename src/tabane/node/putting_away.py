"""Puts instances away, as their homes order: each is saved as it is then, and ends.

It stands still from before its dump until its end, so nothing is done that who goes on from there
does not know. It is put away from the moment that its checkpoint is on disk as a whole
(`Checkpoints.kept`), whatever is killed then: what is found running all the same ends, and its home
hears with the end that it can go on. Until then a session, or somebody who uses it, breaks it off,
and so does what goes wrong: the instance goes on, and its home is told (`InstanceAwake`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from tabane.errors import TabaneError, Unsupported
from tabane.gateway.activation import InstanceAwake, InstanceEnded
from tabane.images.checkpoint import About, Kept, Stored
from tabane.lifecycle import Event
from tabane.model import InstanceId, State, name_cohort
from tabane.node.register import Register
from tabane.node.running import Checkpoints, Notify, Running
from tabane.node.saving import HELD_AGAIN_S
from tabane.runtimes.api import Handle
from tabane.supervise import Supervisor
from tabane.units import format_duration

if TYPE_CHECKING:
    from tabane.node.instances import Executor

log = logging.getLogger(__name__)


class PuttingAway:
    """See the module's text. `end` ends an instance, with the reason; `fail` likewise, one that is
    of no use."""

    def __init__(
        self,
        register: Register,
        checkpoints: Checkpoints,
        tasks: Supervisor,
        notify: Notify,
        end: Callable[[Running, str], Coroutine[Any, Any, None]],
        fail: Callable[[Running, str], None],
    ) -> None:
        self._register = register
        self._checkpoints = checkpoints
        self._tasks = tasks
        self._notify = notify
        self._end = end
        self._fail = fail

    def is_possible(self, running: Running) -> bool:
        """Whether it may be put away, when its home says so."""
        able = running.driver.capabilities
        wanted = running.record.app.reactive.checkpoint_after_s is not None
        return wanted and able.freeze and able.checkpoint and able.restore

    def put_away(self, instance_id: InstanceId, number: int) -> None:
        """By the home's order of that number. Of one that is gone, or ends: nothing."""
        running = self._register.running.get(instance_id)
        if running is None or running.stopping:
            return
        instance = replace(running.instance, freezes=number)
        running.record = replace(running.record, instance=instance)
        if running.saving is not None:  # what comes of that is told with this number
            return
        running.is_wanted = False
        running.goes_on.clear()
        running.saving = self._tasks.start(f"put away {instance_id}", self._put_away(running))

    async def adopt(self, running: Running) -> bool:
        """Another agent left it. Whether it was put away, and only had not ended yet; what was on
        its way there goes on."""
        if self._checkpoints.kept(running.instance.id) is not None:
            running.is_frozen = True
            await self._end(running, self._describe(running))
            return True
        if running.instance.state is State.CHECKPOINTING and running.record.handle is not None:
            await running.driver.thaw(running.record.handle)
        return False

    async def kill(self, running: Running) -> None:
        """What is put away does nothing more before its end."""
        handle = running.record.handle
        if handle is None or self._checkpoints.kept(running.instance.id) is None:
            return
        for pid in await running.driver.processes(handle):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kept_after_s(self, instance_id: InstanceId, least_s: float = 0.0) -> float | None:
        """It is put away, and can go on after so long, or `least_s`; None: it is not."""
        stored = self._checkpoints.kept(instance_id)
        if stored is None:
            return None
        now = self._register.clock.now()
        return max(least_s, self._checkpoints.kept_attempts(stored.digest).restore_at - now)

    def drop(self, kept: Stored, reason: str) -> None:
        """Begin to have what is put away go for good."""
        self._tasks.start(f"drop {kept.about.instance}", self._drop(kept, reason))

    async def _drop(self, kept: Stored, reason: str) -> None:
        await self._checkpoints.use_up(kept.digest)
        self._register.say(kept.about.instance, kept.about.app, State.ABSENT, reason)

    def lose(self, about: About, reason: str) -> None:
        """Its checkpoint was removed: tell its home, too. One that has begun to go on finds out."""
        instance, register = about.instance, self._register
        if register.runs(instance) or instance in register.beginning:
            return
        assert about.kept is not None
        register.say(instance, about.app, State.ABSENT, reason)
        cohort = name_cohort(about.app, about.kept.trust)
        self._notify(InstanceEnded(cohort, instance, register.node, reason, failed=False))

    def give_back(self, running: Running, reason: str) -> None:
        """Begin to end one that did not go on: it is put away as before."""
        self._tasks.start(f"end {running.instance.id}", self._end(running, reason))

    def _describe(self, running: Running) -> str:
        if running.lowered:
            return f"put away, as {running.lowered}"
        after_s = running.record.app.reactive.checkpoint_after_s or 0.0
        return f"put away, as idle for {format_duration(after_s)}"

    async def _put_away(self, running: Running) -> None:
        if running.resting is not None:  # it is being frozen, or thawed
            await asyncio.wait({running.resting})
        again_s = self._again_s(running)
        if again_s:
            await self._go_on(running, again_s)
            return
        try:
            kept = await self._keep(running)
        except (TabaneError, OSError) as error:
            attempts, now = running.put_away, self._register.clock.now()
            attempts.on_dump_failed(str(error), now, final=isinstance(error, Unsupported))
            reason = f"it could not be put away: {error}"
            log.warning("%s of %s: %s", running.instance.id, running.instance.app, reason)
            await self._go_on(running, attempts.dump_in_s(now), reason)
            return
        if kept is None:
            await self._go_on(running, 0.0)
            return
        running.saving = None
        running.goes_on.set()
        await self._end(running, self._describe(running))

    def _again_s(self, running: Running) -> float:
        """0: it can be put away now; else after how long to try again."""
        held = running.paused or self._register.clock.now() < running.held_until
        rests = running.instance.state in (State.READY, State.FROZEN)
        tried = self._checkpoints.is_tried(running.driver.name)
        return 0.0 if rests and tried and not held else HELD_AGAIN_S

    async def _keep(self, running: Running) -> Stored | None:
        """None: it is wanted. Raises what is in the way."""
        app, driver, handle = running.record.app, running.driver, _handle(running)
        expected = (await driver.stats(handle)).memory_bytes if driver.capabilities.stats else 0
        self._register.become(running, Event.CHECKPOINT)
        if not running.is_frozen:
            running.is_frozen = True
            await driver.freeze(handle)
        instance = running.instance
        itself = Kept(instance.generation.counter, instance.created_at, app.trust)
        about = self._checkpoints.about(app, driver.name, instance.id, itself)
        async with self._checkpoints.dump(app, expected) as dump:
            if not running.is_wanted:
                await driver.checkpoint(handle, dump.directory, leave_running=True)
            if running.is_wanted:
                return None
            stored = await dump.keep(about)
        if running.is_wanted:
            await self._checkpoints.use_up(stored.digest)
            return None
        return stored

    async def _go_on(self, running: Running, again_s: float | None, reason: str = "") -> None:
        """It is not put away. Its home has it frozen again, if that is due."""
        if running.is_frozen:
            try:
                await running.driver.thaw(_handle(running))
            except (TabaneError, OSError) as error:
                self._fail(running, f"it could not be thawed: {error}")
                return
            running.is_frozen = False
        if running.instance.state is State.FROZEN:
            self._register.become(running, Event.THAW)
        elif running.instance.state is State.CHECKPOINTING:
            self._register.become(running, Event.BACK_TO_READY, reason)
        running.saving = None
        running.goes_on.set()
        told = running.instance.cohort, running.instance.id, running.instance.freezes
        self._notify(InstanceAwake(*told, used=False, again_s=again_s, reason=reason, ends=True))


def save_as_told(executor: Executor, instance_id: InstanceId, number: int, *, ends: bool) -> None:
    """By the home's order of that number: have a checkpoint made of it, or (`ends`) put it away."""
    if ends:
        executor.putting_away.put_away(instance_id, number)
    else:
        executor.saver.save(instance_id, number)


def _handle(running: Running) -> Handle:
    handle = running.record.handle
    assert handle is not None
    return handle
