"""What a node's k2i answers: one question, one node.

A `Question` is a value, so that it can be asked here or of every node of a cluster. Whatever is
read for it is read on threads of k2i's own: neither does the event loop wait for /proc, nor does
anything else on the node wait for a slow answer.

An answer carries the age of what it tells, by the monotonic clock of its own machine. Whoever
passes it on adds the time that it took; no two machines' clocks are ever compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from tabane.clock import SYSTEM, Clock
from tabane.errors import NotFound, UsageError
from tabane.k2i import query as ask
from tabane.k2i.table import Process, ProcessTable
from tabane.model import Instance, Value
from tabane.security.identity import Principal

THREADS = 4


class Question(Value, frozen=True):
    """`kind`: one of `KINDS`. `params`: as in a request's query, without `scope`."""

    kind: str
    params: dict[str, str] = msgspec.field(default_factory=dict)


class Part(Value, frozen=True):
    """One node's answer. `rows` is a JSON array; what it says was so `age_s` ago, or later."""

    node: str
    incarnation: str
    age_s: float
    rows: bytes


class Kind(NamedTuple):
    """A kind of question: the parameters it knows, the rows it is answered with."""

    parameters: Mapping[str, ask.Parameter]
    row: type[msgspec.Struct]


KINDS: dict[str, Kind] = {
    "processes": Kind({**ask.PLACE, **ask.OWNER, **ask.SHAPE, **ask.GROUPS}, Process),
}


class K2i:
    """The answers of one node."""

    def __init__(
        self,
        table: ProcessTable,
        *,
        node: str = "",
        incarnation: str = "",
        instances: Callable[[], Iterable[Instance]] = tuple,
        clock: Clock = SYSTEM,
    ) -> None:
        """`node` is `DATACENTER/NODE`, or empty outside of a cluster; `instances` are those that
        run here."""
        self.table = table
        self.node = node
        self.incarnation = incarnation
        self._instances = instances
        self._clock = clock
        self._threads = ThreadPoolExecutor(THREADS, "k2i")

    async def part(self, question: Question, who: Principal) -> Part:
        """This node's part of an answer. Raises `UsageError` and `NotFound` for what cannot be
        asked."""
        wanted = check(question)
        began = self._clock.now()
        loop = asyncio.get_running_loop()
        instances = tuple(self._instances())
        rows = await loop.run_in_executor(self._threads, self._read, wanted, who, instances)
        return Part(self.node, self.incarnation, round(self._clock.now() - began, 3), rows)

    async def answer(self, question: Question, who: Principal) -> bytes:
        """This node's answer as JSON: `{KIND: [rows], "nodes": [...], "silent": [], "at": ...}`."""
        return render(question, [await self.part(question, who)], (), self._clock.wall())

    def _read(self, wanted: ask.Query, who: Principal, instances: Sequence[Instance]) -> bytes:
        rows = ask.choose(self.table.processes(instances), wanted.filters)
        return ask.arrange([redact(row, who) for row in rows], wanted, Process)

    def close(self) -> None:
        """Idempotent."""
        self._threads.shutdown(cancel_futures=True)


def check(question: Question) -> ask.Query:
    """Raises `NotFound` for a kind that is not there, `UsageError` for parameters that are not."""
    kind = KINDS.get(question.kind)
    if kind is None:
        raise NotFound(f"k2i knows no {question.kind!r}, only {', '.join(KINDS)}")
    return ask.parse_query(question.params, kind.parameters, kind.row)


def redact(process: Process, who: Principal) -> Process:
    """Its arguments are for root and for its own user; others see its name."""
    if who.is_root or who.uid == process.uid:
        return process
    return replace(process, command=f"[{process.name}]")


def render(question: Question, parts: Sequence[Part], silent: Sequence[str], at: float) -> bytes:
    """An answer as JSON. `nodes` says of each node that answered how old what it says is at most;
    `silent` are those that did not; `at` is the answering node's clock on the wall, for people."""
    rows = ask.merge([part.rows for part in parts], check(question))
    nodes = [
        {"node": part.node, "incarnation": part.incarnation, "age_s": part.age_s} for part in parts
    ]
    rest: dict[str, Any] = {"nodes": nodes, "silent": silent, "at": at}
    return b'{"%b":%b,%b' % (question.kind.encode(), rows, msgspec.json.encode(rest)[1:])


def parse_params(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """A request's parameters. Raises `UsageError` for one that is given twice."""
    params: dict[str, str] = {}
    for name, text in pairs:
        if name in params:
            raise UsageError(f"{name} is given twice: write its values with commas between them")
        params[name] = text
    return params
