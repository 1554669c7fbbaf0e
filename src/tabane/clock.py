"""The only source of time.

Durations and deadlines use `now()` (monotonic seconds, never compared between machines); stamps
that people read use `wall()` (seconds since the epoch). Tests replace the clock with
`tabane.testing.VirtualClock`, so nothing else may import `time` for the present moment.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Monotonic seconds."""

    def wall(self) -> float:
        """Seconds since 1970-01-01 UTC."""


class SystemClock:
    """The machine's clocks."""

    def now(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


SYSTEM = SystemClock()
