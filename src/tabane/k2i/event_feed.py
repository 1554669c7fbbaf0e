"""The process events of a node, for all who want to know: `async for event in feed.subscribe()`.

The best source there is feeds it, `source` says which, and `reason` why not a better one. When a
source fails, a `gap` is told, and the next one takes its place; a better one is tried again every
`RETRY_S`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tabane.clock import SYSTEM, Clock
from tabane.errors import Closed, Unavailable
from tabane.k2i.event_sources import Collected, Compared, KernelEvents, Open, Source
from tabane.k2i.events import Event
from tabane.k2i.table import ProcessTable
from tabane.supervise import Supervisor

log = logging.getLogger(__name__)

RETRY_S = 10.0
MOST_WAITING = 20_000
"""Events that wait for one subscriber: what 10,000 short-lived processes make, twice over."""
TELLING = frozenset({"exec", "comm", "uid", "gid"})
"""Kinds after which nothing that is remembered of a process holds."""


class Subscription:
    """Events from now on, in order: `async for event in subscription`, or `take()`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: deque[Event] = deque()
        self._news = asyncio.Event()
        self._closed = False

    def put(self, events: Sequence[Event]) -> None:
        """When too many wait, they are dropped, and a `gap` says so."""
        if len(self._waiting) + len(events) > MOST_WAITING:
            self._waiting.clear()
            reason = f"more than {MOST_WAITING} events waited to be taken"
            self._waiting.append(Event(kind="gap", at=self._clock.now(), reason=reason))
        else:
            self._waiting.extend(events)
        self._news.set()

    def take(self) -> list[Event]:
        """All that wait. Does not block; on the event loop's thread only."""
        events = list(self._waiting)
        self._waiting.clear()
        return events

    def close(self) -> None:
        """No more than those that wait. Idempotent."""
        self._closed = True
        self._news.set()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._waiting:
            if self._closed:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._waiting.popleft()


class EventFeed:
    """See the module's text. Nothing is told before `start`."""

    def __init__(
        self,
        table: ProcessTable,
        *,
        collector: Path | None = None,
        sources: Sequence[Open] | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        """Keeps `table` fresh. `collector` is the socket of a collector to ask where the kernel
        itself does not tell; `sources`: instead of the kernel and that."""
        self.source = ""
        """`kernel` or `collector`, which miss nothing, `looks`, or empty before the first."""
        self.reason = ""
        self._table = table
        self._clock = clock
        self._subscriptions: set[Subscription] = set()
        self._changed = asyncio.Event()
        self._wanted = asyncio.Event()
        self._compared: Compared | None = None
        self._sources = list(sources) if sources is not None else _best_first(collector)

    def start(self, tasks: Supervisor) -> None:
        """Feed until the tasks are ended."""
        tasks.keep("process events", self._feed)

    @property
    def is_whole(self) -> bool:
        """Whether no process is missed, however short-lived."""
        return self.source in ("kernel", "collector")

    async def started(self) -> None:
        """Return once there is a source."""
        await self._changed.wait()

    @contextmanager
    def subscribe(self) -> Iterator[Subscription]:
        """Events from now on. On the event loop's thread only."""
        subscription = Subscription(self._clock)
        self._subscriptions.add(subscription)
        self._wanted.set()
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)
            subscription.close()

    def close(self) -> None:
        """End all subscriptions. Idempotent."""
        for subscription in self._subscriptions:
            subscription.close()

    async def _feed(self) -> None:
        source = await self._open()
        try:
            if source is self._compared:
                await self._compare(source)
            else:
                await self._pass_on(source)
                raise Closed("it ended")
        except (OSError, Closed) as error:
            self._publish_gap(f"the source {source.name} of process events is lost: {error}")
        finally:
            source.close()

    async def _open(self) -> Source:
        reasons = []
        for attempt in self._sources:
            try:
                source = await attempt()
            except Unavailable as error:
                reasons.append(error.message)
            else:
                self._compared = None
                break
        else:
            self._compared = self._compared or Compared(self._table.processes, self._clock)
            source = self._compared
        if source.name != self.source:
            if self.source:
                self._publish_gap(f"process events come from {source.name} now")
            self.source, self.reason = source.name, "; ".join(reasons)
            log.info("process events: %s %s", source.name, self.reason)
        self._changed.set()
        return source

    async def _compare(self, source: Source) -> None:
        """For a while, and only for those who want to know: each look costs something."""
        if not self._subscriptions:
            self._compared = None
            self._wanted.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(RETRY_S if self._sources else None):
                await self._wanted.wait()
                await self._pass_on(source)

    async def _pass_on(self, source: Source) -> None:
        async for events in source:
            for event in events:
                if event.kind in TELLING and event.pid is not None:
                    self._table.touch(event.pid)
            self._publish(events)

    def _publish(self, events: Sequence[Event]) -> None:
        for subscription in self._subscriptions:
            subscription.put(events)

    def _publish_gap(self, reason: str) -> None:
        self._publish([Event(kind="gap", at=self._clock.now(), reason=reason)])


def _best_first(collector: Path | None) -> list[Open]:
    sources: list[Open] = [KernelEvents.open]
    if collector is not None:
        path = collector
        sources.append(lambda: Collected.open(path))
    return sources
