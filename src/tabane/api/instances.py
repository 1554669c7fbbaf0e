"""The routes about instances. Any node takes any of them, and passes on what is another's."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from tabane.api import actions, logs
from tabane.api.conversing import ConversationResponse, FrameReader
from tabane.api.forwarding import elsewhere
from tabane.api.presence import BodyReader
from tabane.api.shapes import Body, Json, parse_body, who_asks
from tabane.model import InstanceId
from tabane.node.using import keep_in_use
from tabane.runtimes.api import TerminalSize

if TYPE_CHECKING:
    from tabane.node.agent import Agent

MOST_CELLS = 65535


class TerminalBody(Body):
    rows: int = Field(ge=1, le=MOST_CELLS)
    columns: int = Field(ge=1, le=MOST_CELLS)


class ExecBody(Body):
    """What the first frame of an exec says. `terminal`: have one, of that size. `timeout_s`: after
    that it is ended; else it goes on for as long as the client is there."""

    argv: list[str] = Field(min_length=1)
    user: str = ""
    workdir: str = ""
    env: dict[str, str] = Field(default_factory=dict)
    stdin: bool = False
    terminal: TerminalBody | None = None
    timeout_s: float | None = Field(default=None, gt=0, le=3600)
    container: str = ""
    """Of several; else the main one."""


class CopyBody(Body):
    """What the first frame of a copy says, as `runtimes.api.Transfer`."""

    path: str
    inward: bool
    as_named: bool = False
    user: str = ""
    container: str = ""


def add_instances(router: APIRouter, agent: Agent) -> None:
    @router.get("/instances")
    async def instances() -> Response:
        return Json(await actions.list_instances(agent))

    @router.post("/instances/{instance}/stop", status_code=202)
    async def stop(instance: str, request: Request) -> Response:
        """Drain it and stop it."""
        if (there := await elsewhere(agent, request, instance)) is not None:
            return there
        return Json(await actions.stop(agent, who_asks(request), instance), 202)

    @router.get("/instances/{instance}/log")
    async def log(
        instance: str,
        request: Request,
        tail: int = 0,
        follow: bool = False,
        since: str = "",
        container: str = "",
    ) -> Response:
        """Its output as CRI log lines, also after its end. `since`: an age as `10m`, or RFC 3339;
        `tail`: of those lines, the last; `container`: of several, else the main one's."""
        if (there := await elsewhere(agent, request, instance)) is not None:
            return there
        lines = logs.read_log(
            agent, instance, tail=max(0, tail), follow=follow, since=since, container=container
        )
        return StreamingResponse(lines, media_type="text/plain; charset=utf-8")

    def hold(instance: str) -> Callable[[], Coroutine[Any, Any, None]]:
        return partial(keep_in_use, agent, InstanceId(instance))

    @router.post("/instances/{instance}/exec")
    async def execute(instance: str, request: Request) -> Response:
        """Run a command inside, in frames both ways (see `api/frames.py`)."""
        if (there := await elsewhere(agent, request, instance)) is not None:
            return there
        said = FrameReader(BodyReader(request))
        body = parse_body(ExecBody, await said.begin())
        size = body.terminal
        talk = await actions.execute(
            agent,
            who_asks(request),
            instance,
            tuple(body.argv),
            user=body.user,
            workdir=body.workdir,
            env=body.env,
            stdin=body.stdin,
            terminal=TerminalSize(size.rows, size.columns) if size is not None else None,
            container=body.container,
        )
        what = f"{body.argv[0]} in {instance}"
        return ConversationResponse(talk, said, hold(instance), what, body.timeout_s)

    @router.post("/instances/{instance}/copy")
    async def copy(instance: str, request: Request) -> Response:
        """Copy files in or out as a tar stream, in frames both ways; the exit code is 0 when all
        went well."""
        if (there := await elsewhere(agent, request, instance)) is not None:
            return there
        said = FrameReader(BodyReader(request))
        body = parse_body(CopyBody, await said.begin())
        talk = await actions.copy(
            agent,
            who_asks(request),
            instance,
            body.path,
            inward=body.inward,
            as_named=body.as_named,
            user=body.user,
            container=body.container,
        )
        return ConversationResponse(talk, said, hold(instance), f"the copy of {body.path}")
