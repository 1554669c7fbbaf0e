"""The routes about checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import APIRouter, Request, Response

from tabane.api.checks import check_digest
from tabane.api.removing import have_done, note, sum_up
from tabane.api.shapes import Body, Json, who_asks
from tabane.node import messages as say
from tabane.node.checkpoints import CheckpointRow, OwnCheckpoints

if TYPE_CHECKING:
    from tabane.node.agent import Agent

ASK_S = 5.0
HINT = "look with `tabane checkpoint ls`"


class CollectBody(Body):
    """`dry_run`: only say what would be removed. `node`: only of this one."""

    dry_run: bool = False
    node: str = ""


def add_checkpoints(router: APIRouter, agent: Agent) -> None:
    @router.get("/checkpoints")
    async def list_checkpoints() -> Response:
        """Of all nodes; `stores`: what theirs take and may take; `silent`: those that did not
        say."""
        answers = await agent.ask_all(say.AskCheckpoints(), ASK_S)
        told = [msgspec.json.decode(one, type=OwnCheckpoints) for one in answers.by_node.values()]
        return Json(
            {
                "checkpoints": [_flat(row) for own in told for row in own.checkpoints],
                "stores": [own.store for own in told],
                "silent": answers.silent,
            }
        )

    @router.get("/checkpoints/{digest}/description")
    async def describe(digest: str) -> Response:
        """One of this node's: its manifest, and why it would not be restored here."""
        check_digest(digest)
        return Json(await agent.checkpoints.describe(digest))

    @router.delete("/checkpoints/{digest}")
    async def remove(digest: str, request: Request, node: str = "") -> Response:
        """From all nodes, or one: the app starts without. Where it is open it stays."""
        note(agent, who_asks(request), "checkpoint-rm", check_digest(digest))
        return Json(sum_up(await have_done(agent, say.RemoveCheckpoint(digest), node, HINT)))

    @router.post("/checkpoints/gc")
    async def collect(body: CollectBody, request: Request) -> Response:
        """Remove what no app as it is deployed would use."""
        if not body.dry_run:
            note(agent, who_asks(request), "checkpoint-gc", body.node or "all nodes")
        order = say.CollectCheckpoints(body.dry_run)
        return Json(sum_up(await have_done(agent, order, body.node, HINT)))


def _flat(row: CheckpointRow) -> dict[str, Any]:
    """A checkpoint's row without others inside."""
    fields = msgspec.structs.asdict(row)
    stored = msgspec.structs.asdict(fields.pop("checkpoint"))
    about = msgspec.structs.asdict(stored.pop("about"))
    about.pop("cpu_flags")
    return {**fields, **stored, **about}
