"""One node's agent asks another's to do something, and says truly what became of that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tabane.errors import (
    Asleep,
    Busy,
    Closed,
    NotFound,
    Refused,
    TabaneError,
    TimedOut,
    Unavailable,
    Unreachable,
)
from tabane.model import NodeName
from tabane.node import messages as say
from tabane.node.config import agent_of

if TYPE_CHECKING:
    from tabane.node.agent import Agent

HUB_BACK_S = 2.0
"""How long a hub that was just lost may take to be back."""
RETRY_AFTER_S = 5.0


async def call(
    agent: Agent, node: NodeName, message: say.Message, *, timeout_s: float, hint: str
) -> Any:
    """What the other agent answers. Raises what it refuses with. When it was not even told:
    `Unreachable`, which says that nothing was done. When nobody knows: `Unreachable` or `TimedOut`,
    which says so, and `hint`: what to do then."""
    try:
        await agent.session.wait(HUB_BACK_S)
    except Closed as error:
        raise _untold(node, error) from error
    try:
        data = await agent.me.call(agent_of(node), say.encode(message), timeout_s=timeout_s)
    except (NotFound, Busy, Asleep, Unreachable) as error:
        raise _untold(node, error) from error
    except (Closed, Unavailable, Refused) as error:
        if isinstance(error, Refused) and not error.reason:  # it has no handler yet
            raise _untold(node, error) from error
        problem = f"{node} did not say whether it was done ({error}): {hint}"
        kind = TimedOut if isinstance(error, TimedOut) else Unreachable
        raise kind(problem, retry_after_s=RETRY_AFTER_S) from error
    answer = say.parse(data)
    if isinstance(answer, say.Failure):
        raise say.to_error(answer)
    return answer


def _untold(node: NodeName, error: TabaneError) -> Unreachable:
    problem = f"nothing was done, {node} cannot be told now: {error}"
    return Unreachable(problem, retry_after_s=RETRY_AFTER_S)
