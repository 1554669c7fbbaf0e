"""k2i's REST routes `/v2`: what runs on this node, or with `?scope=cluster` on all.

A request becomes a `Question`, its answer is rendered as it comes. The description at
`/openapi.json` is made from the same table that requests are read by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from fastapi import APIRouter, Request, Response

from tabane.clock import SYSTEM
from tabane.errors import UsageError
from tabane.k2i.api import Who
from tabane.k2i.kinds import KINDS, Kind
from tabane.k2i.service import K2i, Part, Question, parse_params, render
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


def build_v2(k2i: K2i, cluster: Cluster | None = None) -> APIRouter:
    """The routes over a node's k2i, and the cluster it belongs to if there is one."""
    router = APIRouter(prefix="/v2", tags=["k2i"])
    for name, kind in KINDS.items():
        _add_kind(router, name, kind, k2i, cluster)
    return router


def _add_kind(router: APIRouter, name: str, kind: Kind, k2i: K2i, cluster: Cluster | None) -> None:
    async def answer(request: Request, who: Who) -> Response:
        params = parse_params(request.query_params.multi_items())
        scope = params.pop("scope", "node")
        question = Question(name, params)
        question.check()
        body = await _ask(question, who, scope, k2i, cluster)
        return Response(body, media_type=kind.media)

    router.add_api_route(f"/{name}", answer, description=kind.meaning, name=name)


async def _ask(
    question: Question, who: Principal, scope: str, k2i: K2i, cluster: Cluster | None
) -> bytes:
    if scope == "node":
        return await k2i.answer(question, who)
    if scope != "cluster":
        raise UsageError(f"scope: {shorten(scope)} is neither node nor cluster")
    if cluster is None:
        raise UsageError("scope: this k2i belongs to no cluster")
    parts, silent = await cluster.ask(question, who)
    return render(question, parts, silent, SYSTEM.wall())
