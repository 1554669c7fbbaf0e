"""The control API of a node: parse, act, render. `/api/v1/...`, and k2i's `/v1`, `/v2` beside it.

Any node takes any request: what belongs to another node is asked of it. Answers that gather from
several nodes carry `silent`, the nodes that did not answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import msgspec
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from pydantic import Field
from starlette.exceptions import HTTPException

from tabane.api import actions, deploying
from tabane.api.checkpoints import add_checkpoints
from tabane.api.deploying import AppFile
from tabane.api.guard import Guard
from tabane.api.images import add_images
from tabane.api.instances import add_instances
from tabane.api.metrics import build_metrics
from tabane.api.problems import headers_of, status_of, to_body
from tabane.api.shapes import Body, Json, who_asks
from tabane.api.triggers import add_triggers
from tabane.api.volumes import add_volumes
from tabane.errors import Busy, NotFound, SystemFault, TabaneError, UsageError
from tabane.k2i import build_router as build_k2i
from tabane.k2i.bodies import JsonRoute
from tabane.k2i.control_api import build_control_router
from tabane.k2i.description import add_schemas
from tabane.k2i.v2 import build_v2
from tabane.spec_readers import LARGEST
from tabane.units import shorten

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from tabane.node.agent import Agent

MAX_RECORDS = 2000
MOST_APPS = 500
"""In one commit, which has to fit into one message to every node."""
LARGEST_UID = (1 << 32) - 2


class FileBody(Body):
    """An app file's text and name, and the image's digest (`sha256:...`, or `host`). `images`:
    those of its containers, by their name, that have one of their own. `owner`: the uid of whose it
    is to be; as it is, or at first whoever asks, unless told."""

    text: str
    file: str = "app.toml"
    image: str
    images: dict[str, str] = Field(default_factory=dict)
    owner: int | None = Field(default=None, ge=0, le=LARGEST_UID)

    def app_file(self) -> AppFile:
        return AppFile(self.text, self.file, self.image, self.images, self.owner)


class DeployBody(FileBody):
    """`force`: a new revision even when nothing has changed."""

    force: bool = False


class DeployAllBody(Body):
    """Up to `MOST_APPS` of them."""

    apps: list[FileBody] = Field(min_length=1, max_length=MOST_APPS)
    force: bool = False


class RemoveAllBody(Body):
    """Their names with namespaces, up to `MOST_APPS`."""

    apps: list[str] = Field(min_length=1, max_length=MOST_APPS)


class ScaleBody(Body):
    min: int | None = Field(default=None, ge=0, le=LARGEST)
    max: int | None = Field(default=None, ge=1, le=LARGEST)


def build_app(agent: Agent) -> ASGIApp:
    """The whole API behind its guard."""
    app = FastAPI(title="Tabane", version="1", docs_url=None, redoc_url=None)
    app.include_router(build_control(agent), prefix="/api/v1")
    app.include_router(build_metrics(agent))
    app.include_router(build_k2i(agent.table))
    app.include_router(build_v2(agent.k2i, agent.cluster_k2i))
    app.include_router(build_control_router(agent.orders))
    add_schemas(app)
    app.add_api_route("/", _show_way, include_in_schema=False)
    handle_errors(app)
    return Guard(app, agent.token, frozenset({agent.config.node.address}))


def handle_errors(app: FastAPI) -> None:
    """Have it answer errors as all of the API does."""
    app.add_exception_handler(TabaneError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_fault)


async def _show_way() -> Response:
    """What there is, to who asks for nothing in particular."""
    k2i = {"v1": "/v1/proc", "v2": "/v2/processes"}
    ways = {"api": "/api/v1/apps", **k2i, "figures": "/metrics"}
    return Json({**ways, "description": "/openapi.json"})


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TabaneError)
    return Json(to_body(error), status_of(error), headers_of(error))


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return Json({"error": "usage", "message": f"{where}: {first['msg']}"}, 400)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses by itself."""
    assert isinstance(error, HTTPException)
    code = NotFound.code if error.status_code == 404 else UsageError.code
    what = f"{request.method} {shorten(request.url.path)}"
    body = {"error": code, "message": f"{what}: {error.detail}"}
    return Json(body, error.status_code, dict(error.headers or {}))


async def _on_fault(request: Request, error: Exception) -> Response:
    """A mistake of ours, which the guard logs."""
    fault = SystemFault("this node made a mistake, and its log says which: it is not your request")
    return Json(to_body(fault), status_of(fault))


def build_control(agent: Agent) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)
    _add_apps(router, agent)
    add_instances(router, agent)
    _add_records(router, agent)
    add_images(router, agent)
    add_checkpoints(router, agent)
    add_volumes(router, agent)
    add_triggers(router, agent)
    _add_node(router, agent)
    return router


def _add_apps(router: APIRouter, agent: Agent) -> None:
    @router.post("/apps", status_code=201)
    async def deploy(body: DeployBody, request: Request) -> Response:
        """Store an app durably as a new revision; says which data centers know it. 200: it is
        stored as it is already."""
        stored = await deploying.deploy(agent, who_asks(request), body.app_file(), force=body.force)
        return Json(stored, 201 if stored["changed"] else 200)

    @router.post("/deployments", status_code=201)
    async def deploy_all(body: DeployAllBody, request: Request) -> Response:
        """Store several in one commit, or none of them. 200: all are stored as they are already."""
        files = [app.app_file() for app in body.apps]
        stored = await deploying.deploy_all(agent, who_asks(request), files, force=body.force)
        return Json(stored, 201 if any(app["changed"] for app in stored["apps"]) else 200)

    @router.post("/removals")
    async def remove_all(body: RemoveAllBody, request: Request) -> Response:
        """Remove several in one commit, or none of them."""
        return Json(await deploying.remove_all(agent, who_asks(request), body.apps))

    @router.get("/apps")
    async def apps() -> Response:
        return Json(await actions.list_apps(agent))

    @router.get("/apps/{namespace}/{name}")
    async def show(namespace: str, name: str) -> Response:
        return Json(await actions.show(agent, f"{namespace}/{name}"))

    @router.delete("/apps/{namespace}/{name}")
    async def remove(namespace: str, name: str, request: Request) -> Response:
        return Json(await deploying.remove(agent, who_asks(request), f"{namespace}/{name}"))

    @router.post("/apps/{namespace}/{name}/scale")
    async def scale(namespace: str, name: str, body: ScaleBody, request: Request) -> Response:
        key = f"{namespace}/{name}"
        return Json(await deploying.scale(agent, who_asks(request), key, body.min, body.max))


def _add_records(router: APIRouter, agent: Agent) -> None:
    @router.get("/wakes")
    async def wakes(limit: int = 100) -> Response:
        return Json(await actions.records(agent, "wakes", min(max(1, limit), MAX_RECORDS)))

    @router.get("/events")
    async def events(limit: int = 100, follow: bool = False, around: bool = False) -> Response:
        """The latest, or what comes from now on, a JSON object a line; `around`: see
        `node/happenings.py`."""
        if not follow:
            return Json(await actions.records(agent, "events", min(max(1, limit), MAX_RECORDS)))
        lines = _follow_events(agent, around=around)
        return StreamingResponse(lines, media_type="application/x-ndjson")


async def _follow_events(agent: Agent, *, around: bool) -> AsyncIterator[bytes]:
    """Every transition in the cluster from now on, one JSON object a line. For who reads too slowly
    it ends, and an error as the last line says so."""
    queue: asyncio.Queue[bytes] = asyncio.Queue(MAX_RECORDS)
    fell_behind = False

    def take(transition: bytes) -> None:
        nonlocal fell_behind
        try:
            queue.put_nowait(transition)
        except asyncio.QueueFull:
            fell_behind = True
            end()

    end = agent.happenings.follow(take, around=around)
    try:
        while not (fell_behind and queue.empty()):
            yield await queue.get() + b"\n"
        problem = Busy(f"more than {MAX_RECORDS} events waited to be read: follow anew")
        yield msgspec.json.encode(to_body(problem)) + b"\n"
    finally:
        end()


def _add_node(router: APIRouter, agent: Agent) -> None:
    @router.get("/members")
    async def members() -> Response:
        return Json(actions.members(agent))

    @router.get("/node")
    async def node() -> Response:
        """This node; `whole`: its agent has a session with its hub, it sees all others, its
        gateways are there, and its replica of the store is not behind."""
        return Json(actions.describe_node(agent))

    @router.get("/doctor")
    async def doctor() -> Response:
        return Json(actions.doctor(agent))

    @router.post("/node/stop-instances")
    async def stop_instances(request: Request) -> Response:
        """Stop all instances of this node, before it goes down."""
        return Json(await actions.stop_instances(agent, who_asks(request)))
