"""Has the kernel do ahead what it waits for before it moves a process into a cgroup.

The lock that keeps processes from forking while one is moved (`cgroup_threadgroup_rwsem`) costs
those that fork nothing, and who takes it a grace period of RCU: 6 to 16 ms on a machine at rest.
Who takes it within the next 10 ms waits for none. An engine moves what it starts into its cgroup
some milliseconds after a session came, so the lock is taken and left as soon as it is known that
one did, by moving the process that knows to where it is. See docs/decisions/moves-ahead.md.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

from tabane.clock import SYSTEM, Clock
from tabane.runtimes.cgroups import find_hierarchies

MYSELF = "0"
AGAIN_S = 0.01
"""Nothing comes of it sooner."""


class Moves:
    """See the module's text."""

    def __init__(self, clock: Clock = SYSTEM) -> None:
        self._clock = clock
        self._waiting: asyncio.Future[None] | None = None
        self._again_at = 0.0

    def foresee(self) -> None:
        """A process will be moved soon. One wait at a time is enough, and one in a while."""
        now = self._clock.now()
        if now < self._again_at or not (self._waiting is None or self._waiting.done()):
            return
        self._again_at = now + AGAIN_S
        self._waiting = asyncio.get_running_loop().run_in_executor(None, move_nowhere)


def move_nowhere() -> None:
    """Move this process to its own cgroup. Blocks for the grace period."""
    hierarchies, told = find_hierarchies(), Path("/proc/self/cgroup").read_text()
    name = next(iter(hierarchies))
    with suppress(OSError):  # only time is lost: the engine finds what is wrong, and says so
        (hierarchies[name] / own_path(told, name) / "cgroup.procs").write_text(MYSELF)


def own_path(told: str, controller: str) -> str:
    """Below the root of a controller's hierarchy, from the text of /proc/self/cgroup."""
    lines = (line.split(":", 2) for line in told.splitlines())
    return next(path for _, names, path in lines if controller in names.split(",")).lstrip("/")
