"""k2i's REST routes `/v2`: what runs on this node, or with `?scope=cluster` on all.

A request becomes a `Question`, its answer is rendered as it comes. The description at
`/openapi.json` is made from the same table that requests are read by.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import NamedTuple, Protocol

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from tabane.clock import SYSTEM
from tabane.errors import TabaneError, UsageError
from tabane.k2i.api import Who
from tabane.k2i.description import ERRORS, describe_parameters, describe_responses
from tabane.k2i.kinds import JSON, KINDS, MSGPACK, Kind
from tabane.k2i.process import Process
from tabane.k2i.query import parse_query
from tabane.k2i.service import K2i, Part, Question, parse_params, render
from tabane.k2i.stream import PARAMETERS, Event
from tabane.security.identity import Principal
from tabane.units import shorten


class Gathered(NamedTuple):
    """The nodes' answers, and which nodes gave none."""

    parts: Sequence[Part]
    silent: Sequence[str]


class Cluster(Protocol):
    """All nodes, asked at once."""

    async def ask(self, question: Question, who: Principal) -> Gathered:
        """Every node that the question is about; this one is among them."""

    def follow(self, question: Question, who: Principal) -> AsyncGenerator[Event, None]:
        """What changes on every node. Ends by raising `Busy` or `Closed`."""


def build_v2(k2i: K2i, cluster: Cluster | None = None) -> APIRouter:
    """The routes over a node's k2i, and the cluster it belongs to if there is one."""
    router = APIRouter(prefix="/v2", tags=["k2i"])
    for name, kind in KINDS.items():
        _add_kind(router, name, kind, k2i, cluster)
    _add_changes(router, k2i, cluster)
    return router


def _add_kind(router: APIRouter, name: str, kind: Kind, k2i: K2i, cluster: Cluster | None) -> None:
    async def answer(request: Request, who: Who) -> Response:
        question, is_of_cluster = _read(request, name)
        question.check()
        if is_of_cluster:
            parts, silent = await _all_of(cluster).ask(question, who)
            body = render(question, parts, silent, SYSTEM.wall())
        else:
            body = await k2i.answer(question, who)
        return MEDIA[kind.media](body)

    router.add_api_route(
        f"/{name}",
        answer,
        name=name,
        description=kind.meaning,
        response_class=MEDIA[kind.media],
        responses=describe_responses(name, kind),
        openapi_extra={"parameters": describe_parameters(kind.parameters, kind.row)},
    )


class JsonBytes(Response):
    media_type = JSON


class Msgpack(Response):
    media_type = MSGPACK


MEDIA: dict[str, type[Response]] = {JSON: JsonBytes, MSGPACK: Msgpack}


def _add_changes(router: APIRouter, k2i: K2i, cluster: Cluster | None) -> None:
    @router.get(
        "/changes",
        response_class=EventStream,
        responses=ERRORS,
        openapi_extra={"parameters": describe_parameters(PARAMETERS, Process)},
    )
    async def changes(request: Request, who: Who) -> Response:
        """Births, deaths, other programs, and what changed in use, as server-sent events."""
        question, is_of_cluster = _read(request, "changes")
        parse_query(question.params, PARAMETERS, Process)
        if is_of_cluster:
            return EventStream(_encode(_all_of(cluster).follow(question, who)))
        return EventStream(_encode(k2i.follow(question, who)))


class EventStream(StreamingResponse):
    media_type = "text/event-stream"


async def _encode(events: AsyncGenerator[Event, None]) -> AsyncIterator[bytes]:
    """As text/event-stream. JSON has no line ends in it."""
    async with aclosing(events) as events:
        try:
            async for event in events:
                yield b"event: %b\ndata: %b\n\n" % (event.name.encode(), event.data)
        except TabaneError as error:
            body = {"error": error.code, "message": error.message}
            yield b"event: error\ndata: %b\n\n" % msgspec.json.encode(body)


def _read(request: Request, kind: str) -> tuple[Question, bool]:
    """The question, and whether it is for the whole cluster. Raises `UsageError`."""
    params = parse_params(request.query_params.multi_items())
    scope = params.pop("scope", "node")
    if scope not in ("node", "cluster"):
        raise UsageError(f"scope: {shorten(scope)} is neither node nor cluster")
    return Question(kind, params), scope == "cluster"


def _all_of(cluster: Cluster | None) -> Cluster:
    if cluster is None:
        raise UsageError("scope: this k2i belongs to no cluster")
    return cluster
