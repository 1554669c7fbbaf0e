"""When a home that is new, or whose nodes changed, may start what nobody waits for.

To keep a floor it must know what runs. It waits for what each node of its data center says whose
hub can be seen, agents that are just starting again among them; for a node that says nothing, only
so long. Sessions that wait are served meanwhile as ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tabane.model import NodeName

if TYPE_CHECKING:
    from tabane.node.agent import Agent

SETTLE_S = 1.0
"""After nodes came: how long they have to say what they run, at the least."""
LONGEST_S = 5.0
"""An agent that was killed is back, and has said what runs, much sooner."""


class Settling:
    """See the module's text. When it is over, the catalog's floors are applied."""

    def __init__(self, agent: Agent) -> None:
        self.is_over = False
        self._agent = agent
        self._awaited: set[NodeName] = set()
        self._began = float("-inf")
        self._latest: float | None = None

    def begin(self) -> None:
        """Nodes came or went, or this agent did. However often that happens, it is over in time."""
        now = self._agent.clock.now()
        self.is_over, self._began = False, now
        self._latest = now + LONGEST_S if self._latest is None else self._latest
        self._awaited = {*self._agent.nodes.neighbours()} - {self._agent.config.key}
        self._look_at(now + SETTLE_S)

    def on_report(self, node: NodeName, asked_at: float) -> None:
        """A node said what it runs."""
        if self.is_over or asked_at < self._began:
            return
        self._awaited.discard(node)
        if not self._awaited:
            self._look_at(self._began + SETTLE_S)

    def _look_at(self, when: float) -> None:
        delay_s = max(0.0, when - self._agent.clock.now())
        self._agent.later.call("floors", delay_s, self._look)

    def _look(self) -> None:
        assert self._latest is not None
        now = self._agent.clock.now()
        settled = self._began + SETTLE_S
        if now < self._latest and now < settled:
            self._look_at(min(settled, self._latest))
        elif now < self._latest and self._awaited & {*self._agent.nodes.neighbours()}:
            self._look_at(self._latest)
        else:
            self.is_over, self._latest = True, None
            self._agent.catalog.apply_floors()
