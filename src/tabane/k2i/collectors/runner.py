"""Asks the collectors, each in a task of its own, and keeps what they said last.

Who wants to know never waits for a collector: `rows()` is what is known now, each fact with its age
and, when the last try failed, why. Facts that were not confirmed for `KEPT_INTERVALS` are dropped;
so are those of a process that has ended.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from tabane.clock import Clock, sleep_until
from tabane.errors import TabaneError
from tabane.k2i.collectors.api import Collector, Facts, Reading
from tabane.model import Collect
from tabane.supervise import Supervisor

log = logging.getLogger(__name__)

KEPT_INTERVALS = 3
MAX_ERROR = 500
"""Characters of an error that are kept."""

Ticks: TypeAlias = Callable[[int], int]
"""When a process started, in ticks; 0: there is none."""


class FactRow(msgspec.Struct, frozen=True, kw_only=True):
    """What one collector knows of one thing: a process (`pid` and `start_ticks`), else an instance,
    else the node. `age_s` is null before the first reading; `error` is of the last try, empty when
    that worked, `error_age_s` since then."""

    dc: str
    node: str
    namespace: str
    app: str
    instance: str
    of: str
    """`process`, `instance` or `node`."""
    pid: int
    start_ticks: int
    collector: str
    kind: str
    facts: Facts
    at: float | None
    """Seconds since 1970-01-01 UTC, by its node's clock."""
    age_s: float | None
    took_s: float | None
    interval_s: float
    deadline_s: float
    error: str
    error_age_s: float | None
    failures: int
    """In a row."""


@dataclass(frozen=True)
class Job:
    """A collector to be run. `instance` and `app` (`namespace/name`) when an app asks for it: what
    it tells is then of that instance, whatever it says."""

    collect: Collect
    make: Callable[[], Collector]
    instance: str = ""
    app: str = ""

    @property
    def name(self) -> str:
        return self.collect.name or self.collect.kind

    @property
    def key(self) -> tuple[str, str]:
        return self.instance, self.name


@dataclass
class _Running:
    job: Job
    task: asyncio.Task[None] | None = None
    readings: list[tuple[Reading, int]] = field(default_factory=list)
    """Each with its process's start time."""
    at: float | None = None
    wall: float = 0.0
    took_s: float = 0.0
    error: str = ""
    error_at: float = 0.0
    failures: int = 0


class Collection:
    """The collectors of a node. `ticks` says when a process of it started."""

    def __init__(self, node: str, *, clock: Clock, tasks: Supervisor, ticks: Ticks) -> None:
        self._dc, _, self._node = node.rpartition("/")
        self._clock = clock
        self._tasks = tasks
        self._ticks = ticks
        self._running: dict[tuple[str, str], _Running] = {}

    def want(self, instance: str, jobs: Iterable[Job]) -> None:
        """Have just these run for an instance, or for the node when it is empty. Those that run
        already go on as they are."""
        wanted = {job.key: job for job in jobs}
        for key in [key for key in self._running if key[0] == instance and key not in wanted]:
            task = self._running.pop(key).task
            if task is not None:
                task.cancel()
        for key in [key for key in wanted if key not in self._running]:
            running = self._running[key] = _Running(wanted[key])
            running.task = self._tasks.start(f"collect {'/'.join(key)}", self._run(running))

    def instances(self) -> set[str]:
        """Those with a collector."""
        return {instance for instance, _ in self._running if instance}

    def rows(self) -> list[FactRow]:
        """What is known now, in the order the collectors were asked for; for any thread."""
        return [row for running in list(self._running.values()) for row in self._rows(running)]

    async def _run(self, running: _Running) -> None:
        try:
            collector = running.job.make()
        except Exception as error:
            self._fail(running, error)
            return
        try:
            while True:
                next_at = self._clock.now() + running.job.collect.interval_s
                await self._take(running, collector)
                await sleep_until(self._clock, next_at)
        finally:
            await collector.aclose()

    async def _take(self, running: _Running, collector: Collector) -> None:
        began, deadline_s = self._clock.now(), running.job.collect.deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                readings = await collector.collect()
        except TimeoutError:
            self._fail(running, TimeoutError(f"no answer within {deadline_s:g} s"))
        except Exception as error:
            self._fail(running, error)
        else:
            running.readings = [(reading, self._ticks_of(running, reading)) for reading in readings]
            running.at, running.wall = self._clock.now(), self._clock.wall()
            running.took_s = running.at - began
            running.error, running.failures = "", 0

    def _ticks_of(self, running: _Running, reading: Reading) -> int:
        """When the process that it is of started, -1 when it has ended; 0 when it is of none."""
        if not reading.pid or running.job.instance:
            return 0
        return self._ticks(reading.pid) or -1

    def _fail(self, running: _Running, error: Exception) -> None:
        if not isinstance(error, TabaneError | OSError):
            log.error("collector %s is broken", running.job.name, exc_info=error)
        text = describe(error, running.job.collect)
        running.error, running.error_at = text[:MAX_ERROR], self._clock.now()
        running.failures += 1

    def _rows(self, running: _Running) -> list[FactRow]:
        now, interval_s = self._clock.now(), running.job.collect.interval_s
        fresh = running.at is not None and now - running.at <= KEPT_INTERVALS * interval_s
        readings = running.readings if fresh else []
        rows = [
            self._row(running, reading, ticks, now)
            for reading, ticks in readings
            if ticks >= 0 and ticks == self._ticks_of(running, reading)
        ]
        return rows or [self._row(running, Reading({}), 0, now)]

    def _row(self, running: _Running, reading: Reading, ticks: int, now: float) -> FactRow:
        job = running.job
        namespace, _, app = job.app.partition("/")
        pid = 0 if job.instance else reading.pid
        instance = job.instance or reading.instance
        at = running.at
        return FactRow(
            dc=self._dc,
            node=self._node,
            namespace=namespace,
            app=app and job.app,
            instance=instance,
            of="process" if pid else "instance" if instance else "node",
            pid=pid,
            start_ticks=ticks if pid else 0,
            collector=job.name,
            kind=job.collect.kind,
            facts=reading.facts,
            at=None if at is None else round(running.wall, 3),
            age_s=None if at is None else round(max(0.0, now - at), 3),
            took_s=None if at is None else round(running.took_s, 4),
            interval_s=job.collect.interval_s,
            deadline_s=job.collect.deadline_s,
            error=running.error,
            error_age_s=round(max(0.0, now - running.error_at), 3) if running.error else None,
            failures=running.failures,
        )


def describe(error: Exception, collect: Collect) -> str:
    """What went wrong, as one sentence that names who was asked."""
    if isinstance(error, OSError) and error.errno:
        known = error.strerror if error.errno < 0 else os.strerror(error.errno)
        return f"{collect.url or collect.kind}: {known}"
    return str(error) or type(error).__name__
