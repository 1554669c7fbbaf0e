"""Looks at a node's processes about once a second: for the history, and for those who follow.

One look serves all. It is made on a thread; when looks take long, because there are very many
processes, they become rarer, so that together they take at most `SHARE` of one CPU.

A follower's messages wait in a queue of bounded size. Who reads so slowly that it is full is told
so after what waits there, and gets no more. When too much waits for all together, who reads slowest
loses what waits.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack
from operator import attrgetter
from typing import NamedTuple

import msgspec

from tabane.clock import Clock, sleep_until
from tabane.errors import Busy, Closed
from tabane.k2i.event_feed import EventFeed, Subscription
from tabane.k2i.events import Event as ProcessEvent
from tabane.k2i.history import History
from tabane.k2i.host import Host, Place
from tabane.k2i.passing import Meanwhile, Passing
from tabane.k2i.process import Process
from tabane.k2i.stream import EVENTS, LOOKS, Event, Follower
from tabane.security.identity import Principal
from tabane.supervise import Supervisor

PAUSE_S = 1.0
SHARE = 0.05
LEAST_PAUSE_S = 0.1
"""Between two looks, also when somebody new would like one at once."""
SAMPLE_S = 0.5
"""Between two samples of the history, at least: CPU time is counted in ticks of 10 ms."""
WAITING_BYTES = 8 << 20
MOST_WAITING_BYTES = 64 << 20
"""For all who follow."""
MOST_FOLLOWERS = 256
MOST_OF_ONE = 16
"""Of one user who is not root, so that there is room for others."""
CHANGES = "changes"
_AGE = re.compile(rb'\{"age_s":([0-9.e-]+)')

encode = msgspec.json.Encoder().encode


class Seen(NamedTuple):
    """One look. `processes`: the node's own, which are in its history, too; `all`: and those inside
    of something."""

    host: Host
    processes: list[Process]
    all: list[Process]


Look = Callable[[], Seen]
See = Callable[[Iterable[Process]], Iterable[Process]]
User = tuple[str, int]
"""The kind of who asks, and uid."""
Run = Callable[[Callable[[], None]], Awaitable[None]]


class Outbox:
    """Events that wait for one who reads them: `async for event in outbox`. To the `age_s` that
    their JSON begins with, if it does, the time in here is added."""

    def __init__(self, clock: Clock, most_bytes: int = WAITING_BYTES) -> None:
        self._clock = clock
        self._most_bytes = most_bytes
        self._waiting: deque[tuple[float, Event]] = deque()
        self._size = 0
        self._news = asyncio.Event()
        self._end: Exception | None = None

    def put(self, at: float, data: bytes, name: str = CHANGES) -> None:
        """`at`: since when its age counts. None is taken after one that was too much."""
        if self._end is not None:
            return
        if self._waiting and self._size + len(data) > self._most_bytes:
            self.end(Busy(f"more than {self._most_bytes} bytes waited to be read: follow anew"))
            return
        self._waiting.append((at, Event(name, data)))
        self._size += len(data)
        self._news.set()

    def end(self, why: Exception) -> None:
        """No more messages than those that wait. Idempotent."""
        self._end = self._end or why
        self._news.set()

    def cut(self, why: Exception) -> None:
        """No more messages, nor those that wait. Idempotent."""
        self._waiting.clear()
        self._size = 0
        self.end(why)

    @property
    def ended(self) -> bool:
        return self._end is not None

    @property
    def waiting_bytes(self) -> int:
        return self._size

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        """Raises `Busy` when they were read too slowly, or why else there are no more."""
        while not self._waiting:
            if self._end is not None:
                raise self._end
            self._news.clear()
            await self._news.wait()
        at, (name, data) = self._waiting.popleft()
        self._size -= len(data)
        return Event(name, older(data, self._clock.now() - at))


def user_of(who: Principal) -> User:
    return who.kind, who.uid


def check_room(following: Sequence[User], who: Principal) -> None:
    """Whether one more may follow beside these. Raises `Busy`."""
    if len(following) >= MOST_FOLLOWERS:
        raise Busy(f"{MOST_FOLLOWERS} follow already: end one, or ask again later")
    if not who.is_root and following.count(user_of(who)) >= MOST_OF_ONE:
        raise Busy(f"you follow {MOST_OF_ONE} times already: end one")


def older(message: bytes, by_s: float) -> bytes:
    """The same message, with a greater age."""
    found = _AGE.match(message)
    if found is None:
        return message
    return b'{"age_s":' + encode(round(float(found[1]) + by_s, 3)) + message[found.end() :]


class Stream(Outbox):
    """The messages for one who follows, as JSON of `Changes`."""

    def __init__(self, follower: Follower, see: See, who: Principal, clock: Clock) -> None:
        """`see`: what `who` follows may see of the processes."""
        super().__init__(clock)
        self.user = user_of(who)
        self._follower = follower
        self._see = see

    def step(
        self, at: float, processes: Iterable[Process], source: str, meanwhile: Meanwhile
    ) -> bytes | None:
        """The next message; for any thread, one at a time."""
        changes = self._follower.step(at, self._see(processes), source, meanwhile)
        return None if changes is None else encode(changes)


class Listening:
    """To the kernel's events, while somebody follows and none of them is missed."""

    def __init__(self, place: Place) -> None:
        self.passing = Passing(place)
        self._until_end = ExitStack()
        self._subscription: Subscription | None = None

    def take(self, events: EventFeed | None) -> list[ProcessEvent] | None:
        """Those since the last time; None when not all of them were heard."""
        if events is None or not events.is_whole:
            self.end()
            return None
        if self._subscription is None:
            self._subscription = self._until_end.enter_context(events.subscribe())
            return None
        return self._subscription.take()

    def end(self) -> None:
        """Idempotent."""
        self._until_end.close()
        self._subscription = None


class Watch:
    """See the module's text. Nothing is looked at before `start`."""

    def __init__(self, place: Place, look: Look, history: History, run: Run, clock: Clock) -> None:
        """`run` has a thread do something."""
        self.events: EventFeed | None = None
        """The kernel's, for those who follow; to be set before `start`."""
        self._listening = Listening(place)
        self._look = look
        self._history = history
        self._run = run
        self._clock = clock
        self._streams: set[Stream] = set()
        self._wanted = asyncio.Event()
        self._sampled_at: float | None = None

    def start(self, tasks: Supervisor) -> None:
        """Look from now on, until the tasks are ended."""
        tasks.keep("watch", self._watch)

    def follow(self, follower: Follower, see: See, who: Principal) -> Stream:
        """Have a stream until it is let go of. Raises `Busy` when there are too many."""
        check_room([stream.user for stream in self._streams], who)
        stream = Stream(follower, see, who, self._clock)
        self._streams.add(stream)
        self._wanted.set()
        return stream

    def let_go(self, stream: Stream) -> None:
        """Idempotent."""
        self._streams.discard(stream)

    def close(self) -> None:
        """Idempotent."""
        for stream in self._streams:
            stream.end(Closed("this k2i ends: follow anew"))
        self._streams.clear()
        self._listening.end()

    async def _watch(self) -> None:
        while True:
            began = self._clock.now()
            self._wanted.clear()
            await self._run_once()
            took_s = self._clock.now() - began
            await sleep_until(self._clock, began + took_s + LEAST_PAUSE_S)
            due = began + max(PAUSE_S, took_s / SHARE)
            timer = self._clock.call_at(due, self._wanted.set)
            try:
                await self._wanted.wait()
            finally:
                timer.cancel()

    async def _run_once(self) -> None:
        streams = tuple(stream for stream in self._streams if not stream.ended)
        made: list[tuple[Stream, float, bytes]] = []
        events = self._listening.take(self.events if streams else None)
        await self._run(lambda: made.extend(self._step(streams, events)))
        for stream, at, message in made:
            stream.put(at, message)
        self._make_room()

    def _make_room(self) -> None:
        """Those that have ended count too, until they are let go of: what waits may be read yet."""
        while sum(stream.waiting_bytes for stream in self._streams) > MOST_WAITING_BYTES:
            slowest = max(self._streams, key=attrgetter("waiting_bytes"))
            slowest.cut(Busy("too much waited to be read by all who follow: follow anew"))

    def _step(
        self, streams: Sequence[Stream], events: Sequence[ProcessEvent] | None
    ) -> list[tuple[Stream, float, bytes]]:
        """One look, and what of it is to be told; on a thread."""
        at = self._clock.now()
        host, processes, all_processes = self._look()
        if self._sampled_at is None or at - self._sampled_at >= SAMPLE_S:
            self._sampled_at = at
            self._history.add(at, host, processes)
        meanwhile = self._listening.passing.step(events or (), processes)
        source = LOOKS if events is None or meanwhile.missed else EVENTS
        made = []
        for stream in streams:
            message = stream.step(at, all_processes, source, meanwhile)
            if message is not None:
                made.append((stream, at, message))
        return made
