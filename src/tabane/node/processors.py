"""Whether the machine's processors have something to spare."""

from __future__ import annotations

import logging
from pathlib import Path

from tabane.clock import Clock

log = logging.getLogger(__name__)

WINDOW_S = 0.1
"""The kernel counts in hundredths of a second: less tells nothing."""
BUSY = 0.9
IDLE, IOWAIT = 3, 4
"""Fields of the line `cpu` of /proc/stat: see proc_stat(5)."""


class Processors:
    """Looks at most once in `WINDOW_S`, when it is asked."""

    def __init__(self, clock: Clock, path: Path = Path("/proc/stat")) -> None:
        self._clock = clock
        self._path = path
        self._looked_at = float("-inf")
        self._seen = (0, 0)
        self._are_busy = False

    def are_busy(self) -> bool:
        """Whether they had all but nothing to spare, the last time and since. Where that cannot be
        told: no."""
        now = self._clock.now()
        if now >= self._looked_at + WINDOW_S:
            self._looked_at = now
            self._look()
        return self._are_busy

    def _look(self) -> None:
        try:
            ticks = [*map(int, self._path.read_text().split("\n", 1)[0].split()[1:9])]
            idle, total = ticks[IDLE] + ticks[IOWAIT], sum(ticks)
        except (OSError, ValueError, IndexError) as error:
            log.warning("how busy the processors are cannot be told: %s", error)
            self._are_busy = False
            return
        passed, spare = total - self._seen[1], idle - self._seen[0]
        self._seen = idle, total
        self._are_busy = passed > 0 and spare < (1 - BUSY) * passed
