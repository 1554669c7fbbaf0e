"""Which moments of a trigger are carried out, which are left out: plain functions of time.

What was decided is in a `Mark`, which its keeper stores before it acts: each moment is begun once,
and one that was begun and not finished when the keeper ended is carried out again.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from tabane.cron import latest_until
from tabane.reactions import Trigger

LATE_S = 30.0
"""A moment noticed so much later was missed: the control node was away. Its agent alone is back
much sooner after its end."""


class Mark(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of a trigger's moments, in seconds since the epoch."""

    last: float = 0.0
    """The latest one that was decided on."""
    pending: tuple[float, ...] = ()
    """Begun, and not finished."""
    at: float = 0.0
    outcome: str = ""
    """What became of one last, and when."""


class Fire(NamedTuple):
    moment: float


class Skip(NamedTuple):
    moment: float
    why: str


def decide(trigger: Trigger, mark: Mark, since: float, now: float) -> Fire | Skip | None:
    """What is to be done now; of several moments since the last, the latest stands for all.
    `since`: when the app was deployed as it is, before which no moment counts."""
    latest = latest_until(trigger.cron, trigger.timezone, max(mark.last, since), now)
    if latest is None:
        return None
    if now - latest > LATE_S and trigger.missed == "skip":
        return Skip(latest, "missed: the control node was away")
    if mark.pending and trigger.overlap == "skip":
        return Skip(latest, "the request of the moment before is not answered yet")
    return Fire(latest)


def after(mark: Mark, decision: Fire | Skip, now: float) -> Mark:
    """The mark to be stored before it is acted on."""
    if isinstance(decision, Skip):
        return msgspec.structs.replace(
            mark, last=decision.moment, at=now, outcome=f"left out: {decision.why}"
        )
    pending = (*mark.pending, decision.moment)
    return msgspec.structs.replace(mark, last=decision.moment, pending=pending)


def finished(mark: Mark, moment: float, outcome: str, now: float) -> Mark:
    pending = tuple(each for each in mark.pending if each != moment)
    return msgspec.structs.replace(mark, pending=pending, at=now, outcome=outcome)
