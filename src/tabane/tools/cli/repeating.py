"""Reports that come again and again, as `vmstat 1` and `free -s 1` make them."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator

from tabane.clock import SYSTEM

LONGEST_S = 1_000_000.0


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


def seconds(text: str) -> float:
    """An option's type: a number of seconds above 0."""
    value = float(text) if re.fullmatch(r"[0-9]{1,7}(\.[0-9]{0,9})?|\.[0-9]{1,9}", text) else 0.0
    if not 0 < value <= LONGEST_S:
        problem = f"{text!r} is no number of seconds above 0, up to {LONGEST_S:.0f}"
        raise argparse.ArgumentTypeError(problem)
    return value
