"""k2i of all nodes: one question, asked of every node it is about at once.

An answer may be larger than a message of middlecon. Then it is packed, and if that is not enough
the rest is kept for a while and asked for, piece by piece, of the node that has it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import zlib
from collections.abc import AsyncGenerator, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from msgspec.structs import replace

from tabane.errors import NotFound, TabaneError, TimedOut
from tabane.k2i.service import Part, Question
from tabane.k2i.stream import Event
from tabane.k2i.v2 import Gathered
from tabane.model import NodeName
from tabane.node import k2i_messages as wire
from tabane.node import messages as say
from tabane.node.config import agent_of
from tabane.node.following import Following
from tabane.security.identity import Principal
from tabane.units import shorten

if TYPE_CHECKING:
    from tabane.node.agent import Agent

log = logging.getLogger(__name__)

ASK_S = 2.0
"""How long nodes have to answer; one that is dead costs this once."""
PIECE_BYTES = 900 << 10
"""Of an answer in one message, which may have 1 MiB."""
KEPT_S = 10.0
MOST_KEPT_BYTES = 64 << 20
FASTEST = 1
"""zlib's level: process tables shrink to a tenth even so."""


class Pieces:
    """Answers too large for one message, until they are fetched or `KEPT_S` have passed."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._kept: dict[int, bytes] = {}
        self._numbers = itertools.count(1)

    def cut(self, part: Part) -> wire.K2iPart:
        """A part, or its beginning. What is older makes room for what is new."""
        if len(part.rows) <= PIECE_BYTES:
            return wire.K2iPart(part)
        data = zlib.compress(part.rows, FASTEST)
        first = replace(part, rows=data[:PIECE_BYTES])
        if len(data) <= PIECE_BYTES:
            return wire.K2iPart(first, packed=True)
        number = next(self._numbers)
        self._kept[number] = data
        while sum(map(len, self._kept.values())) > MOST_KEPT_BYTES and len(self._kept) > 1:
            del self._kept[min(self._kept)]
        self._agent.later.call(f"k2i {number}", KEPT_S, lambda: self._forget(number))
        return wire.K2iPart(first, packed=True, more=number, size=len(data))

    def piece(self, number: int, offset: int) -> bytes:
        """Raises `NotFound` when it is not kept any more."""
        data = self._kept.get(number)
        if data is None:
            node = self._agent.config.key
            raise NotFound(f"{node} does not keep that answer any more: ask again")
        return data[offset : offset + PIECE_BYTES]

    def _forget(self, number: int) -> None:
        self._kept.pop(number, None)


class ClusterK2i:
    """See the module's text."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.pieces = Pieces(agent)
        self.following = Following(agent)

    async def answer(self, body: wire.AskK2i) -> bytes:
        """This node's part, for another."""
        part = await self._agent.k2i.part(body.question, body.who)
        return say.encode(self.pieces.cut(part))

    async def ask(self, question: Question, who: Principal) -> Gathered:
        """The parts of all nodes that the question is about, in the cluster's order."""
        began = self._agent.clock.now()
        wanted = about(question, self._agent.config.cluster.keys)
        others = [node for node in wanted if node != self._agent.config.key]
        asked = self._ask_others(others, say.encode(wire.AskK2i(question, who)))
        own, answers = await asyncio.gather(self._own(question, who, wanted), asked)
        joined = (self._join(node, data) for node, data in answers.items())
        parts = [own, *await asyncio.gather(*joined)]
        took_s = self._agent.clock.now() - began
        aged = (replace(p, age_s=round(p.age_s + took_s, 3)) for p in parts if p)
        found = {NodeName(part.node): part for part in aged}
        return Gathered(
            [found[node] for node in wanted if node in found],
            [node for node in wanted if node not in found],
        )

    async def _own(
        self, question: Question, who: Principal, wanted: Sequence[NodeName]
    ) -> Part | None:
        """This node's part, if it is wanted. Its slowness hides no other node's answer."""
        if self._agent.config.key not in wanted:
            return None
        try:
            return await self._agent.k2i.part(question, who)
        except TimedOut as error:
            log.warning("%s", error)
            return None

    def follow(self, question: Question, who: Principal) -> AsyncGenerator[Event, None]:
        """What changes on all nodes."""
        return self.following.follow(question, who)

    async def _ask_others(self, nodes: Sequence[NodeName], data: bytes) -> dict[NodeName, bytes]:
        """All other nodes together, as the room that they are; fewer one by one."""
        by_agent = {agent_of(node): node for node in nodes}
        if len(nodes) == len(self._agent.config.cluster.keys) - 1:
            answers = await self._agent.ask_others(data, ASK_S)
            return {by_agent[name]: data for name, data in answers.items() if name in by_agent}
        given = await asyncio.gather(*(self._call(node, data) for node in nodes))
        return {node: data for node, data in zip(nodes, given, strict=True) if data is not None}

    async def _call(self, node: NodeName, data: bytes) -> bytes | None:
        """Its answer; None when there is none."""
        try:
            return await self._agent.me.call(agent_of(node), data, timeout_s=ASK_S)
        except TabaneError as error:
            log.info("%s did not answer for k2i: %s", node, error)
            return None

    async def _join(self, node: NodeName, data: bytes) -> Part | None:
        """A node's whole part; None when it failed, or went away in between."""
        answer = say.parse(data) if data else None
        if not isinstance(answer, wire.K2iPart):
            log.info("%s did not answer for k2i: %s", node, answer)
            return None
        part = answer.part
        if answer.packed:
            packed = part.rows
            while len(packed) < answer.size:
                more = say.encode(wire.MoreOfK2i(answer.more, len(packed)))
                if not (piece := await self._call(node, more)):
                    return None
                packed += piece
            part = replace(part, rows=zlib.decompress(packed))
        return replace(part, node=node)


def about(question: Question, nodes: Sequence[NodeName]) -> list[NodeName]:
    """Those of the nodes that the question's `dc` and `node` leave. Raises `NotFound` for one that
    the cluster does not have, and as the question's `check` does."""
    filters = dict(question.check().filters)
    datacenters = dict.fromkeys(node.partition("/")[0] for node in nodes)
    short = (node.partition("/")[2] for node in nodes)
    _check_known("data center", filters.get("dc", ()), datacenters)
    _check_known("node", filters.get("node", ()), nodes, also=short)
    return [
        node
        for node in nodes
        if ("dc" not in filters or node.partition("/")[0] in filters["dc"])
        and ("node" not in filters or filters["node"] & {node, node.partition("/")[2]})
    ]


def _check_known(
    what: str, names: Iterable[str], known: Collection[str], also: Iterable[str] = ()
) -> None:
    if unknown := set(names).difference(known, also):
        raise NotFound(f"there is no {what} {shorten(min(unknown))}, only {', '.join(known)}")
