"""On the control node: each data center's share of `min`, by what is alive and what runs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tabane.lifecycle import STANDING
from tabane.model import AppName
from tabane.node import messages as say
from tabane.node.control import FLOORS, Apps

if TYPE_CHECKING:
    from tabane.node.agent import Agent

ASK_S = 1.0
"""Who does not say so long what it runs counts as running nothing."""


async def spread(agent: Agent, apps: Apps) -> None:
    """Look at who is alive and what is ready, and store the shares that changed."""
    live = {node.partition("/")[0] for node in agent.nodes.live_nodes()}
    ready = await count_ready(agent)
    if agent.session.is_open:  # else this node sees only itself; it looks again when it is back
        await apps.spread(sorted(live), ready)


async def count_ready(agent: Agent) -> dict[AppName, Counter[str]]:
    """The ready instances of each app, frozen or not, by data center; nobody is asked when no app
    has a `min`."""
    found: dict[AppName, Counter[str]] = {}
    if not agent.replica.range(FLOORS):
        return found
    answers = await agent.ask_all(say.AskInstances(), ASK_S)
    for node, data in answers.by_node.items():
        for instance in say.parse(data).instances:
            if instance.state in STANDING:
                found.setdefault(instance.app, Counter())[node.partition("/")[0]] += 1
    return found
