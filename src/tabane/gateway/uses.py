"""How many sessions a gateway has in instances whose resources follow them: told to their nodes.

A rise is told at once. A fall is looked for twice a second, and told when it was so for all of
that time: what comes and goes with each request is no message for each. Without IO.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tabane.gateway.grants import Lease
from tabane.model import InstanceId, Value

LOOK_S = 0.5


class InUse(Value, frozen=True):
    """What a gateway knows of an instance that it holds slots of."""

    instance: InstanceId
    sessions: int
    unused_s: float


@dataclass(slots=True)
class Use:
    told: int = 0
    peak: int = 0
    """Of the sessions since the last look."""


class Uses:
    """`tell` is told a lease and its sessions; `look_later` has `look` called in `LOOK_S`, once."""

    def __init__(self, tell: Callable[[Lease, int], None], look_later: Callable[[], None]) -> None:
        self._tell, self._look_later = tell, look_later
        self._uses: dict[Lease, Use] = {}

    def note(self, lease: Lease) -> None:
        """A session of it has begun or ended."""
        use = self._uses.get(lease)
        if use is None:
            use = self._uses[lease] = Use()
            self._look_later()
        use.peak = max(use.peak, lease.used)
        if lease.used > use.told:
            use.told = lease.used
            self._tell(lease, use.told)

    def look(self) -> None:
        """Tell of what has fallen; forget what has no sessions."""
        for lease, use in list(self._uses.items()):
            if use.peak < use.told:
                use.told = use.peak
                self._tell(lease, use.told)
            use.peak = lease.used
            if not (use.told or use.peak):
                del self._uses[lease]
        if self._uses:
            self._look_later()

    def tell_all(self) -> None:
        """Agents are new, and know nothing."""
        for lease, use in self._uses.items():
            self._tell(lease, use.told)
