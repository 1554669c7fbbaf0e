"""Time that passes when a test says so."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from tabane.clock import sleep_until


class VirtualTimer:
    """A call that `VirtualClock.advance` will make."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self._callback = None

    def _fire(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class VirtualClock:
    """A `Clock` that stands still until `advance`. Both clocks run at the same rate."""

    def __init__(self, *, now: float = 1_000.0, wall: float = 1_700_000_000.0) -> None:
        self._now = now
        self._wall_offset = wall - now
        self._timers: list[tuple[float, int, VirtualTimer]] = []
        self._order = itertools.count()

    def now(self) -> float:
        return self._now

    def wall(self) -> float:
        return self._now + self._wall_offset

    def call_at(self, when: float, callback: Callable[[], None]) -> VirtualTimer:
        timer = VirtualTimer(callback)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    async def sleep_until(self, when: float) -> None:
        await sleep_until(self, when)

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass: each timer is called at exactly its moment, in order, before this
        returns; tasks that a timer wakes run when the caller next awaits."""
        end = self._now + seconds
        while self._timers and self._timers[0][0] <= end:
            when, _, timer = heapq.heappop(self._timers)
            self._now = max(self._now, when)
            timer._fire()
        self._now = end

    def stall(self, seconds: float) -> None:
        """Let `seconds` pass in which this program did not run: timers are called late."""
        self._now += seconds
        self.advance(0.0)

    def step_wall(self, seconds: float) -> None:
        """Set the wall clock forward (or back), as an operator or NTP does."""
        self._wall_offset += seconds
