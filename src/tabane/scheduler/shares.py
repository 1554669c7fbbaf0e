"""What of its resources an instance has while so many sessions use it: plain functions of time.

It begins with all. A rise of its sessions is followed at once, a fall only after `HOLD_S` without a
rise, so that what comes in waves is not braked in between.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tabane.model import App, Resources

HOLD_S = 5.0


def cpu_for(resources: Resources, sessions: int, concurrency: int) -> float:
    """CPUs: from `cpu_min` with no session up to `cpu` with `concurrency` of them, linearly."""
    low = resources.cpu if resources.cpu_min is None else resources.cpu_min
    return low + (resources.cpu - low) * min(1.0, sessions / concurrency)


def memory_for(resources: Resources, sessions: int, concurrency: int) -> int | None:
    """Bytes of memory beyond which the kernel has it back; None: it does not follow."""
    low, high = resources.memory_min_bytes, resources.memory_bytes
    if low is None:
        return None
    return low + round((high - low) * min(1.0, sessions / concurrency))


@dataclass(slots=True)
class Share:
    """Of one instance. `sessions`: as each gateway last told."""

    app: App
    sessions: dict[str, int] = field(default_factory=dict)
    level: int = 0
    """The number of sessions that its limits are set for; at first as many as it may have."""
    wanted: int = 0
    lower_at: float | None = None
    """When it may be lowered to what is wanted; None: it is there."""

    @classmethod
    def begin(cls, app: App, now: float) -> Share:
        """It is ready, with all of its resources."""
        return cls(app, level=app.reactive.concurrency, lower_at=now + HOLD_S)

    def hear(self, gateway: str, count: int, now: float) -> bool:
        """So many sessions go through a gateway. Returns whether `level` has changed."""
        if count:
            self.sessions[gateway] = count
        else:
            self.sessions.pop(gateway, None)
        before, total = self.wanted, sum(self.sessions.values())
        self.wanted = min(total, self.app.reactive.concurrency)
        if self.wanted >= self.level:
            rises, self.level, self.lower_at = self.wanted > self.level, self.wanted, None
            return rises
        if self.lower_at is None or self.wanted > before:
            self.lower_at = now + HOLD_S
        return False

    def look(self, now: float) -> bool:
        """Time has passed. Returns whether `level` has changed."""
        if self.lower_at is None or now < self.lower_at:
            return False
        self.lower_at = None
        lowers, self.level = self.wanted < self.level, self.wanted
        return lowers

    @property
    def cpu(self) -> float:
        return cpu_for(self.app.resources, self.level, self.app.reactive.concurrency)

    @property
    def memory_bytes(self) -> int | None:
        return memory_for(self.app.resources, self.level, self.app.reactive.concurrency)
