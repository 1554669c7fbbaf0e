"""What changes in a process table, told to one who follows it.

The first message has every process as `born`, the following ones what has changed since. A follower
who applies them in order has the table. Pure: each look at the table is given, what is to be told
comes back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec

from tabane.errors import UsageError
from tabane.k2i import query as ask
from tabane.k2i.host import Place
from tabane.k2i.passing import NOTHING, Meanwhile, Passed
from tabane.k2i.process import Process
from tabane.k2i.query import Query
from tabane.units import shorten

LONGEST_INTERVAL_S = 60
QUIET_S = 10.0
"""After so long without changes that is told too, so that who follows knows that all is as it was.
"""
LOOKS, EVENTS = "looks", "events"
IDS = ("inside", "instance", "pid", "start_ticks")
"""Which process it is, on one node."""
UNTOLD = frozenset({"elapsed_s", "cpu_percent", "memory_percent"})
"""What changes by itself, or with what is told anyway: alone it is no news."""

Key = tuple[str, str, int, int]
_key = attrgetter(*IDS)


class Event(NamedTuple):
    """`name`: `changes`, with `Changes` as JSON; `silent`: nothing is heard of a node, with
    `{"node": ...}`; `error`, the last."""

    name: str
    data: bytes


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """What has changed on one node. `first`: forget what was known of it. `age_s`: how long ago the
    node looked, at most. `source` says what births and deaths are known from: the kernel's
    `events`, which miss nobody, or `looks`, about one a second, between which a process can come
    and go."""

    age_s: float = 0.0
    node: str
    incarnation: str
    number: int
    first: bool
    interval_s: float
    source: str
    born: Sequence[Mapping[str, Any]]
    died: Sequence[Mapping[str, Any]]
    """Only `IDS`, `name`, `app`, and `code` and `signal` where their end was told."""
    passed: Sequence[Passed]
    """They came and went between two looks."""
    missed: str
    """Why events are missing, if some are."""
    exec: Sequence[Mapping[str, Any]]
    """They run another program now, or have another name."""
    updated: Sequence[Mapping[str, Any]]


def parse_interval(text: str) -> int:
    """Seconds. Raises `UsageError`."""
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:5]) <= LONGEST_INTERVAL_S:
        raise UsageError(f"{shorten(text)} is not from 1 to {LONGEST_INTERVAL_S} seconds")
    return int(text)


INTERVAL = ask.Parameter(
    {"type": "integer", "minimum": 1, "maximum": LONGEST_INTERVAL_S, "default": 1},
    "Seconds between updates of what a process uses.",
    parse_interval,
)
PARAMETERS: dict[str, ask.Parameter] = {
    **ask.PLACE,
    **ask.OWNER,
    **ask.INSIDE,
    "fields": ask.SHAPE["fields"],
    "interval_s": INTERVAL,
}


class Follower:
    """What one who follows a node has been told of it."""

    def __init__(self, query: Query, place: Place) -> None:
        """`query`: as parsed by `PARAMETERS`."""
        attributes = ask.attributes_of(Process)
        fields = query.fields and tuple(dict.fromkeys((*IDS, *query.fields)))
        self._fields = [(name, attrgetter(attributes[name])) for name in fields or attributes]
        watched = [name for name in fields or attributes if name not in UNTOLD]
        self._watched = attrgetter(*(attributes[name] for name in watched))
        self._filters = query.filters
        self._interval_s = float(query.options.get("interval_s", 1))
        self._place = place
        self._known: dict[Key, Process] = {}
        self._number = 0
        self._updated_at = 0.0
        self._told_at = 0.0

    def step(
        self,
        at: float,
        processes: Iterable[Process],
        source: str = LOOKS,
        meanwhile: Meanwhile = NOTHING,
    ) -> Changes | None:
        """The changes since the step before; None when there is nothing to tell yet. `at` is when
        the processes were looked at, in monotonic seconds; `meanwhile`: what happened before."""
        now = {_key(row): row for row in ask.choose(processes, self._filters)}
        first = not self._number
        before, due = self._known, first or at - self._updated_at >= self._interval_s - 0.05
        born = [row for key, row in now.items() if key not in before]
        died = [row for key, row in before.items() if key not in now]
        other, updated = [], []
        for key, row in now.items():
            old = before.get(key)
            if old is None or old is row:
                continue
            if (old.name, old.command) != (row.name, row.command) and row.state != "Z":
                other.append(row)
            elif due and self._watched(old) != self._watched(row):
                updated.append(row)
            elif not due:
                now[key] = old  # what was told of it
        self._known = now
        if due:
            self._updated_at = at
        passed = [] if first else ask.choose(meanwhile.passed, self._filters)
        news = first or born or died or other or updated or passed or meanwhile.missed
        if not news and at - self._told_at < QUIET_S:
            return None
        self._told_at = at
        self._number += 1
        return Changes(
            node=f"{self._place.dc}/{self._place.node}" if self._place.node else "",
            incarnation=self._place.incarnation,
            number=self._number,
            first=first,
            interval_s=self._interval_s,
            source=source,
            born=self._show(born),
            died=[_describe_end(row, meanwhile) for row in died],
            passed=passed,
            missed=meanwhile.missed,
            exec=self._show(other),
            updated=self._show(updated),
        )

    def _show(self, rows: Iterable[Process]) -> list[dict[str, Any]]:
        return [{name: get(row) for name, get in self._fields} for row in rows]


def _describe_end(row: Process, meanwhile: Meanwhile) -> dict[str, Any]:
    end = None if row.inside else meanwhile.ends.get((row.pid, row.start_ticks))
    return {name: getattr(row, name) for name in (*IDS, "name", "app")} | (
        end._asdict() if end is not None else {"code": None, "signal": None}
    )
