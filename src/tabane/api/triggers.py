"""The routes about triggers: what became of their moments, and trying one out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from tabane.api.shapes import Json, who_asks
from tabane.cron import next_after
from tabane.model import App, AppName
from tabane.reactions import Trigger
from tabane.security.audit import Line

if TYPE_CHECKING:
    from tabane.node.agent import Agent


def add_triggers(router: APIRouter, agent: Agent) -> None:
    @router.get("/triggers")
    async def list_triggers() -> Response:
        """Of all apps."""
        rows = [_row(agent, app, one) for app in agent.all_apps() for one in app.triggers]
        return Json({"triggers": rows, "silent": []})  # each node has its own copy of them

    @router.post("/apps/{namespace}/{name}/triggers/{trigger}/fire")
    async def fire(namespace: str, name: str, trigger: str, request: Request) -> Response:
        """Make its request now, by this node's gateway. 503: the app may not have got it."""
        key, who, now = AppName(f"{namespace}/{name}"), who_asks(request), agent.clock.wall()
        agent.triggers.find(key, trigger)
        line = Line(now, who.kind, who.uid, who.pid, "trigger", f"{key} {trigger}", via=who.via)
        agent.audit.add(line)
        outcome = await agent.triggers.fire(key, trigger, now)
        return Json({"app": key, "trigger": trigger, "outcome": outcome})


def _row(agent: Agent, app: App, trigger: Trigger) -> dict[str, Any]:
    row: dict[str, Any] = {"app": app.key, "name": trigger.key, "room": trigger.room or None}
    row |= {"cron": trigger.cron or None, "request": f"{trigger.method} {trigger.path}"}
    if not trigger.cron:
        return row
    mark = agent.triggers.mark(app.key, trigger)
    return row | {
        "timezone": trigger.timezone,
        "next": next_after(trigger.cron, trigger.timezone, agent.clock.wall()),
        "last": mark.last or None,
        "pending": mark.pending,
        "outcome": mark.outcome,
    }
