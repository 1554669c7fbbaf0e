"""Has the resources of this node's instances follow their sessions, where their apps say so.

Gateways tell how many sessions they have in an instance; `tabane.scheduler.shares` says what
follows. Its processors are set in its cgroup, whatever its class. Its memory is bounded softly
there: what is above the bound the kernel takes back, and kills nothing for it. Both are written
beside what goes on: no session waits. What somebody ordered stands.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from tabane.clock import Timer
from tabane.errors import NotFound
from tabane.model import InstanceId, State
from tabane.node.running import Running
from tabane.runtimes.cgroups import Cgroup
from tabane.scheduler.shares import Share
from tabane.spec_readers import LARGEST

if TYPE_CHECKING:
    from tabane.node.agent import Agent

log = logging.getLogger(__name__)

ENDS = frozenset({State.STOPPING, State.FAILED, State.ABSENT})


class FollowingResources:
    """See the module's text."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._shares: dict[InstanceId, Share] = {}
        self._uses = itertools.count()
        self._timers: dict[InstanceId, Timer] = {}
        self._writing: set[InstanceId] = set()

    def follow(self, instance: InstanceId, state: State, running: Running | None) -> None:
        """An instance is in that state now; `running`: it is, and ready."""
        if state in ENDS:
            self._shares.pop(instance, None)
            if (timer := self._timers.pop(instance, None)) is not None:
                timer.cancel()
        elif running is not None:
            self._begin(running)

    def _begin(self, running: Running) -> None:
        instance, app = running.instance.id, running.record.app
        able = app.resources.follow and running.driver.capabilities.limit
        if able and instance not in self._shares:
            self._shares[instance] = Share.begin(app, self._agent.clock.now())
            self._act(instance)

    def hear(self, gateway: str, instance: InstanceId, sessions: int) -> None:
        """So many go through that gateway now; maybe before `follow` was told that it is ready."""
        running = self._agent.executor.running.get(instance)
        if running is not None and not running.stopping:
            self._begin(running)
        share = self._shares.get(instance)
        if share is not None:
            changed = share.hear(gateway, sessions, self._agent.clock.now())
            self._plan(instance, share)
            if changed:
                self._act(instance)

    @contextmanager
    def in_use(self, instance: InstanceId) -> Iterator[None]:
        """Somebody uses it beside its sessions, or it is at work: it has all meanwhile."""
        use = f"use {next(self._uses)}"
        self.hear(use, instance, LARGEST)
        try:
            yield
        finally:
            self.hear(use, instance, 0)

    def on_gateway_gone(self, gateway: str) -> None:
        for instance in list(self._shares):
            self.hear(gateway, instance, 0)

    def _plan(self, instance: InstanceId, share: Share) -> None:
        """Look when it may be lowered. A loop's timers may be a millisecond early."""
        if (timer := self._timers.pop(instance, None)) is not None:
            timer.cancel()
        if share.lower_at is not None:
            when = share.lower_at
            look = partial(self._look, instance, share)
            self._timers[instance] = self._agent.clock.call_at(when, look)

    def _look(self, instance: InstanceId, share: Share) -> None:
        if self._shares.get(instance) is not share:
            return
        if share.look(self._agent.clock.now()):
            self._act(instance)
        else:
            self._plan(instance, share)

    def _act(self, instance: InstanceId) -> None:
        self._plan(instance, self._shares[instance])
        if instance not in self._writing:
            self._writing.add(instance)
            self._agent.tasks.start(f"resources {instance}", self._write(instance))

    async def _write(self, instance: InstanceId) -> None:
        """Until what is set is what is wanted."""
        try:
            written = -1
            while (share := self._shares.get(instance)) is not None and share.level != written:
                written = share.level
                running = self._agent.executor.running.get(instance)
                if running is not None and running.record.ordered is None:
                    await asyncio.to_thread(_set, running, share.cpu, share.memory_bytes)
        except (NotFound, OSError) as error:
            log.info("the limits of %s stay as they are: %s", instance, error)
        finally:
            self._writing.discard(instance)


def _set(running: Running, cpu: float, memory_bytes: int | None) -> None:
    cgroup, app = Cgroup(running.instance.cgroup), running.record.app
    if app.resources.cpu_min is not None:
        cgroup.limit({"cpu": cpu})
    if memory_bytes is not None:
        in_memory = running.driver.capabilities.layer_in_memory
        cgroup.soften(memory_bytes + (app.resources.disk_bytes if in_memory else 0))
