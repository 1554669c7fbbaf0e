"""Removing what nodes keep, images or checkpoints: on all nodes or one, and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tabane.model import NodeName
from tabane.node import messages as say
from tabane.node.answering import Answers
from tabane.node.calling import call
from tabane.security.audit import Line
from tabane.security.identity import Principal

if TYPE_CHECKING:
    from tabane.node.agent import Agent

REMOVE_S = 60.0
"""Large trees take their time."""

Order = say.RemoveImage | say.CollectImages | say.RemoveCheckpoint | say.CollectCheckpoints


async def have_done(agent: Agent, order: Order, node: str, hint: str) -> Answers:
    """On one node, or on all. Raises as `call` for one that cannot be reached."""
    if not node:
        return await agent.ask_all(order, REMOVE_S)
    key = agent.config.cluster.node(node).key
    if key == agent.config.key:
        data = await agent.answers.answer("", order) or b""
    else:
        data = say.encode(await call(agent, key, order, timeout_s=REMOVE_S, hint=hint))
    return Answers({NodeName(key): data}, ())


def sum_up(answers: Answers) -> dict[str, Any]:
    removed = []
    for node, data in answers.by_node.items():
        answer, row = say.parse(data), {"node": node, "digests": (), "bytes": 0, "problem": ""}
        if isinstance(answer, say.Failure):
            row["problem"] = answer.message
        else:
            row |= {"digests": answer.digests, "bytes": answer.bytes}
        removed.append(row)
    return {"removed": removed, "silent": answers.silent}


def note(agent: Agent, who: Principal, action: str, target: str) -> None:
    """For the audit log."""
    line = Line(agent.clock.wall(), who.kind, who.uid, who.pid, action, target, via=who.via)
    agent.audit.add(line)
