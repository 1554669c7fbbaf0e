"""Which starts a node takes on, and when each has its turn: asks `scheduler.fair_queue` for the
order, `scheduler.capacity` for how many at once, and `scheduler.quotas` for what users may have.

A turn lasts until the engine has done its part; while the processors are busy, an app also waits
for its programs that are not ready yet (`scheduler.capacity.Boots`). Cold starts and restores have
a turn each, as they cost the node about the same; what is thawed, stopped or forwarded needs none.
A start that could not be in time is refused when it comes, and so is one of a user who has enough.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tabane.clock import Clock, Timer
from tabane.model import App, InstanceId
from tabane.node.processors import Processors
from tabane.scheduler.capacity import Boots, Capacity
from tabane.scheduler.fair_queue import FairQueue, Start
from tabane.scheduler.quotas import Account, Quota, Quotas, Usage, exceeded

MOST_WAITING = 4_096
"""Starts of one node: the fair order is found among them in a moment."""
LOOK_S = 0.1
"""How often it is looked whether the processors are still busy, while somebody waits for that."""
HOLD_S = 1.0
"""So long an app is held back for its own programs: where something else keeps the processors busy,
it would get less and less of them."""
AGAIN_S = 1.0
"""A node that refused a start of an app is not asked for another before that."""

Used = Callable[[InstanceId], dict[int, Usage]]
"""What each user has on this node but for that instance."""


class NoTurn(Exception):
    """A start has not begun, and will not. The attributes are as of `InstanceEnded`."""

    def __init__(
        self, reason: str, failed: bool = False, retry: bool = True, *, again_s: float | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.again_s = again_s
        self.failed = failed
        self.retry = retry


@dataclass
class Turn:
    """`kind`: what was done in it, told when it is done; empty: nothing that tells how long such
    things take. `beside`: how many others there were at most."""

    began: float
    beside: int
    kind: str = ""


@dataclass(eq=False)
class Waiting:
    app: App
    again: bool
    turn: asyncio.Future[Turn]


class Admission:
    """See the module's text. `processors`: the machine's, unless told. `is_busy`: whether they all
    have something to do."""

    def __init__(
        self,
        clock: Clock,
        used: Used,
        quotas: Callable[[], Quotas] = Quotas,
        *,
        processors: int | None = None,
        is_busy: Callable[[], bool] | None = None,
    ) -> None:
        processors = processors or len(os.sched_getaffinity(0))
        self._clock = clock
        self._used = used
        self._quotas = quotas
        self._queue = FairQueue()
        self._waiting: dict[InstanceId, Waiting] = {}
        self._turns: dict[InstanceId, Turn] = {}
        self.capacity = Capacity(processors)
        self._boots = Boots(processors)
        self._is_busy = is_busy or Processors(clock).are_busy
        self._looks: Timer | None = None

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def under_way(self) -> int:
        return self._queue.turns

    def admit(self, app: App, instance: InstanceId) -> None:
        """Raises `NoTurn` for a start that is not taken on."""
        if reason := self._refusal(app, Start(instance, app.cohort, app.owner)):
            raise NoTurn(reason, again_s=AGAIN_S)

    @asynccontextmanager
    async def turn(
        self, app: App, instance: InstanceId, *, again: bool = False
    ) -> AsyncIterator[Turn]:
        """Wait for the turn of a start that was admitted, and have it; or another turn of one that
        had one before. Raises `NoTurn` for the first when it is not to be tried any more."""
        identity = InstanceId(f"{instance} again") if again else instance
        turn = await self._wait(app, Start(identity, app.cohort, app.owner), again=again)
        try:
            yield turn
        finally:
            self._end(identity, turn)

    def begin_boot(self, instance: InstanceId, app: App) -> None:
        """Its engine has done its part, and its program is not ready yet."""
        self._boots.begin(instance, app.cohort, self._clock.now() + HOLD_S)

    def end_boot(self, instance: InstanceId) -> None:
        """It is ready, or no more. Of another one: nothing."""
        if self._boots.end(instance):
            self._give()

    def withdraw(self, instance: InstanceId, reason: str) -> None:
        """It is not wanted any more. One that does not wait is left alone."""
        if self._queue.remove(instance):
            self._fail([self._waiting[instance]], NoTurn(reason))

    def hold(self, app: App) -> list[Waiting]:
        """A start of this app failed: those of the same revision that wait are not tried. They
        are to be told so, after the one that was."""
        same = app.cohort, app.revision
        alike = [
            instance
            for instance, waiting in self._waiting.items()
            if (waiting.app.cohort, waiting.app.revision) == same and not waiting.again
        ]
        return [self._waiting[each] for each in alike if self._queue.remove(each)]

    def tell_untried(self, held: list[Waiting], reason: str, *, retry: bool) -> None:
        said = f"it was not tried, as another start of its app failed: {reason}"
        self._fail(held, NoTurn(said, failed=True, retry=retry))

    def _fail(self, held: list[Waiting], why: NoTurn) -> None:
        for waiting in held:
            if not waiting.turn.done():
                waiting.turn.set_exception(why)

    def describe(self, instance: InstanceId) -> str:
        """What one that waits is waiting for, as a sentence's end; empty if it does not."""
        ahead = self._queue.ahead_of(instance)
        if ahead is None:
            return ""
        return f"it waits for its turn, {ahead} other starts of its node are before it"

    def accounts(self) -> dict[int, Account]:
        """Of the users here whom something limits: what they have, but for what waits."""
        quotas = self._quotas()
        if quotas == Quotas():
            return {}
        used = self._used(InstanceId(""))
        accounts = {user: Account(quotas.of(user), usage) for user, usage in used.items()}
        return {user: each for user, each in accounts.items() if each.quota != Quota()}

    def _refusal(self, app: App, start: Start) -> str:
        """Why it is not taken on, if it is not."""
        if len(self._queue) >= MOST_WAITING:
            return f"{len(self._queue)} starts wait on it already"
        if reason := exceeded(app, self._account(app.owner, start.instance)):
            return reason
        ahead = self._queue.ahead(start)
        wait_s = self.capacity.wait_s(ahead, self._queue.turns)
        if wait_s <= app.reactive.start_timeout_s:
            return ""
        return f"{ahead} other starts are before it there, which takes about {wait_s:.0f} s"

    def _account(self, user: int, but: InstanceId) -> Account:
        quota = self._quotas().of(user)
        if quota == Quota():
            return Account(quota, Usage())
        usage, starts = self._used(but).get(user, Usage()), self._queue.waiting_of(user)
        return Account(quota, Usage(usage.instances, usage.memory_bytes, starts))

    async def _wait(self, app: App, start: Start, *, again: bool) -> Turn:
        turn: asyncio.Future[Turn] = asyncio.get_running_loop().create_future()
        self._waiting[start.instance] = Waiting(app, again, turn)
        self._queue.add(start)
        self._give()
        try:
            return await turn
        except asyncio.CancelledError:
            if not self._queue.remove(start.instance) and start.instance in self._turns:
                self._end(start.instance, self._turns[start.instance])
            raise
        finally:
            del self._waiting[start.instance]

    def _give(self) -> None:
        """A turn to as many as there is room for."""
        while len(self._queue) and self._queue.turns < self.capacity.limit:
            now, turns = self._clock.now(), self._queue.turns
            held = self._boots.held(now, turns=turns, is_busy=self._is_busy())
            if (start := self._queue.take(held)) is None:
                self._look_later()
                return
            waiting = self._waiting[start.instance].turn
            if waiting.done():  # its task is being cancelled
                self._queue.end(start.instance)
                continue
            beside = self._queue.turns - 1
            for other in self._turns.values():
                other.beside = max(other.beside, beside)
            self._boots.note_turn(start.app, now + HOLD_S)
            turn = self._turns[start.instance] = Turn(now, beside)
            waiting.set_result(turn)

    def _look_later(self) -> None:
        if self._looks is None:
            self._looks = self._clock.call_at(self._clock.now() + LOOK_S, self._look)

    def _look(self) -> None:
        self._looks = None
        self._give()

    def _end(self, instance: InstanceId, turn: Turn) -> None:
        del self._turns[instance]
        self._queue.end(instance)
        if turn.kind:
            took_s = self._clock.now() - turn.began
            waiting = len(self._queue)
            self.capacity.note(turn.kind, took_s, beside=turn.beside, waiting=waiting)
        self._give()
