"""Carries what an app's home decides to this node's executor, or to the agents of others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tabane.errors import TabaneError
from tabane.gateway.activation import InstanceEnded
from tabane.gateway.messages import ToGateway
from tabane.model import App, InstanceId, NodeName
from tabane.node import messages as say
from tabane.node.config import agent_of
from tabane.node.putting_away import save_as_told

if TYPE_CHECKING:
    from tabane.node.agent import Agent


class Performing:
    """See `tabane.node.home.Performer`."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def start_instance(
        self, node: NodeName, app: App, instance: InstanceId, *, resume: bool = False
    ) -> None:
        if self._is_here(node):
            self._agent.executor.start(app, instance, self._agent.clock.now(), resume=resume)
        else:
            there = self._start_there(node, say.StartInstance(app, instance, resume))
            self._agent.tasks.start(f"start {instance}", there)

    async def _start_there(self, node: NodeName, start: say.StartInstance) -> None:
        app, instance = start.app, start.instance
        try:
            await self._agent.send(agent_of(node), say.encode(start))
        except TabaneError as error:
            reason = f"{node} could not be told to start it: {error}"
            ended = InstanceEnded(app.cohort, instance, node, reason, failed=True)
            self._agent.home.handle(ended)

    def freeze_instance(
        self, node: NodeName, instance: InstanceId, number: int, reason: str = ""
    ) -> None:
        if self._is_here(node):
            self._agent.executor.freezer.freeze(instance, number, reason)
        else:
            freeze = say.FreezeInstance(instance, number, reason=reason)
            self._agent.tell(agent_of(node), freeze)

    def save_instance(
        self, node: NodeName, instance: InstanceId, number: int, *, ends: bool = False
    ) -> None:
        if self._is_here(node):
            save_as_told(self._agent.executor, instance, number, ends=ends)
        else:
            order = say.FreezeInstance(instance, number, save=True, ends=ends)
            self._agent.tell(agent_of(node), order)

    def thaw_instance(self, node: NodeName, instance: InstanceId) -> None:
        if self._is_here(node):
            self._agent.executor.freezer.thaw(instance)
        else:
            self._agent.tell(agent_of(node), say.ThawInstance(instance))

    def stop_instance(self, node: NodeName, instance: InstanceId, reason: str) -> None:
        if self._is_here(node):
            self._agent.executor.stop(instance, reason)
        else:
            self._agent.tell(agent_of(node), say.StopInstance(instance, reason))

    def release_instance(self, node: NodeName, instance: InstanceId) -> None:
        if self._is_here(node):
            self._agent.executor.release(instance)
        else:
            self._agent.tell(agent_of(node), say.ReleaseInstance(instance))

    def tell_gateway(self, gateway: str, message: ToGateway) -> None:
        self._agent.tell(gateway, message)

    def _is_here(self, node: NodeName) -> bool:
        return node == self._agent.config.key
