"""Has instances begin as copies: from a checkpoint of their revision, many at a time from one.

A copy takes the place of the engine's start in an instance that is prepared as any. It is ready
when its program is found ready (it listens already, in its own network namespace) and its hook has
answered. Whatever fails until then, the same instance begins cold, with its id, its link and the
sessions that wait for it; why is in an event and in the wake record (`note`). That it is a copy is
on disk before it begins (`Record.restored`): the next agent tells it, too.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING

from msgspec.structs import replace

from tabane.errors import Corrupt, EngineError, TabaneError, Unavailable
from tabane.images.checkpoint import Stored
from tabane.model import State
from tabane.node.ends import describe_ready
from tabane.node.hooks import tell_restored
from tabane.node.running import Checkpoints, Running
from tabane.scheduler.attempts import Attempts
from tabane.units import micros

if TYPE_CHECKING:
    from tabane.node.instances import Executor

log = logging.getLogger(__name__)

READY_S = 5.0
"""A copy was ready when it was saved: one that does not listen by then will not. Not
more than half of `start_timeout`, so that sessions can wait for a cold start; for a hook it has as
much more as that may take."""


class Restorer:
    """See the module's text."""

    def __init__(self, executor: Executor, checkpoints: Checkpoints) -> None:
        self._executor = executor
        self._checkpoints = checkpoints
        self._clock = executor.clock

    def choose(self, running: Running) -> Stored | None:
        """What it can begin from. If there is something that it cannot, it has a note of why."""
        app, driver = running.record.app, running.driver
        if running.record.resumed:
            return self._checkpoints.kept(running.instance.id)
        if not app.reactive.checkpoint:
            return None
        stored, refused = self._checkpoints.choose(app, driver.name)
        attempts = self._checkpoints.attempts(app, driver.name)
        if stored is None:
            running.note = f"its checkpoint is refused: {'; '.join(refused)}" if refused else ""
        elif not attempts.may_restore(self._clock.now()):
            running.note = f"its checkpoint is left alone for a while: {attempts.reason}"
            return None
        return stored

    async def start(self, running: Running, stored: Stored) -> None:
        """Have it begin from there, or cold. Returns when the engine has done its part, so that a
        program that is slow keeps no other from starting."""
        restored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        work = self._start(running, stored, restored)
        task = running.restoring = self._executor.tasks.start(
            f"restore {running.instance.id}", work
        )
        await asyncio.wait({task, restored}, return_when=asyncio.FIRST_COMPLETED)

    async def let_go(self, running: Running) -> None:
        """It is about to end."""
        if (restoring := running.restoring) is not None:
            running.restoring = None
            restoring.cancel()
            await asyncio.wait({restoring})

    async def wait_ready(self, running: Running) -> None:
        """As `Running.wait_ready`; a copy has also been told that it is one, and nothing else will
        go on from where one was put away. Raises `EngineError`, `Unsupported` when it does not
        answer that, and `OSError`."""
        await running.wait_ready()
        if running.record.restored:
            await tell_restored(running)
        if running.record.resumed:
            await self._checkpoints.use_up(running.record.restored)

    async def _start(
        self, running: Running, stored: Stored, restored: asyncio.Future[None]
    ) -> None:
        began, problem = self._clock.now(), ""
        try:
            await self._restore(running, stored)
            restored.set_result(None)
            problem = await self._find_problem(running)
        except (TabaneError, OSError) as error:
            problem = str(error)
            if not _is_of_checkpoint(running, error):
                self._attempts(running, stored).put_off(problem, self._clock.now())
                await self._begin_otherwise(running, problem, began, has_turn=not restored.done())
                return
            if isinstance(error, Corrupt):  # the store told, and has discarded it
                await self._checkpoints.discard(stored.digest)
        attempts = self._attempts(running, stored)
        if not problem:
            attempts.on_restored()
            self._become_ready(running)
            return
        if attempts.on_restore_failed(problem, began, self._clock.now()):
            await self._checkpoints.discard(stored.digest)
        await self._begin_otherwise(running, problem, began, has_turn=not restored.done())

    async def _begin_otherwise(
        self, running: Running, problem: str, began: float, *, has_turn: bool
    ) -> None:
        """What was put away is given back; any other begins cold."""
        if running.record.resumed:
            self._give_back(running, problem)
            return
        await self._start_cold(running, problem, began, has_turn=has_turn)

    def _attempts(self, running: Running, stored: Stored) -> Attempts:
        if running.record.resumed:
            return self._checkpoints.kept_attempts(stored.digest)
        return self._checkpoints.attempts(running.record.app, running.driver.name)

    def _give_back(self, running: Running, problem: str) -> None:
        """It ends again, and is put away as before, unless that is of no use; its home has another
        begin in its place."""
        running.restoring = None
        kept = self._checkpoints.kept(running.instance.id) is not None
        lost = "" if kept else ", and is given up"
        reason = f"it could not go on from where it was put away{lost}: {problem}"
        log.warning("%s of %s: %s", running.instance.id, running.instance.app, reason)
        self._executor.putting_away.give_back(running, reason)

    async def _restore(self, running: Running, stored: Stored) -> None:
        """Raises as `CheckpointStore.open` and `Driver.restore`."""
        executor, began = self._executor, self._clock.now()
        spec, handle = executor.spec(running.record), running.record.handle
        assert handle is not None
        if running.record.resumed and (no := self._checkpoints.refusals(stored, spec.app)):
            raise Unavailable(f"what it was put away as is refused: {'; '.join(no)}")
        running.record = replace(running.record, restored=stored.digest)
        executor.save(running)
        executor.say(spec.id, running.instance.app, State.STARTING)
        lease = running.checkpoint = await self._checkpoints.open(stored.digest)
        opened = self._clock.now()
        try:
            handle = await running.driver.restore(spec, handle, lease.directory)
        finally:
            if not running.driver.capabilities.maps_checkpoints:
                lease.close()
        running.phases_us["open"] = micros(opened - began)
        running.phases_us["engine"] = micros(self._clock.now() - opened)
        instance = replace(running.instance, pid=int(str(handle.data["pid"])))
        running.record = replace(running.record, handle=handle, instance=instance)
        executor.save(running)

    async def _find_problem(self, running: Running) -> str:
        """Wait until it is ready and knows what it is; why it is not, if it is not."""
        executor, identity, app = self._executor, running.instance.id, running.record.app
        handle = running.record.handle
        assert handle is not None
        end = executor.tasks.start(f"copy {identity}", running.driver.wait(handle))
        ready = executor.tasks.start(f"ready {identity}", self._wait_ready(running))
        ready_s = min(READY_S, app.reactive.start_timeout_s / 2)
        hook_s = app.hooks.deadline_s if app.hooks.restored else 0.0
        try:
            await asyncio.wait(
                {end, ready}, timeout=ready_s + hook_s, return_when=asyncio.FIRST_COMPLETED
            )
            if ready.done():
                problem: str = ready.result()
                return problem
            if end.done():
                return f"the copy {end.result().describe()} before it was ready"
            return f"the copy did not become ready ({describe_ready(app)}) within {ready_s:g} s"
        finally:
            end.cancel()
            ready.cancel()
            await asyncio.wait({end, ready})

    async def _wait_ready(self, running: Running) -> str:
        """What is in the way of it, if anything is."""
        try:
            await self.wait_ready(running)
        except (TabaneError, OSError) as error:
            return str(error)
        return ""

    def _become_ready(self, running: Running) -> None:
        running.restoring, running.option = None, option_of(running)
        watch = self._executor.watch(running)
        self._executor.tasks.start(f"life {running.instance.id}", watch)
        self._executor.become_ready(running)

    async def _start_cold(
        self, running: Running, problem: str, began: float, *, has_turn: bool
    ) -> None:
        """Put another in its place, which begins as if there were no checkpoint."""
        executor, identity = self._executor, running.instance.id
        running.note = f"it could not begin from its checkpoint: {problem}"
        log.warning("%s of %s: %s", identity, running.instance.app, running.note)
        try:
            await executor.prepare_anew(running)
        except (TabaneError, OSError) as error:
            running.restoring = None
            executor.fail(running, str(error))
            return
        running.phases_us.pop("engine", None)
        running.phases_us["open"] = micros(self._clock.now() - began)
        app, admission = running.record.app, executor.admission
        async with nullcontext() if has_turn else admission.turn(app, identity, again=True):
            running.restoring = None
            await executor.launch_cold(running)


def _is_of_checkpoint(running: Running, error: Exception) -> bool:
    """Whether it tells anything of the checkpoint that it could not begin from: not when that was
    never open, as there was no room to open it or somebody had removed it."""
    if running.record.resumed or running.checkpoint is None:
        return isinstance(error, (Corrupt, EngineError))
    return True


def option_of(running: Running) -> str:
    """How it began, as of `tabane.model.WakeRecord`."""
    if running.record.resumed:
        return "resume"
    return "restore" if running.record.restored else "cold"
