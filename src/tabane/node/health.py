"""Ends the instances of this node that hang.

As long as an instance is ready it is checked, one check after the other. One that is frozen, saved
or stands still by somebody's order is not: it could not answer, and no check wakes it. What counts
is decided by `tabane.scheduler.health`. One that hangs is stopped here, whoever is home; its home
is told at once, so that it gets no more sessions and what they need is started elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from tabane.clock import sleep_until
from tabane.errors import TabaneError
from tabane.gateway.activation import StopAsked
from tabane.model import InstanceId, State
from tabane.node.checking import find_problem
from tabane.node.running import Running
from tabane.scheduler.health import Record

if TYPE_CHECKING:
    from tabane.node.agent import Agent

log = logging.getLogger(__name__)


class Health:
    """See the module's text."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._records: dict[InstanceId, Record] = {}
        self._checks: dict[InstanceId, asyncio.Task[None]] = {}

    def follow(self, instance: InstanceId, state: State, running: Running | None) -> None:
        """An instance is in that state now; `running`: it is, and ready."""
        if state in (State.ABSENT, State.FAILED):
            self._records.pop(instance, None)
        if running is None:
            if (checks := self._checks.pop(instance, None)) is not None:
                checks.cancel()
        elif running.record.app.health.is_set and instance not in self._checks:
            checks = self._agent.tasks.start(f"health {instance}", self._check(running))
            self._checks[instance] = checks

    async def _check(self, running: Running) -> None:
        """Again and again; the first `interval` later, since it has just been ready."""
        clock, policy, instance = self._agent.clock, running.record.app.health, running.instance
        record = self._records.setdefault(instance.id, Record(policy, clock.now()))
        record.on_rest()
        reason = ""
        while not reason:
            await sleep_until(clock, clock.now() + policy.interval_s)
            problem = "" if running.paused else await find_problem(running)
            if running.paused:
                record.on_rest()
            else:
                reason = record.on_check(problem, clock.now())
        await self._end(running, reason)

    async def _end(self, running: Running, reason: str) -> None:
        del self._checks[running.instance.id]  # what follows would cancel it
        hung = StopAsked(running.instance.cohort, running.instance.id, reason, hung=True)
        running.is_hung = True
        self._agent.executor.fail(running, reason)
        if not self._agent.joined:
            return
        try:
            await self._agent.ask_home(running.instance.cohort, hung)
        except TabaneError as error:
            log.info("the home of %s hears of its end only: %s", running.instance.app, error)
