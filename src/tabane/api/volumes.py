"""The routes about volumes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from fastapi import APIRouter, Request, Response

from tabane.api.shapes import Json, who_asks
from tabane.model import AppName
from tabane.node import volumes
from tabane.security.audit import Line
from tabane.security.identity import Principal

if TYPE_CHECKING:
    from tabane.node.agent import Agent


def add_volumes(router: APIRouter, agent: Agent) -> None:
    @router.get("/volumes")
    async def list_volumes() -> Response:
        """Of all nodes; `silent`: those that did not say."""
        rows, silent = await volumes.list_all(agent)
        return Json({"volumes": msgspec.to_builtins(rows), "silent": silent})

    @router.delete("/volumes/{namespace}/{app}/{name}")
    async def remove(namespace: str, app: str, name: str, request: Request) -> Response:
        """Remove a volume for good, and all that is in it. 409: the app uses it."""
        key = AppName(f"{namespace}/{app}")
        node = await volumes.drop(agent, key, name)
        _audit(agent, who_asks(request), "volume-rm", f"{key} {name}")
        return Json({"app": key, "name": name, "node": node})

    @router.delete("/volumes/{namespace}/{app}")
    async def give_up(namespace: str, app: str, request: Request) -> Response:
        """Forget an app's volumes, whose node is lost. 409: it is there."""
        key = AppName(f"{namespace}/{app}")
        node = await volumes.give_up(agent, key)
        _audit(agent, who_asks(request), "volume-forget", key)
        return Json({"app": key, "node": node})


def _audit(agent: Agent, who: Principal, action: str, target: str) -> None:
    line = Line(agent.clock.wall(), who.kind, who.uid, who.pid, action, target, via=who.via)
    agent.audit.add(line)
