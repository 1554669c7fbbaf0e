"""The store in memory, and all of a store's behaviour but durability.

Requests queue up; one flush at a time takes all that wait, lets them run against a `Draft`,
makes the draft durable (`_persist`: nothing to do here, one transaction in `sqlite`), applies it,
publishes its commits and only then answers. So reads never wait, concurrent commits share one
fsync, and nobody sees what is not durable.

Leases live on the store's monotonic clock. A lease has ended when the commit that deletes its keys
is made, not before: until then `renew_lease` still saves it. A timer that comes late means that
this process stood still and could not take renewals, so every lease gets a full term.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from tabane.clock import SYSTEM, Clock, Timer
from tabane.errors import Closed, NotFound, UsageError
from tabane.store.api import Entry, Expect, Watch, Write
from tabane.store.history import CHANGES_KEPT, History
from tabane.store.ledger import Draft, Ledger, check_writes
from tabane.store.view import View
from tabane.supervise import Supervisor

log = logging.getLogger(__name__)

T = TypeVar("T")
Step = Callable[[Draft], Any]

LATE_S = 1.0
"""A timer this late shows that the process stood still (machine asleep, SIGSTOP, swapping)."""
RETRY_S = 1.0
"""After a flush that failed, how long until ended leases are tried again."""


class MemoryStore:
    """A `Store` that is gone with its process."""

    def __init__(
        self, *, clock: Clock = SYSTEM, ledger: Ledger | None = None, history: int = CHANGES_KEPT
    ) -> None:
        self._clock = clock
        self._ledger = ledger or Ledger()
        self.view = View(self._ledger)
        """The same, for those in this process who need no answers to wait for."""
        self._history = History(self._ledger.revision, limit=history)
        self._tasks = Supervisor("store")
        self._queue: list[tuple[Step, asyncio.Future[Any]]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._inflight: Draft | None = None
        self._deadlines: dict[str, float] = {}
        self._timer: Timer | None = None
        self._closed = False
        self._begin_terms()

    async def get(self, key: str) -> Entry | None:
        return self._ledger.entries.get(key)

    async def range(self, prefix: str) -> tuple[int, list[Entry]]:
        return self._ledger.revision, self._ledger.range(prefix)

    async def commit(self, writes: Sequence[Write], expect: Sequence[Expect] = ()) -> int:
        check_writes(writes)
        return await self._submit(lambda draft: draft.commit(writes, expect))

    @asynccontextmanager
    async def watch(self, prefix: str, *, after: int | None = None) -> AsyncIterator[Watch]:
        yield self._history.watch(prefix, after)

    async def grant_lease(self, ttl_s: float) -> str:
        if not (math.isfinite(ttl_s) and ttl_s > 0):
            raise UsageError(f"a lease lasts some seconds, not {ttl_s}")
        return await self._submit(lambda draft: draft.grant(ttl_s))

    async def renew_lease(self, lease: str) -> None:
        ending = self._inflight is not None and self._inflight.ends_lease(lease)
        if ending or lease not in self._ledger.leases:
            raise NotFound(f"the lease {lease} has ended: grant a new one")
        self._deadlines[lease] = self._clock.now() + self._ledger.leases[lease]

    async def revoke_lease(self, lease: str) -> None:
        await self._submit(lambda draft: draft.end(lease))

    async def aclose(self) -> None:
        """Finish what was asked before, end all watches, close. Idempotent."""
        self._closed = True
        if self._timer:
            self._timer.cancel()
        if self._flushing:
            await asyncio.wait([self._flushing])
        self._history.close()
        await self._tasks.aclose()

    async def _persist(self, draft: Draft) -> None:
        """Return once `draft` is durable; raise `TabaneError` when nothing of it is."""

    async def _submit(self, step: Callable[[Draft], T]) -> T:
        if self._closed:
            raise Closed("the store is closed: open it again")
        return await self._enqueue(step)

    def _enqueue(self, step: Callable[[Draft], T]) -> asyncio.Future[T]:
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.append((step, answer))
        if self._flushing is None:
            self._flushing = self._tasks.start("flush", self._flush())
        return answer

    async def _flush(self) -> None:
        try:
            while self._queue:
                requests, self._queue = self._queue, []
                await self._flush_batch(requests)
        finally:
            self._flushing = None

    async def _flush_batch(self, requests: list[tuple[Step, asyncio.Future[Any]]]) -> None:
        draft = self._inflight = Draft(self._ledger)
        results = [(answer, _attempt(step, draft)) for step, answer in requests]
        try:
            if draft:
                await self._persist(draft)
        except Exception as error:
            results = [(answer, error) for answer, _ in results]
        else:
            self._apply(draft)
        finally:
            self._inflight = None
        for answer, result in results:
            _settle(answer, result)

    def _apply(self, draft: Draft) -> None:
        draft.apply()
        now = self._clock.now()
        for lease, ttl_s in draft.leases.items():
            self._deadlines.pop(lease, None)
            if ttl_s is not None:
                self._deadlines[lease] = now + ttl_s
        self._history.publish(draft.commits)
        self.view.tell(tuple(change for commit in draft.commits for change in commit.changes))
        if draft.leases:
            self._set_timer()

    def _begin_terms(self) -> None:
        """Give every lease a full term from now."""
        now = self._clock.now()
        self._deadlines = {lease: now + ttl_s for lease, ttl_s in self._ledger.leases.items()}
        self._set_timer()

    def _set_timer(self) -> None:
        """For the next lease to end; one that is overdue and still here could not be ended."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._deadlines and not self._closed:
            now = self._clock.now()
            due = min(end if end > now else now + RETRY_S for end in self._deadlines.values())
            self._timer = self._clock.call_at(due, lambda: self._on_timer(due))

    def _on_timer(self, due: float) -> None:
        now = self._clock.now()
        if now - due > LATE_S:
            self._begin_terms()
            return
        if min(self._deadlines.values()) <= now:
            self._enqueue(self._end_overdue).add_done_callback(_report)
        self._set_timer()

    def _end_overdue(self, draft: Draft) -> None:
        now = self._clock.now()
        for lease, deadline in self._deadlines.items():
            if deadline <= now:
                draft.end(lease)


def _attempt(step: Step, draft: Draft) -> Any:
    """What the step returns, or the error it raises. A step checks before it changes the draft."""
    try:
        return step(draft)
    except Exception as error:
        return error


def _settle(answer: asyncio.Future[Any], result: Any) -> None:
    if answer.done():
        return
    if isinstance(result, Exception):
        answer.set_exception(result)
    else:
        answer.set_result(result)


def _report(answer: asyncio.Future[None]) -> None:
    if error := answer.exception():
        log.error("leases that ended keep their keys for now: %s", error)
