"""How many starts a node makes at the same time: found by measuring, without a clock.

A start that has the node for itself takes a while; many at once take longer each, from where they
only wait for each other. By Little's law, of `n` starts under way that take `took_s` each and would
take `own_s` alone, `n * own_s / took_s` are worked on and the others wait inside the kernel. As
TCP Vegas does with packets (Brakmo and Peterson, 1995), the limit is raised by one while fewer
than `LEAST_QUEUED` wait there, and lowered by one when it is more than `MOST_QUEUED`: the
processors always have something to do, and the line forms where it is fair (`fair_queue`).

What a start takes alone is told by those that were alone, and by any that was faster; of each
`kind` for itself, as engines differ, and a restore from a cold start.
"""

from __future__ import annotations

from tabane.model import AppName, InstanceId

LEAST_QUEUED, MOST_QUEUED = 1.0, 3.0
ROUND = 8
"""The limit is looked at after so many starts, or after as many as it allows at once."""
MOST_PER_PROCESSOR = 16
"""Starts that wait for disks more than for processors may be this many."""


class Boots:
    """The programs of a node that were started and are not ready yet. They have no turn any more,
    since many only wait for something then; but where all processors are busy, each more makes
    the others later, until none is in time. So an app is held back then that has one on its
    way, as long as there are more of these, and turns, than processors; whoever has none is not.
    And only for some time after its latest turn: what else keeps the processors busy may be no
    start at all."""

    def __init__(self, processors: int) -> None:
        self._processors = max(1, processors)
        self._apps: dict[InstanceId, AppName] = {}
        self._until: dict[AppName, float] = {}

    def begin(self, instance: InstanceId, app: AppName, hold_until: float) -> None:
        """Its engine has done its part. Its app is not held back for longer than that."""
        self._apps[instance] = app
        self._until[app] = hold_until

    def note_turn(self, app: AppName, hold_until: float) -> None:
        """Another start of it has its turn."""
        if app in self._until:
            self._until[app] = hold_until

    def end(self, instance: InstanceId) -> bool:
        """It is ready, or no more. Whether it was one of these."""
        app = self._apps.pop(instance, None)
        if app is not None and app not in self._apps.values():
            del self._until[app]
        return app is not None

    def held(self, now: float, *, turns: int, is_busy: bool) -> frozenset[AppName]:
        """The apps to be held back, while so many have their turn."""
        if not is_busy or len(self._apps) + turns <= self._processors:
            return frozenset()
        return frozenset(app for app, until in self._until.items() if now < until)


class Capacity:
    """`limit` begins at the number of processors, and is never less."""

    def __init__(self, processors: int) -> None:
        self._least = max(1, processors)
        self._most = MOST_PER_PROCESSOR * self._least
        self.limit = self._least
        self._took_s: dict[str, float] = {}
        """What starts of each kind take of late."""
        self._own_s: dict[str, float] = {}
        self._queued: list[float] = []
        """By each start of this round: how many of those with it waited for each other."""
        self._was_full = True
        """In all of this round there were as many as the limit allows, and more to come."""

    def note(self, kind: str, took_s: float, *, beside: int, waiting: int) -> None:
        """A start of that kind is done. `beside`: how many others were under way with it, at most;
        `waiting`: how many wait for their turn now."""
        took_s = max(took_s, 1e-6)
        before_s = self._took_s.get(kind, took_s)
        self._took_s[kind] = before_s + (took_s - before_s) / 8
        worked = self._learn(kind, took_s, beside) / took_s
        self._queued.append((beside + 1) * (1 - worked))
        self._was_full &= waiting > 0 and beside + 1 >= self.limit
        if len(self._queued) >= max(ROUND, self.limit):
            self._adjust()

    def own_s(self, kind: str) -> float | None:
        """What it takes alone; None: not known yet."""
        return self._own_s.get(kind)

    def wait_s(self, ahead: int, turns: int) -> float:
        """How long one has to wait at the least that has `ahead` others before it, while so many
        have their turn: as if all were of the kind that takes the shortest."""
        before = ahead + 1 + turns - self.limit
        return max(0, before) * min(self._took_s.values(), default=0.0) / self.limit

    def _learn(self, kind: str, took_s: float, beside: int) -> float:
        """What it would have taken alone: never more than it took."""
        own_s = self._own_s.get(kind, took_s)
        own_s = own_s + (took_s - own_s) / 4 if not beside else own_s
        self._own_s[kind] = own_s = min(own_s, took_s) if beside else own_s
        return min(own_s, took_s)

    def _adjust(self) -> None:
        queued = sum(self._queued) / len(self._queued)
        if queued > MOST_QUEUED:
            self.limit = max(self._least, self.limit - 1)
        elif queued < LEAST_QUEUED and self._was_full:
            self.limit = min(self._most, self.limit + 1)
        self._queued, self._was_full = [], True
