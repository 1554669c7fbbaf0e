"""Those who follow what happens in the cluster: transitions of instances and, for who wants to know
what is around them, nodes that come and go, and apps that are removed.

A node tells its transitions once, to those that can be reached. So who depends on all of them asks
what there is whenever a node is heard of again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from tabane.middlecon import Presence
from tabane.middlecon.frames import Change as Fate
from tabane.model import ExitStatus, InstanceId, State
from tabane.node import messages as say
from tabane.node.config import agent_of, node_of
from tabane.node.control import APPS
from tabane.node.running import Transition
from tabane.store.api import Change
from tabane.supervise import harmless

if TYPE_CHECKING:
    from tabane.node.agent import Agent

Take = Callable[[bytes], None]


class Happenings:
    """See the module's text. What is taken is one JSON object each time."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._followers: set[Take] = set()
        self._around: set[Take] = set()

    def follow(self, take: Take, *, around: bool = False) -> Callable[[], None]:
        """Call `take` with every transition in the cluster from now on. `around`: first with the
        nodes that are not heard of, `{"silent": [...]}`, and later with those that are heard of no
        more, or again, `{"node", "linked"}`, and with apps, `{"app", "removed"}`. Another `silent`
        says that this node had heard of nobody for a while. Returns how to end it."""
        self._followers.add(take)
        if around:
            self._around.add(take)
            take(self._silence())

        def end() -> None:
            self._followers.discard(take)
            self._around.discard(take)

        return end

    def _silence(self) -> bytes:
        members = self._agent.room.members
        heard = {name for name, member in members.items() if member.known}
        heard.add(self._agent.me.name)
        silent = [node for node in self._agent.config.cluster.keys if agent_of(node) not in heard]
        return msgspec.json.encode({"silent": silent})

    def tell(self, transition: bytes) -> None:
        """Something happened to an instance, here or elsewhere."""
        _tell(self._followers, transition)

    def record(self, transition: Transition) -> None:
        """Something happened here: write it down, and tell all who follow."""
        agent, told = self._agent, msgspec.json.encode(transition)
        harmless("events", agent.events.add)(transition)
        self.tell(told)
        if agent.joined and agent.me.connected:
            agent.tasks.start("event", agent.room.cast(say.encode(say.Happened(told))))

    def on_part_end(self, told: dict[str, Any]) -> None:
        """One of the node's own processes ended, now or before this agent began: have that among
        the events, once."""
        why = told["why"]
        ended = msgspec.convert(why, ExitStatus).describe() if isinstance(why, dict) else why
        reason = f"{ended}; it is started again after {told['pause_s']:g} s"
        node, part = self._agent.config.key, told["part"]
        event = Transition(told["at"], InstanceId(""), "", node, State.FAILED, reason, part)
        if event not in self._agent.events.recent():
            self.record(event)

    def on_presence(self, presence: Presence) -> None:
        """A member of the room came, went, or cannot be seen."""
        node = node_of(presence.member)
        if presence.member == agent_of(node) and node != self._agent.config.key:
            linked = presence.change in (Fate.JOINED, Fate.BACK)
            _tell(self._around, msgspec.json.encode({"node": node, "linked": linked}))

    def begin_anew(self) -> None:
        """There is a new hub session."""
        _tell(self._around, self._silence())

    def on_changes(self, changes: tuple[Change, ...]) -> None:
        """The store changed."""
        for change in changes:
            if change.key.startswith(APPS) and change.value is None:
                what = {"app": change.key.removeprefix(APPS), "removed": True}
                _tell(self._around, msgspec.json.encode(what))


def _tell(followers: set[Take], what: bytes) -> None:
    for take in tuple(followers):
        harmless("follower", take)(what)
