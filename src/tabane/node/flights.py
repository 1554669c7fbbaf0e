"""Work that many may want at once and that is done once: they share its progress and its outcome.

Who no longer waits leaves; when nobody waits any more, the work is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tabane.errors import TabaneError
from tabane.images.registry import Progress, Tell
from tabane.supervise import Supervisor

Work = Callable[[Tell], Awaitable[None]]


@dataclass
class _Flight:
    task: asyncio.Task[Exception | None]
    followers: list[Tell] = field(default_factory=list)
    latest: Progress | None = None


class Flights:
    """See the module's text."""

    def __init__(self, tasks: Supervisor) -> None:
        self._tasks = tasks
        self._flights: dict[str, _Flight] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._flights

    def keys(self) -> set[str]:
        """Of what is being done."""
        return set(self._flights)

    def progress(self, key: str) -> Progress | None:
        """How far it is; None: nobody does it."""
        flight = self._flights.get(key)
        return (flight.latest or Progress("begin")) if flight is not None else None

    async def join(self, key: str, work: Work, tell: Tell) -> None:
        """Have `work` done, unless it is being done already; raises what it raised. `tell` hears
        how far it is. Whoever is cancelled only leaves."""
        flight = self._flights.get(key) or self._begin(key, work)
        flight.followers.append(tell)
        if flight.latest is not None:
            tell(flight.latest)
        try:
            problem = await asyncio.shield(flight.task)
        finally:
            flight.followers.remove(tell)
            if not flight.followers and self._flights.get(key) is flight:
                del self._flights[key]
                flight.task.cancel()
        if problem is not None:
            raise problem

    def _begin(self, key: str, work: Work) -> _Flight:
        flight = _Flight(self._tasks.start(f"flight {key[:19]}", self._fly(key, work)))
        self._flights[key] = flight
        return flight

    async def _fly(self, key: str, work: Work) -> Exception | None:
        """What went wrong is the followers' to raise."""
        flight = self._flights[key]

        def tell(progress: Progress) -> None:
            flight.latest = progress
            for follower in tuple(flight.followers):
                follower(progress)

        try:
            await work(tell)
        except (TabaneError, OSError) as error:
            return error
        finally:
            if self._flights.get(key) is flight:
                del self._flights[key]
        return None
