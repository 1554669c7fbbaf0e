"""What an agent does with the instances that the one before it left: adopts what runs, frozen or
not, and clears away what does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from tabane.errors import TabaneError
from tabane.gateway.activation import InstanceReady
from tabane.lifecycle import STANDING
from tabane.model import State
from tabane.node.ends import explain_end, with_last_line
from tabane.node.records import Record, read_record
from tabane.node.restoring import option_of
from tabane.node.running import Running, Transition, without_end
from tabane.runtimes import mounts
from tabane.runtimes.api import Handle
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.pods import log_of

if TYPE_CHECKING:
    import asyncio

    from tabane.node.instances import Executor


class Recovery:
    """See the module's text."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    async def recover(self, told: Sequence[Transition] = ()) -> None:
        """After a restart of the agent: adopt what runs, clear away what does not. Of what was
        `told` before, say the end of what the node forgot, since it was itself started anew."""
        records = []
        for path in sorted(self._executor.directory.glob("*/record.json")):
            if (record := read_record(path)) is not None:
                records.append(record)
            else:
                await self._clear_unknown(path.parent)
        links = [record.link for record in records if record.link is not None]
        await self._executor.links.recover(links)
        for record in records:
            await self._adopt(record)
        for last in without_end(told, self._executor.running):
            kept = self._executor.checkpoints.kept(last.instance) is not None
            reason = "its node ended; it is put away" if kept else "its node ended"
            self._executor.say(last.instance, last.app, State.ABSENT, reason)

    async def _clear_unknown(self, directory: Path) -> None:
        """End an instance whose record nobody can read: it cannot be answered for."""
        await Cgroup(f"{self._executor.cgroup}/{directory.name}").remove()
        mounts.remove_tree(directory)

    async def _adopt(self, record: Record) -> None:
        running = Running(record, self._executor.driver_named(record.instance.driver))
        self._executor.running[record.instance.id] = running
        handle, reason = None, ""
        try:
            handle = await self._take_over(running)
        except (TabaneError, OSError) as error:
            reason = f"its node's next agent could not take it over: {error}"
        if handle is None:
            await self._bury(running, reason)
            return
        instance = replace(record.instance, pid=int(str(handle.data["pid"])))
        running.record = replace(record, handle=handle, instance=instance)
        life = self._executor.tasks.start(f"life {instance.id}", self._executor.watch(running))
        if record.instance.state in STANDING:
            if await self._executor.putting_away.adopt(running):
                return
            await self._executor.freezer.adopt(running)
            self._executor.saver.adopt(running)
            if running.instance.state is State.READY:
                self._executor.notify(InstanceReady(running.instance))
        else:
            self._executor.tasks.start(f"ready {instance.id}", self._await_ready(running, life))

    async def _take_over(self, running: Running) -> Handle | None:
        """What goes on of an instance; None when nothing does."""
        record, spec, handle = running.record, self._executor.spec(running.record), None
        runs = record.instance.state in (State.STARTING, *STANDING)
        if runs and record.handle is not None:
            handle = await running.driver.recover(spec, record.handle)
        if handle is not None and record.app.services.needs_directory:
            await self._executor.services.open(spec)
        return handle

    async def _await_ready(self, running: Running, life: asyncio.Task[None]) -> None:
        """The rest of a start that the end of an agent interrupted."""
        running.began = self._executor.clock.now()
        running.phases_us["decide"] = 0
        running.option = option_of(running)
        wait = self._executor.restorer.wait_ready(running)
        ready = self._executor.tasks.start(f"ready {running.instance.id}", wait)
        await self._executor.await_verdict(running, ready, life)

    async def _bury(self, running: Running, reason: str = "") -> None:
        """It ended before this agent began, or has to end: clear it away, and say so."""
        running.stopping = running.ended = running.is_over = True
        reason = reason or await self._last_words(running)
        await self._executor.clean_up(running)
        record = running.record
        instance = replace(record.instance, state=State.ABSENT, reason=reason)
        running.record = replace(record, instance=instance)
        self._executor.save(running)
        self._executor.say(instance.id, instance.app, State.ABSENT, reason)
        self._executor.notify_ended(running, failed=record.instance.state in STANDING)

    async def _last_words(self, running: Running) -> str:
        """Why it ended, as far as its record or the spawner, which outlives agents, knows."""
        record, reason = running.record, "it ended while its node's agent was away"
        state = record.instance.state
        if record.handle is None or state not in (State.STARTING, *STANDING):
            return record.instance.reason or reason
        try:
            status = await running.driver.wait(record.handle)
        except TabaneError:
            return reason
        words = explain_end(record.app, status, was_ready=state in STANDING)
        log = log_of(self._executor.spec(record).log, status.container)
        return with_last_line(f"{words}, while its node's agent was away", log)
