"""How much of what costs the gateway, and brings nobody anything, one HTTP/2 connection may send.

Pings, settings, resets, empty frames: each is legal, and costs next to nothing; a flood of them
does not (CVE-2019-9512 and its kind, CVE-2023-44487). So they are paid for, from a purse that
time and useful work fill. Plain functions of time, without IO.
"""

from __future__ import annotations

FULL = 1000.0
"""As many as nghttp2 allows at once of resets (1,000, then 33 a second)."""
FRAMES_PER_S = 50.0


class FrameBudget:
    """One connection's."""

    __slots__ = ("_left", "_since")

    def __init__(self, now: float) -> None:
        self._left = FULL
        self._since = now

    def spend(self, now: float) -> bool:
        """One such frame came. False: it was one too many."""
        self._left = min(FULL, self._left + (now - self._since) * FRAMES_PER_S)
        self._since = now
        self._left -= 1
        return self._left >= 0

    def earn(self, frames: int = 1) -> None:
        """Something useful was done, that is worth so many."""
        self._left = min(FULL, self._left + frames)
