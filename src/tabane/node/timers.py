"""Carries out the moments of all timers: on the control node, whose store says what was begun.

A moment is stored as begun, by compare-and-set, before anything is done; then its request is given
to a node, again until one has brought it to the app or `GIVE_UP_S` are over; then what became of it
is stored. So no two agents begin the same moment, and what an agent that was killed had begun the
next one carries out: an app may then get a moment's request twice, and can tell by its time.
While the control node is away no moment comes; `missed` says what follows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

import msgspec

from tabane.clock import Clock, sleep_until
from tabane.cron import next_after
from tabane.errors import TabaneError
from tabane.model import App, AppName
from tabane.reactions import Trigger
from tabane.scheduler.timers import Fire, Mark, after, decide, finished
from tabane.store.api import Delete, Expect, Put, Store
from tabane.supervise import Supervisor

log = logging.getLogger(__name__)

TRIGGERS = "triggers/"
LOOK_S = 30.0
"""At the latest, so that a clock that was set is noticed."""
GIVE_UP_S = 300.0
FIRST_PAUSE_S = 1.0
LAST_PAUSE_S = 30.0

encode = msgspec.json.Encoder().encode
parse_mark = msgspec.json.Decoder(Mark).decode

Send = Callable[[App, Trigger, float], Awaitable[str]]
"""Has a moment's request made; returns what became of it, raises when the app did not get it."""


def key_of(app: AppName, trigger: Trigger) -> str:
    return f"{TRIGGERS}{app}/{trigger.key}"


class Timers:
    """See the module's text. `apps` are those that are deployed now."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        tasks: Supervisor,
        *,
        apps: Callable[[], Iterable[App]],
        send: Send,
    ) -> None:
        self._store, self._clock, self._tasks = store, clock, tasks
        self._apps, self._send = apps, send
        self._marks: dict[str, tuple[Mark, int]] = {}
        """With the version that the store has."""
        self._next: dict[str, tuple[int, float]] = {}
        """Of each trigger: the app's revision, and its next moment (wall)."""
        self._fired: set[tuple[str, float]] = set()
        """What is being carried out, but for what was removed meanwhile."""
        self._writing = asyncio.Lock()
        self._news = asyncio.Event()

    def look_soon(self) -> None:
        """Apps changed."""
        self._news.set()

    async def run(self) -> None:
        """For ever; raises what the store does, and can be begun again."""
        _, entries = await self._store.range(TRIGGERS)
        self._marks = {entry.key: (parse_mark(entry.value), entry.version) for entry in entries}
        self._next.clear()
        while True:
            self._news.clear()
            await self._wait(await self._look())

    async def _wait(self, due: float) -> None:
        """Until then (wall), or news."""
        delay_s = min(max(0.0, due - self._clock.wall()), LOOK_S)
        timer = self._clock.call_at(self._clock.now() + delay_s, self._news.set)
        try:
            await self._news.wait()
        finally:
            timer.cancel()

    async def _look(self) -> float:
        """Begin what is due; returns when the next one is."""
        timed = {
            key_of(app.key, trigger): (app, trigger)
            for app in self._apps()
            for trigger in app.triggers
            if trigger.cron
        }
        for key in self._marks.keys() - timed.keys():
            await self._forget(key)
        for key, (app, trigger) in timed.items():
            await self._look_at(key, app, trigger)
        return min((self._next[key][1] for key in timed), default=float("inf"))

    async def _look_at(self, key: str, app: App, trigger: Trigger) -> None:
        mark, now = self._mark(key), self._clock.wall()
        for moment in mark.pending:
            self._begin(key, app, trigger, moment)
        revision, due = self._next.get(key, (0, 0.0))
        if revision == app.revision and now < due:
            return
        decision = decide(trigger, mark, app.deployed_at, now)
        if decision is not None:
            await self._save(key, lambda known: after(known, decision, now))
        if isinstance(decision, Fire):
            self._begin(key, app, trigger, decision.moment)
        self._next[key] = (app.revision, next_after(trigger.cron, trigger.timezone, now))

    def _begin(self, key: str, app: App, trigger: Trigger, moment: float) -> None:
        if (key, moment) not in self._fired:
            self._fired.add((key, moment))
            name = f"fire {key} {moment:.0f}"
            self._tasks.start(name, self._carry_out(key, app, trigger, moment))

    async def _carry_out(self, key: str, app: App, trigger: Trigger, moment: float) -> None:
        try:
            outcome = await self._deliver(key, app, trigger, moment)
            wall = self._clock.wall()
            if (key, moment) in self._fired:
                await self._save(key, lambda mark: finished(mark, moment, outcome, wall))
        finally:
            self._fired.discard((key, moment))

    async def _deliver(self, key: str, app: App, trigger: Trigger, moment: float) -> str:
        """What became of it; not tried again once it was removed, as what is deployed by that name
        later is not meant."""
        pause_s, end = FIRST_PAUSE_S, self._clock.now() + GIVE_UP_S
        while True:
            try:
                return await self._send(app, trigger, moment)
            except TabaneError as error:
                if self._clock.now() + pause_s > end:
                    return f"failed: {error}"
                log.info("%s of %s is tried again: %s", trigger.key, app.key, error)
            await sleep_until(self._clock, self._clock.now() + pause_s)
            if (key, moment) not in self._fired:
                return "left out: it was removed"
            pause_s = min(2 * pause_s, LAST_PAUSE_S)

    def _mark(self, key: str) -> Mark:
        return self._marks.get(key, (Mark(), 0))[0]

    async def _save(self, key: str, change: Callable[[Mark], Mark]) -> None:
        """Raises `Conflict` when another agent writes them, too: `run` then begins anew."""
        async with self._writing:
            known, version = self._marks.get(key, (Mark(), 0))
            mark = change(known)
            revision = await self._store.commit([Put(key, encode(mark))], [Expect(key, version)])
            self._marks[key] = (mark, revision)

    async def _forget(self, key: str) -> None:
        """The app was removed, or has no such trigger any more."""
        self._fired = {each for each in self._fired if each[0] != key}
        async with self._writing:
            _, version = self._marks.pop(key)
            await self._store.commit([Delete(key)], [Expect(key, version)])
