"""What a node has counted since its agent began: how long wakes took, and what became of instances.

Its gateways count for themselves, and are asked (`ask_gateways`). `tabane.api.metrics` exposes all.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tabane.errors import TabaneError
from tabane.model import State, WakeRecord
from tabane.node import messages as say
from tabane.node.running import Transition

if TYPE_CHECKING:
    from tabane.node.agent import Agent

BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""From a thaw to a machine's boot."""
ASK_S = 2.0

log = logging.getLogger(__name__)


@dataclass
class Histogram:
    """`counts[i]` took at most `BOUNDS_S[i]`, and longer than the bound before; the last: longer
    than all."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    total_s: float = 0.0

    def add(self, took_s: float) -> None:
        self.counts[bisect_left(BOUNDS_S, took_s)] += 1
        self.total_s += took_s


class Meters:
    """See the module's text."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.wakes: dict[tuple[str, str], Histogram] = {}
        """By class and option: what sessions waited until their first byte."""
        self.phases: dict[tuple[str, str, str], Histogram] = {}
        """By class, option and phase."""
        self.states: Counter[State] = Counter()
        """How many times an instance entered each."""
        self.part_ends: Counter[str] = Counter()
        """How many times a process of the node's own ended unasked, by its name."""
        agent.wakes.follow(self._on_wake)
        agent.events.follow(self._on_transition)

    def _on_wake(self, record: WakeRecord) -> None:
        app = self._agent.app(record.app)
        isolation = str(app.isolation) if app is not None else "removed"
        wakes = self.wakes.setdefault((isolation, record.option), Histogram())
        wakes.add(record.total_us / 1e6)
        for phase, took_us in record.phases_us.items():
            key = isolation, record.option, phase
            self.phases.setdefault(key, Histogram()).add(took_us / 1e6)

    def _on_transition(self, transition: Transition) -> None:
        if transition.part:
            self.part_ends[transition.part] += 1
        else:
            self.states[transition.state] += 1


async def ask_gateways(agent: Agent) -> dict[str, say.Counted | None]:
    """What each gateway of this node has counted, by its name; None: it does not answer."""
    names = [f"gateway-{number}" for number in range(agent.config.gateways)]
    return dict(
        zip(names, await asyncio.gather(*(_ask(agent, name) for name in names)), strict=True)
    )


async def _ask(agent: Agent, name: str) -> Any:
    question = say.encode(say.AskCounted())
    try:
        answer = await agent.me.call(f"{agent.config.key}/{name}", question, timeout_s=ASK_S)
    except TabaneError as error:
        log.info("%s does not say what it counted: %s", name, error)
        return None
    return say.parse(answer)
