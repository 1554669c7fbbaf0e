"""What a node's k2i answers: one question, one node.

A `Question` is a value, so that it can be asked here or of every node of a cluster. Whatever is
read for it is read on threads of k2i's own: neither does the event loop wait for /proc, nor does
anything else on the node wait for a slow answer.

An answer carries the age of what it tells, by the monotonic clock of its own machine. Whoever
passes it on adds the time that it took; no two machines' clocks are ever compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from tabane.clock import SYSTEM, Clock
from tabane.errors import TimedOut, UsageError
from tabane.k2i import query as ask
from tabane.k2i.collectors.runner import FactRow
from tabane.k2i.event_feed import EventFeed
from tabane.k2i.history import History
from tabane.k2i.host import HostReader, Place
from tabane.k2i.kinds import KINDS, MSGPACK, Look, Sources, check
from tabane.k2i.mounts import MountReader
from tabane.k2i.process import Process
from tabane.k2i.stream import PARAMETERS, Event, Follower
from tabane.k2i.table import ProcessTable
from tabane.k2i.watch import Seen, Watch
from tabane.model import Instance, Value
from tabane.security.identity import Principal
from tabane.supervise import Supervisor

THREADS = 4
DEADLINE_S = 10.0
PROCFS = Path("/proc")


class Question(Value, frozen=True):
    """`kind`: one of `KINDS`. `params`: as in a request's query, without `scope`."""

    kind: str
    params: dict[str, str] = msgspec.field(default_factory=dict)

    def check(self) -> ask.Query:
        """What it asks, understood. Raises `NotFound`, `UsageError`."""
        return check(self.kind, self.params)


class Part(Value, frozen=True):
    """One node's answer. `rows` are encoded as its kind says; what they say was so at most `age_s`
    ago."""

    node: str
    incarnation: str
    age_s: float
    rows: bytes


class K2i:
    """The answers of one node."""

    def __init__(
        self,
        table: ProcessTable,
        *,
        node: str = "",
        incarnation: str = "",
        instances: Callable[[], Iterable[Instance]] = tuple,
        inside: Callable[[], Iterable[Process]] = tuple,
        inside_age_s: Callable[[], float] = float,
        facts: Callable[[], list[FactRow]] = list,
        clock: Clock = SYSTEM,
        root: Path = PROCFS,
    ) -> None:
        """`node` is `DATACENTER/NODE`, or empty outside of a cluster; `instances` are those that
        run here; `inside`: processes that `table` has not, as those in a virtual machine, and how
        old the oldest of these is; `facts`: what collectors told, each with its age. There is
        neither a history nor anything to follow before `start`."""
        dc, _, name = node.rpartition("/")
        place = Place(dc, name, incarnation)
        self.table = table
        self.node = node
        self.incarnation = incarnation
        self._instances = instances
        self._inside_age_s = inside_age_s
        self._clock = clock
        self.host = HostReader(place, root=root, clock=clock)
        mounts = MountReader(place, root=root)
        history = History(place)
        read = (self.host, mounts, clock, history)
        self._sources = Sources(place, root, table, *read, inside, facts)
        self._watch = Watch(place, self._look, history, self._run, clock)
        self._threads = ThreadPoolExecutor(THREADS, "k2i")
        self._blocking = ThreadPoolExecutor(THREADS, "k2i-blocking")

    def start(self, tasks: Supervisor, events: EventFeed | None = None) -> None:
        """Watch what runs from now on, until the tasks are ended. With the kernel's `events`, who
        follows hears of every process, however short its life."""
        self._watch.events = events
        self._watch.start(tasks)

    async def part(self, question: Question, who: Principal) -> Part:
        """This node's part of an answer. Raises `UsageError` and `NotFound` for what cannot be
        asked, `TimedOut` when the machine does not answer."""
        look = Look(self._sources, question.check(), who, tuple(self._instances()))
        kind = KINDS[question.kind]
        threads = self._blocking if kind.may_block else self._threads
        began = self._clock.now()
        reading = asyncio.get_running_loop().run_in_executor(threads, kind.read, look)
        try:
            async with asyncio.timeout(DEADLINE_S):
                rows = await reading
        except TimeoutError:
            raise TimedOut(f"{question.kind} could not be read within {DEADLINE_S:g} s") from None
        inside_age_s = self._inside_age_s() if kind.looks_inside else 0.0
        age_s = self._clock.now() - began + inside_age_s
        return Part(self.node, self.incarnation, round(age_s, 3), rows)

    async def answer(self, question: Question, who: Principal) -> bytes:
        """This node's whole answer: see `render`."""
        return render(question, [await self.part(question, who)], (), self._clock.wall())

    async def follow(self, question: Question, who: Principal) -> AsyncGenerator[Event, None]:
        """What changes here from now on, the first event with all that there is.
        Ends by raising `Busy` when it is read too slowly, and `Closed`. Raises `UsageError`."""
        wanted = ask.parse_query(question.params, PARAMETERS, Process)
        sources = self._sources

        def see(processes: Iterable[Process]) -> list[Process]:
            return Look(sources, wanted, who, ()).show(processes)

        stream = self._watch.follow(Follower(wanted, sources.place), see, who)
        try:
            async for event in stream:
                yield event
        finally:
            self._watch.let_go(stream)

    def _look(self) -> Seen:
        own = self.table.processes(tuple(self._instances()))
        return Seen(self._sources.host.read(), own, [*own, *self._sources.inside()])

    async def _run(self, work: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Idempotent. Waits for what is being read, but not for what may never be."""
        self._watch.close()
        self._blocking.shutdown(wait=False, cancel_futures=True)
        self._threads.shutdown(cancel_futures=True)


def render(question: Question, parts: Sequence[Part], silent: Sequence[str], at: float) -> bytes:
    """An answer as JSON: `{KIND: [rows], "nodes": [...], "silent": [...], "at": ...}`, with KIND up
    to a slash. `nodes` says of each node that answered how old what it says is at most; `silent`
    are those that did not; `at` is the answering node's clock on the wall, for people. Where rows
    are msgpack the whole is, and each node has its own `rows`, as bytes."""
    nodes = [
        {"node": part.node, "incarnation": part.incarnation, "age_s": part.age_s} for part in parts
    ]
    rest: dict[str, Any] = {"nodes": nodes, "silent": silent, "at": at}
    if KINDS[question.kind].media == MSGPACK:
        for node, part in zip(nodes, parts, strict=True):
            node["rows"] = part.rows
        return msgspec.msgpack.encode(rest)
    rows = ask.merge([part.rows for part in parts], question.check())
    key = question.kind.partition("/")[0].encode()
    return b'{"%b":%b,%b' % (key, rows, msgspec.json.encode(rest)[1:])


def parse_params(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """A request's parameters. Raises `UsageError` for one that is given twice."""
    params: dict[str, str] = {}
    for name, text in pairs:
        if name in params:
            raise UsageError(f"{name} is given twice: write its values with commas between them")
        params[name] = text
    return params
