"""What nodes have of the apps whose home is here: asked for when a node or this home is new."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from msgspec.structs import replace

from tabane.errors import TabaneError
from tabane.gateway.events import NOTHING_SAVED, SavedThere
from tabane.model import Instance, NodeName
from tabane.node import messages as say
from tabane.node.config import agent_of

if TYPE_CHECKING:
    from tabane.node.agent import Agent

log = logging.getLogger(__name__)

ANSWER_S = 5.0


class Reports:
    """See the module's text."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def ask(self, node: NodeName) -> None:
        """Another node, if its agent is there."""
        agent = self._agent
        if node != agent.config.key and agent_of(node) in agent.room.members:
            agent.tasks.start(f"ask {node}", self._ask(node))

    async def _ask(self, node: NodeName) -> None:
        asked_at, me = self._agent.clock.now(), self._agent.me
        question = say.encode(say.AskInstances())
        try:
            data = await me.call(agent_of(node), question, timeout_s=ANSWER_S)
        except TabaneError as error:
            log.info("%s did not say what it runs, it is asked when it is back: %s", node, error)
            return
        told = say.parse(data)
        self._on_report(node, told.instances, asked_at, told.saved)

    def begin_home(self) -> None:
        """What runs here its home is to know before gateways ask for slots; of what they hold it
        knows nothing yet."""
        self._agent.home.expect(self._agent.nodes.gateways())
        self._tell_home(self._agent.config.key, *self._own())

    def tell_own(self) -> None:
        """This node's, to its own homes."""
        self._on_report(self._agent.config.key, *self._own())

    def on_term_over(self, hub: str) -> None:
        """A node is gone, and all that it had."""
        self._on_report(NodeName(hub), (), self._agent.clock.now())

    def _own(self) -> tuple[list[Instance], float, SavedThere]:
        agent = self._agent
        return agent.executor.instances(), agent.clock.now(), agent.checkpoints.told()

    def _on_report(
        self,
        node: NodeName,
        instances: Iterable[Instance],
        asked_at: float,
        saved: SavedThere = NOTHING_SAVED,
    ) -> None:
        self._tell_home(node, instances, asked_at, saved)
        self._agent.settling.on_report(node, asked_at)

    def _tell_home(
        self, node: NodeName, instances: Iterable[Instance], asked_at: float, saved: SavedThere
    ) -> None:
        """What is of apps whose home is here."""
        is_home = self._agent.nodes.is_home
        mine = tuple(instance for instance in instances if is_home(instance.cohort))
        away = tuple(one for one in saved.away if is_home(one.app))
        self._agent.home.on_node_report(node, mine, asked_at, replace(saved, away=away))
