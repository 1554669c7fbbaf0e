"""An instance that its node, short of memory, wants lower on the ladder: the word, and its time.

The node picks (`tabane.scheduler.pressure`) by what it sees. What it picked goes down only when its
app's home finds it idle, as for any freeze and any stop: the gateways are asked for the slots they
hold. A session wins; and what is not idle within `LOWER_S` stays, and the node looks again.
"""

from __future__ import annotations

from tabane.model import AppName, InstanceId, Value
from tabane.scheduler.pressure import Rung

LOWER_S = 1.0
LOWER_IDLE_S = 0.02
"""Without a session for so long; the node took it for idle."""


class LowerAsked(Value, frozen=True):
    """An instance's node wants it down. `last`: nothing else helps, so also if fewer are left than
    its app's `min`."""

    app: AppName
    instance: InstanceId
    rung: Rung
    reason: str
    last: bool = False


class Lowering(Value, frozen=True):
    """What an app's home has to do with one, until then."""

    asked: LowerAsked
    until: float
