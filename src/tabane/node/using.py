"""What people do inside an instance (a command, a copy, a terminal) holds it as a session does.

While it lasts, the app's home is told once a second that the instance is in use for a while yet. It
is a statement of the node's, not a slot: limits on sessions do not count it, and when its node or
its home goes, nothing has to be given back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tabane.clock import sleep_until
from tabane.gateway.messages import StillUsed
from tabane.model import InstanceId
from tabane.node.config import agent_of

if TYPE_CHECKING:
    from tabane.node.agent import Agent

AGAIN_S = 1.0
FOR_S = 3 * AGAIN_S
"""From each time it is told: one that is late, or lost with a session, lets no instance go."""


async def keep_in_use(agent: Agent, instance: InstanceId) -> None:
    """Until cancelled, or its end, have the instance not taken for idle, however short its
    `stop_after`, and with all of its resources."""
    with agent.watching.resources.in_use(instance):
        while agent.executor.runs(instance):
            running = agent.executor.get(instance)
            agent.executor.freezer.hold(running)
            app = running.instance.cohort
            used = StillUsed(app, instance, -FOR_S)
            if agent.nodes.is_home(app):
                agent.home.hear(agent_of(agent.config.key), used)
            else:
                agent.tell(agent_of(agent.nodes.home_of(app)), used)
            await sleep_until(agent.clock, agent.clock.now() + AGAIN_S)
