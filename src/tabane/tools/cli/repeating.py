"""Reports that come again and again, as `vmstat 1` and `free -s 1` make them."""

from __future__ import annotations

import time
from collections.abc import Iterator

from tabane.clock import SYSTEM
from tabane.tools.cli.common import seconds_upto

LONGEST_S = 1_000_000.0
seconds = seconds_upto(LONGEST_S)
"""The type of an option or word that is a delay."""


def every(delay_s: float, count: int | None) -> Iterator[int]:
    """0, 1, ... at their moments: `delay_s` apart however long each takes, as far as it can be.
    `count` None: without end."""
    due = SYSTEM.now()
    n = 0
    while count is None or n < count:
        if n:
            due = max(due + delay_s, SYSTEM.now())
            pause(due - SYSTEM.now())
        yield n
        n += 1


def pause(seconds: float) -> None:
    time.sleep(max(0.0, seconds))
