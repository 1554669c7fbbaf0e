"""The only source of time.

Durations and deadlines use `now()` (monotonic seconds, never compared between machines); stamps
that people read use `wall()` (seconds since the epoch). Tests replace the clock with
`tabane.testing.VirtualClock`, so nothing else may import `time` for the present moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """A call to come."""

    def cancel(self) -> None:
        """Call it off. Idempotent, and without effect once it was made."""


class Clock(Protocol):
    def now(self) -> float:
        """Monotonic seconds."""

    def wall(self) -> float:
        """Seconds since 1970-01-01 UTC."""

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` on the running event loop once `now()` has reached `when`."""


class SystemClock:
    """The machine's clocks."""

    now = staticmethod(time.monotonic)
    wall = staticmethod(time.time)

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        from asyncio import get_running_loop  # commands that only want the time start without it

        return get_running_loop().call_later(max(0.0, when - self.now()), callback)


SYSTEM = SystemClock()


def read_kernel_clocks_ns() -> tuple[int, int]:
    """CLOCK_MONOTONIC and CLOCK_BOOTTIME, in nanoseconds: for what a program sees of them."""
    return (
        time.clock_gettime_ns(time.CLOCK_MONOTONIC),
        time.clock_gettime_ns(time.CLOCK_BOOTTIME),
    )


async def sleep_until(clock: Clock, when: float) -> None:
    """Wait until `clock.now()` has reached `when`."""
    from asyncio import Event

    reached = Event()
    timer = clock.call_at(when, reached.set)
    try:
        await reached.wait()
    finally:
        timer.cancel()
