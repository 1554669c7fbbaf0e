"""How far each node's replica of the store is behind, as the agents tell each other.

Each agent publishes the revision it has as its state `revision`. A replica that stays behind the
control node's and hears nothing asks to be sent the rest again: whatever lost its first asking, or
made the publisher give up, an acknowledged deploy reaches every node that is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tabane.middlecon import StateChange
from tabane.model import NodeName
from tabane.node import messages as say
from tabane.node.config import agent_of

if TYPE_CHECKING:
    from tabane.node.agent import Agent
    from tabane.node.replication import Follower

KEY = "revision"
TELL_S = 0.1
"""Revisions are told at most so often: every agent hears of each."""
ASK_AGAIN_S = 5.0
"""How long a replica may be behind and hear nothing; longer than the publisher's pauses."""


class Lag:
    """See the module's text. The agent has joined the room of agents."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._control = agent.config.cluster.control
        agent.replica.subscribe(lambda _: self._plan_telling())
        agent.room.on_state(self._on_state)
        self._plan_telling()

    def behind(self, node: NodeName) -> int | None:
        """How many revisions; None when it did not tell, or the control node did not."""
        there, newest = self._revision(node), self._revision(self._control)
        return max(0, newest - there) if there is not None and newest is not None else None

    def _revision(self, node: NodeName) -> int | None:
        if node == self._agent.config.key:
            return self._agent.replica.revision
        told = self._agent.room.state.get(agent_of(node), {}).get(KEY)
        return int(told) if told is not None else None

    def _plan_telling(self) -> None:
        self._agent.later.call("tell revision", TELL_S, self._start_telling)

    def _start_telling(self) -> None:
        revision = b"%d" % self._agent.replica.revision
        self._agent.tasks.start("revision", self._agent.me.state.put(KEY, revision))

    def _on_state(self, change: StateChange) -> None:
        if change.member == agent_of(self._control) and change.key == KEY:
            self._watch()

    def _watch(self) -> None:
        if (follower := self._agent.follower) is not None and self.behind(self._agent.config.key):
            heard = follower.heard
            self._agent.later.call("lag", ASK_AGAIN_S, lambda: self._look(follower, heard))

    def _look(self, follower: Follower, heard: int) -> None:
        if self.behind(self._agent.config.key) and heard == follower.heard:
            self._agent.tell(agent_of(self._control), say.StoreFollow(self._agent.replica.revision))
        self._watch()
