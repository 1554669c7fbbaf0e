"""What a node that is short of memory takes down the ladder, and when: decisions without IO.

`Gauge` says how much is missing, with hysteresis: it begins to, when less is available than is to
be kept free, and ends at half as much again. `plan` says who gives it: instances without a session
only, the coldest first, and no more than are needed. As few as possible leave; of the others as few
as possible are put to rest, which costs their next session less, and frees what the kernel can take
to swap. Those that an app's `min` promises leave last, and for nobody's start.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum

from tabane.model import AppName, InstanceId, Value

KEPT_SHARE = 0.05
LEAST_KEPT_BYTES, MOST_KEPT_BYTES = 64 << 20, 1 << 30
MOST_KEPT_SHARE = 0.25
"""Of a node so small that the least would be most of it."""
ENOUGH = 1.5
"""Pressure is over at so many times what is kept free."""
STALLED_PERCENT = 10.0
"""All that could run waited for memory in so much of the last ten seconds (`full avg10` of PSI).
systemd-oomd kills at 60; what is done here hurts less."""
STALL_COUNTS = 3.0
"""Stalls are the node's only if less is available than so many times what is kept free: an instance
at its own limit stalls, too, and nobody else's leaving helps it."""
STALL_PAUSE_S = 10.0
"""After so long the average tells what came of the last step."""


class Rung(StrEnum):
    """How far down."""

    REST = "rest"
    """Frozen, and its memory had back."""
    LEAVE = "leave"
    """Ended, and put away before if its app says so."""


class Standing(Value, frozen=True):
    """An instance that was ready, as its node sees it."""

    instance: InstanceId
    app: AppName
    idle_s: float | None
    """Since its last session; None: it is in use."""
    leave_bytes: int
    """What comes free when it leaves."""
    rest_bytes: int = 0
    """And when it rests, which is less; 0: nothing, or it cannot, or it does already."""
    promised: bool = False
    """Its app has a `min`."""


class Step(Value, frozen=True):
    instance: InstanceId
    app: AppName
    rung: Rung
    frees_bytes: int
    idle_s: float
    last: bool = False
    """Nothing else helps: also if its app's `min` is not kept then."""


def kept_bytes(capacity_bytes: int) -> int:
    """What a node keeps free of so much memory."""
    share = int(capacity_bytes * KEPT_SHARE)
    kept = min(max(share, LEAST_KEPT_BYTES), MOST_KEPT_BYTES)
    return min(kept, int(capacity_bytes * MOST_KEPT_SHARE))


class Gauge:
    """Whether a node is short of memory, and of how much. `now` is monotonic seconds."""

    def __init__(self) -> None:
        self.is_short = False
        self._stalled_at = -STALL_PAUSE_S

    def need(self, available_bytes: int, kept: int, stalled_percent: float, now: float) -> int:
        """What is to come free now, in bytes; 0: nothing. `kept`: as of `kept_bytes`."""
        enough = int(kept * ENOUGH)
        stalls = stalled_percent >= STALLED_PERCENT and available_bytes < kept * STALL_COUNTS
        if available_bytes < kept or stalls:
            self.is_short = True
        elif available_bytes >= enough:
            self.is_short = False
        if not self.is_short:
            return 0
        need = max(0, enough - available_bytes)
        if stalls and now >= self._stalled_at + STALL_PAUSE_S:
            self._stalled_at = now
            need = max(need, kept)
        return need


def plan(standing: Iterable[Standing], need_bytes: int) -> tuple[Step, ...]:
    """Who gives so much. When all that is idle is less, all of it goes."""
    idle = _coldest_first(standing)
    leaving = sorted(idle, key=lambda one: one.promised)
    return _steps(idle, leaving, need_bytes) if need_bytes > 0 else ()


def plan_room(standing: Iterable[Standing], need_bytes: int) -> tuple[Step, ...]:
    """The same for a start that finds no room. What would not be enough is left alone, and what a
    `min` promises may rest, but does not leave."""
    idle = _coldest_first(standing)
    leaving = [one for one in idle if not one.promised]
    resting = sum(one.rest_bytes for one in idle if one.promised)
    if need_bytes <= 0 or resting + sum(one.leave_bytes for one in leaving) < need_bytes:
        return ()
    return _steps(idle, leaving, need_bytes)


def _coldest_first(standing: Iterable[Standing]) -> list[Standing]:
    """Those that are idle and have something to give."""
    idle = [one for one in standing if one.idle_s is not None and one.leave_bytes > 0]
    return sorted(idle, key=lambda one: (-(one.idle_s or 0.0), one.instance))


def _steps(
    idle: Sequence[Standing], leaving: Sequence[Standing], need_bytes: int
) -> tuple[Step, ...]:
    """The fewest of `leaving` leave, from the first on, such that with the rest of all it is
    enough; then the fewest rest."""
    left_bytes, rest_bytes = 0, sum(one.rest_bytes for one in idle)
    count = 0
    while count < len(leaving) and left_bytes + rest_bytes < need_bytes:
        left_bytes += leaving[count].leave_bytes
        rest_bytes -= leaving[count].rest_bytes
        count += 1
    steps = [_step(one, Rung.LEAVE) for one in leaving[:count]]
    gone = {step.instance for step in steps}
    for one in idle:
        if left_bytes >= need_bytes:
            break
        if one.rest_bytes and one.instance not in gone:
            steps.append(_step(one, Rung.REST))
            left_bytes += one.rest_bytes
    return tuple(steps)


def _step(one: Standing, rung: Rung) -> Step:
    frees_bytes = one.leave_bytes if rung is Rung.LEAVE else one.rest_bytes
    last = one.promised and rung is Rung.LEAVE
    return Step(one.instance, one.app, rung, frees_bytes, one.idle_s or 0.0, last)
