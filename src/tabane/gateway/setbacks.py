"""An app's setbacks in a row, and how long its home pauses for them: plain functions of time.

A *failed start* never became ready. An *early end* is of an instance that became ready and ended by
itself soon after. What served for longer shows that starts work: its end is an end, not a setback,
and ends the row. The first early end costs nothing, and the first failed start next to nothing:
such things happen. From the second setback on, pauses double, so that what cannot run does not take
a node's time from what can.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

NEVER = float("-inf")
HEALTHY_S = 10.0
"""An instance that was ready for so long shows that starts work."""
RETRY_S = 0.1
"""Pause before the second trial of an app whose first start failed."""
BACKOFF_FIRST_S = 0.5
BACKOFF_LAST_S = 30.0


@dataclass(slots=True)
class Setbacks:
    failed_starts: int = 0
    early_ends: int = 0
    total: int = 0
    """All that were ever counted, forgiven or not."""
    at: float = NEVER
    """When the last one was counted."""
    blocked_until: float = NEVER
    """No instance is started before."""
    reason: str = ""
    """Of the last one."""
    is_final: bool = False
    """A new start would end as the last one did: there is nothing to wait for."""

    @property
    def count(self) -> int:
        return self.failed_starts + self.early_ends

    def add_failed_start(self, reason: str, now: float, *, retry: bool) -> None:
        self.failed_starts += 1
        self._add(reason, now, RETRY_S if retry else BACKOFF_FIRST_S)
        self.is_final = not retry

    def add_early_end(self, reason: str, now: float) -> None:
        self.early_ends += 1
        self._add(reason, now, 0.0)
        self.is_final = False

    def _add(self, reason: str, now: float, first_s: float) -> None:
        self.total += 1
        self.at, self.reason = now, reason
        growth = min(self.count - 1, 10)
        pause_s = min(BACKOFF_FIRST_S * 2**growth, BACKOFF_LAST_S) if growth else first_s
        self.blocked_until = now + pause_s

    def on_ready(self, total_before: int) -> None:
        """An instance is ready that was started after so many. Starts work, so there is nothing to
        pause for; but what began before an early end may end as early."""
        if not self.early_ends or total_before == self.total:
            self.blocked_until, self.is_final = NEVER, False

    def forgive(self) -> None:
        """Starts work, or may work again."""
        self.failed_starts, self.early_ends, self.reason = 0, 0, ""
        self.blocked_until, self.is_final = NEVER, False

    def left_s(self, now: float) -> float:
        """Of the pause."""
        return max(0.0, self.blocked_until - now)

    def describe(self, now: float) -> str:
        """The rest of a sentence that begins with the app's name; empty without setbacks."""
        if not self.count:
            return ""
        happened = [
            f"{what} {_times(count)}"
            for what, count in (
                ("did not start", self.failed_starts),
                ("ended right after its start", self.early_ends),
            )
            if count
        ]
        text = f"{' and '.join(happened)}: {self.reason}"
        left_s = self.left_s(now)
        return f"{text}; next try in {math.ceil(left_s)} s" if left_s else text


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
