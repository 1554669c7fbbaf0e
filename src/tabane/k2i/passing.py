"""Processes that came and went between two looks at the table, and how others ended: found in the
events that the kernel told meanwhile. Pure.

Of one that was never seen only what its events say is known; where it belongs is taken from its
parent, as a process is in its parent's cgroup when it is born, and has its parent's user.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from tabane.k2i.events import Event
from tabane.k2i.host import Place
from tabane.k2i.process import Attributed, Process, attribution

Life = tuple[int, int]
"""pid and start_ticks."""


class Passed(Attributed, frozen=True, kw_only=True):
    """A process that nobody looked at while it lived. `start_ticks` is null where that was not to
    be learnt any more, as the pid is for one in another pid namespace that was too quick. `code`
    is its exit code, null when a signal ended it."""

    inside: str = ""
    pid: int | None
    ppid: int | None
    start_ticks: int | None
    uid: int = -1
    """Its parent's, or -1 when that is not known either."""
    user: str = ""
    name: str
    code: int | None
    signal: int | None


class End(NamedTuple):
    code: int | None
    signal: int | None


class Meanwhile(NamedTuple):
    """What happened between two looks. `missed`: why events are missing, if some are."""

    passed: Sequence[Passed] = ()
    ends: Mapping[Life, End] = MappingProxyType({})
    missed: str = ""


class Passing:
    """Remembers the last two looks: an end may be told just after the look that did not see the
    process any more."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._last: dict[int, Process] = {}
        self._before: dict[int, Process] = {}

    def step(self, events: Iterable[Event], processes: Iterable[Process]) -> Meanwhile:
        """`events` since the step before, `processes` as they were seen after them."""
        seen = {process.pid: process for process in processes if not process.inside}
        parents = {**self._before, **self._last, **seen}
        passed: list[Passed] = []
        ends: dict[Life, End] = {}
        missed = ""
        for event in events:
            if event.kind == "gap":
                missed = event.reason
            if event.kind != "exit":
                continue
            known = self._find(event)
            if known is None:
                passed.append(self._describe(event, parents.get(event.ppid or 0)))
            else:
                ends[known.pid, known.start_ticks] = End(event.code, event.signal)
        self._before, self._last = self._last, seen
        return Meanwhile(passed, ends, missed)

    def _find(self, event: Event) -> Process | None:
        """The process that ended, if it was seen."""
        for table in (self._last, self._before):
            process = table.get(event.pid or 0)
            if process is not None and event.start_ticks in (None, process.start_ticks):
                return process
        return None

    def _describe(self, event: Event, parent: Process | None) -> Passed:
        nowhere = {"namespace": "", "app": "", "instance": "", "isolation": ""}
        return Passed(
            **(attribution(parent) if parent else self._place._asdict() | nowhere),
            uid=parent.uid if parent else -1,
            user=parent.user if parent else "",
            pid=event.pid,
            ppid=event.ppid,
            start_ticks=event.start_ticks,
            name=event.name,
            code=event.code,
            signal=event.signal,
        )


NOTHING = Meanwhile()
