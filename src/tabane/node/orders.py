"""Orders to processes and instances, from any node of the cluster to those that have them.

An order goes to each node once, with all of its targets that are there, and all nodes at the same
time. Where a node does not answer, its targets' outcomes say whether anything may have been done;
asking again with the same idempotency key does it at most once.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from tabane.errors import Conflict, Denied, NotFound, Stale, TabaneError, Unsupported
from tabane.k2i.control import Control, SeenInstance
from tabane.k2i.kernel import instance_at
from tabane.k2i.orders import (
    Confine,
    InstanceAction,
    InstanceOrder,
    InstanceOutcome,
    InstanceTarget,
    Order,
    Outcome,
    Pause,
    wanted,
)
from tabane.k2i.permission import Here
from tabane.lifecycle import AT_REST, STANDING
from tabane.model import Instance, InstanceId, NodeName, State
from tabane.node import k2i_messages as wire
from tabane.node import messages as say
from tabane.node.calling import call
from tabane.node.config import agent_of, node_of
from tabane.node.ends import HARMLESS_SIGNALS
from tabane.node.instances import Executor
from tabane.node.running import Running
from tabane.runtimes.api import Handle
from tabane.runtimes.cgroups import Cgroup
from tabane.security.identity import Principal

if TYPE_CHECKING:
    from tabane.node.agent import Agent

ACT_S = 10.0
PAUSABLE = (State.STARTING, *STANDING)


class Orders:
    """Takes orders for the whole cluster (`obey`), and obeys those of other nodes (`act`)."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.control = Control(
            Here(agent.config.key, agent.config.incarnation),
            agent.audit,
            agent.tasks,
            surroundings=NodeSurroundings(agent.executor, os.getppid()),
            instances=NodeInstances(agent.executor),
            on_change=agent.table.touch,
            clock=agent.clock,
        )

    async def obey(self, order: Order, who: Principal) -> tuple[Outcome, ...]:
        """An outcome for each target, in their order. Raises `UsageError`, `Denied`."""
        await self.control.check(order, who)
        places = list(dict.fromkeys(target.place for target in order.targets))
        answers = await asyncio.gather(*(self._obey_at(place, order, who) for place in places))
        outcomes = dict(zip(places, map(iter, answers), strict=True))
        return tuple(next(outcomes[target.place]) for target in order.targets)

    async def _obey_at(self, place: NodeName, order: Order, who: Principal) -> tuple[Outcome, ...]:
        targets = tuple(target for target in order.targets if target.place == place)
        part = replace(order, targets=targets)
        try:
            if place == self._agent.config.key:
                return await self.control.obey(part, who)
            answer = await self._call(place, wire.ActK2i(part, who))
            return tuple(answer.outcomes)
        except TabaneError as error:
            return tuple(Outcome(target, error.code, error.message) for target in targets)

    async def obey_instance(self, order: InstanceOrder, who: Principal) -> InstanceOutcome:
        """Raises why it was not done, or may not have been."""
        if order.target.node == self._agent.config.key:
            return await self.control.obey_instance(order, who)
        answer = await self._call(order.target.node, wire.ActOnInstance(order, who))
        outcome: InstanceOutcome = answer.outcome
        return outcome

    async def act(self, sender: str, body: wire.ActK2i | wire.ActOnInstance) -> bytes:
        """For another node's agent, which answers for `who`."""
        via = node_of(sender)
        if sender != agent_of(via) or via not in self._nodes():
            raise Denied(f"{sender} is no agent of this cluster: only they pass orders on")
        who = replace(body.who, via=via)
        if isinstance(body, wire.ActOnInstance):
            done = await self.control.obey_instance(body.order, who)
            return say.encode(wire.ActedOnInstance(done))
        return say.encode(wire.ActedK2i(await self.control.obey(body.order, who)))

    async def _call(self, node: NodeName, message: say.Message) -> Any:
        """Raises as `call` does, and `NotFound`."""
        if node not in self._nodes():
            raise NotFound(f"there is no node {node or 'without a name'} in this cluster")
        hint = "with an idempotency key, the same order again is done once at most"
        return await call(self._agent, node, message, timeout_s=ACT_S, hint=hint)

    def _nodes(self) -> tuple[NodeName, ...]:
        return self._agent.config.cluster.keys


class NodeSurroundings:
    """Whose a process is. All that the holder starts, as this agent, is a node's own, except for
    instances."""

    def __init__(self, executor: Executor, holder: int) -> None:
        self._executor = executor
        self._holder = holder

    def owner(self, instance: str) -> int:
        try:
            return self._executor.get(InstanceId(instance)).record.app.owner
        except NotFound:
            return -1

    def protects(self, pid: int, ppid: int, instance: str) -> str:
        if pid == self._holder:
            return "the holder of its node"
        return "a process of Tabane's own" if ppid == self._holder and not instance else ""

    def on_signal(self, pid: int, number: int) -> None:
        """What ends by it was not going wrong."""
        if number not in HARMLESS_SIGNALS:
            self._executor.on_signal(InstanceId(instance_at(pid)))


def with_pause(instance: Instance) -> Instance:
    """An instance with whether it is paused: orders do that beside its life cycle, so that its
    cgroup alone knows."""
    runs = instance.state in (State.STARTING, State.READY) and instance.cgroup
    paused = bool(runs) and Cgroup(instance.cgroup).is_frozen()
    return replace(instance, paused=True) if paused else instance


def limits_of(running: Running) -> dict[str, float]:
    """What it may use now, as its app file means it. Its processors may have followed its sessions;
    what stands in its cgroup else is more, as its engine's own share."""
    resources = running.record.resources
    cpu = Cgroup(running.instance.cgroup).limits().get("cpu", resources.cpu)
    return {"cpu": cpu, "memory_bytes": resources.memory_bytes, "pids": resources.pids}


class NodeInstances:
    """See `tabane.k2i.control.Instances`."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def look(self, target: InstanceTarget, action: InstanceAction) -> SeenInstance:
        running, _ = self._find(target)
        app, cgroup = running.record.app, Cgroup(running.instance.cgroup)
        if isinstance(action, Confine):
            if not running.driver.capabilities.limit:
                raise Unsupported(
                    f"{target}: its driver {running.driver.name} cannot change limits"
                )
            now = limits_of(running)
        else:
            if not running.driver.capabilities.freeze:
                raise Unsupported(f"{target}: its driver {running.driver.name} cannot freeze")
            is_at_rest = running.instance.state in (*AT_REST, State.CHECKPOINTING)
            now = {"paused": float(cgroup.is_frozen() and not is_at_rest)}
        return SeenInstance(app.key, app.owner, app.resources, now)

    async def do(self, target: InstanceTarget, action: InstanceAction) -> None:
        running, handle = self._find(target)
        if isinstance(action, Confine):
            await self._confine(running, handle, action)
        elif isinstance(action, Pause):
            await self._executor.freezer.wait_awake(running)
            running.paused = True
            await running.driver.freeze(handle)
            if running.stopping:
                await running.driver.thaw(handle)  # what is frozen does not end
                raise Conflict(f"{target} is being stopped, and was not paused")
        else:
            await self._executor.freezer.wait_awake(running)
            running.paused = False
            await running.driver.thaw(handle)

    async def _confine(self, running: Running, handle: Handle, action: Confine) -> None:
        """By its driver, which knows what its engine needs beside it. Remembered before, so that
        what follows sessions keeps away."""
        before, limits = running.record, limits_of(running) | wanted(action)
        ordered = replace(before.resources, **limits)
        running.record = replace(before, ordered=ordered)
        try:
            await running.driver.limit(handle, ordered)
        except BaseException:
            running.record = replace(running.record, ordered=before.ordered)
            raise
        self._executor.save(running)

    def _find(self, target: InstanceTarget) -> tuple[Running, Handle]:
        generation = target.generation
        running = self._executor.get(generation.instance)
        now = running.instance.generation
        if now != generation:
            raise Stale(f"{target}: it is in generation {now.counter} now, not the one you mean")
        handle, state = running.record.handle, running.instance.state
        if handle is None or running.stopping or state not in PAUSABLE:
            raise Conflict(f"{target} is {state}: only one that runs can be changed")
        return running, handle
