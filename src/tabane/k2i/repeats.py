"""Orders with an idempotency key: the same one again has the first one's answer.

Also while the first is still under way: then both wait for it. A key belongs to who gave it, on the
node that obeys; a node that passes an order on remembers nothing, so that a repeat reaches those
nodes that did not answer, and only the answer of those that did is told again.

Keys are forgotten after an hour, and with the agent. Whoever has too many of them is told to wait:
a key that is remembered is never given up for a newer one.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

from tabane.clock import Clock
from tabane.errors import Busy, Conflict, TabaneError
from tabane.k2i.orders import InstanceOrder, Order
from tabane.security.identity import Principal
from tabane.supervise import Supervisor

KEEP_S = 3600.0
MOST = 20_000
"""Outcomes remembered for one principal; about 10 MB."""

Owner = tuple[str, int]
T = TypeVar("T")


class _Known(NamedTuple):
    order: Order | InstanceOrder
    size: int
    at: float
    answer: asyncio.Task[Any]


class Repeats:
    """Belongs to one event loop."""

    def __init__(
        self, tasks: Supervisor, clock: Clock, *, keep_s: float = KEEP_S, most: int = MOST
    ) -> None:
        self._tasks = tasks
        self._clock = clock
        self._keep_s = keep_s
        self._most = most
        self._known: dict[tuple[Owner, str], _Known] = {}
        """Oldest first."""
        self._sizes: Counter[Owner] = Counter()

    async def once(
        self,
        order: Order | InstanceOrder,
        who: Principal,
        obey: Callable[[], Coroutine[Any, Any, T]],
        *,
        size: int = 1,
    ) -> T:
        """What `obey()` returned for this key when it was first called, with `size` outcomes; it
        goes on to its end even if who waits for it is cancelled. Raises `Conflict` for another
        order with the same key, and `Busy`."""
        self._forget_old()
        owner = (who.kind, who.uid)
        known = self._known.get((owner, order.key))
        if known is None:
            self._make_room(owner, size)
            answer = self._tasks.start("order", _refusal_as_value(obey()))
            known = _Known(order, size, self._clock.now(), answer)
            self._known[owner, order.key] = known
            answer.add_done_callback(lambda task: self._on_done(owner, order.key, task))
        elif known.order != order:
            raise Conflict(f"the idempotency key {order.key!r} was used for another order")
        answered: T | TabaneError = await asyncio.shield(known.answer)
        if isinstance(answered, TabaneError):
            raise answered
        return answered

    def _make_room(self, owner: Owner, size: int) -> None:
        if self._sizes[owner] + size > self._most:
            problem = f"{self._most} outcomes are remembered for your idempotency keys"
            raise Busy(f"{problem}: wait, or send orders without", retry_after_s=60.0)
        self._sizes[owner] += size

    def _on_done(self, owner: Owner, key: str, task: asyncio.Task[Any]) -> None:
        """What was refused or failed as a whole may be tried again."""
        if task.cancelled() or task.exception() or isinstance(task.result(), TabaneError):
            self._forget(owner, key)

    def _forget_old(self) -> None:
        horizon = self._clock.now() - self._keep_s
        for (owner, key), known in list(self._known.items()):
            if known.at > horizon:
                break
            if known.answer.done():
                self._forget(owner, key)

    def _forget(self, owner: Owner, key: str) -> None:
        known = self._known.pop((owner, key), None)
        if known is not None:
            self._sizes[owner] -= known.size


async def _refusal_as_value(work: Coroutine[Any, Any, T]) -> T | TabaneError:
    """So that it is told to whom it concerns, and is no failure of a task."""
    try:
        return await work
    except TabaneError as error:
        return error
