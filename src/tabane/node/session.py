"""Whether an agent has a session with its hub, and how long one that was lost is waited for."""

from __future__ import annotations

import asyncio

from tabane.clock import Clock
from tabane.errors import Closed


class HubSession:
    """It is open while all rooms are joined, too: what is known of them is as the hub says."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._open = asyncio.Event()
        self._lost_at = clock.now()

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    def on_open(self) -> None:
        self._open.set()

    def on_lost(self) -> None:
        self._open.clear()
        self._lost_at = self._clock.now()

    async def wait(self, within_s: float) -> None:
        """Return while it is open. A hub that was killed is back in a moment: until `within_s`
        after the session was lost it is waited for, and from then on this raises `Closed`."""
        left_s = self._lost_at + within_s - self._clock.now()
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                await self._open.wait()
        except TimeoutError:
            raise Closed(f"there is no session with the hub since {within_s:g} s or more") from None
