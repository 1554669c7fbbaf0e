"""How a part of a store reaches those who keep a replica of it: one snapshot, then changes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from tabane.errors import Stale
from tabane.model import Value
from tabane.store.api import Change, Entry, Store


class Snapshot(Value, frozen=True, tag="snapshot"):
    """All entries below the prefix, as they were at `revision`."""

    revision: int
    entries: tuple[Entry, ...]


class Changes(Value, frozen=True, tag="changes"):
    """What one commit changed below the prefix."""

    changes: tuple[Change, ...]

    @property
    def revision(self) -> int:
        return self.changes[-1].revision


Update = Snapshot | Changes


class Feed(Protocol):
    """Where a replica learns from, over whatever transport."""

    def follow(self, prefix: str, after: int) -> AsyncGenerator[Update, None]:
        """All that came after revision `after` (0: from the beginning), without end.

        Begins with a `Snapshot` when there is no way to tell just the changes. Ends, or raises
        `Closed` or `Unavailable`, when the source is lost.
        """


class StoreFeed:
    """The feed at its source: a `Store` in this process."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def follow(self, prefix: str, after: int) -> AsyncGenerator[Update, None]:
        while True:
            try:
                if not after:
                    after, entries = await self._store.range(prefix)
                    yield Snapshot(after, tuple(entries))
                async with self._store.watch(prefix, after=after) as watch:
                    async for changes in watch:
                        yield Changes(changes)
            except Stale:
                after = 0
