"""The last commits, for those who watch.

Watchers have no queues of their own: each is a place in the one bounded history. One that falls
off its end is told so (`Stale`) and reads `range` again, so a slow watcher costs no memory.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable

from tabane.errors import Closed, Stale
from tabane.store.api import Change
from tabane.store.ledger import Commit

COMMITS_KEPT = 4096


class History:
    """Commits after revision `floor`, the oldest first."""

    def __init__(self, revision: int, *, limit: int = COMMITS_KEPT) -> None:
        self.floor = revision
        self._limit = limit
        self._commits: deque[Commit] = deque()
        self._news = asyncio.Event()
        self._closed = False

    @property
    def revision(self) -> int:
        return self.floor + len(self._commits)

    def publish(self, commits: Iterable[Commit]) -> None:
        self._commits.extend(commits)
        while len(self._commits) > self._limit:
            self.floor = self._commits.popleft().revision
        self._wake()

    def close(self) -> None:
        """End every watch with `Closed`."""
        self._closed = True
        self._wake()

    def watch(self, prefix: str, after: int | None) -> HistoryWatch:
        watch = HistoryWatch(self, prefix, self.revision if after is None else after)
        self.check(watch.revision)
        return watch

    def check(self, revision: int) -> None:
        """Raise `Stale` unless all that came after `revision` is still here."""
        if not self.floor <= revision <= self.revision:
            raise Stale(
                f"the store has changes from revision {self.floor} to {self.revision}, "
                f"not from {revision}: read the range again"
            )

    def after(self, revision: int) -> Commit | None:
        return self._commits[revision - self.floor] if revision < self.revision else None

    async def wait_for_news(self) -> None:
        if self._closed:
            raise Closed("the store was closed: open it and watch again")
        await self._news.wait()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class HistoryWatch:
    """An iterator over the commits that touch `prefix`; `revision` is the last one looked at."""

    def __init__(self, history: History, prefix: str, revision: int) -> None:
        self._history = history
        self._prefix = prefix
        self.revision = revision

    def __aiter__(self) -> HistoryWatch:
        return self

    async def __anext__(self) -> tuple[Change, ...]:
        while True:
            self._history.check(self.revision)
            commit = self._history.after(self.revision)
            if commit is None:
                await self._history.wait_for_news()
                continue
            self.revision = commit.revision
            if changes := tuple(c for c in commit.changes if c.key.startswith(self._prefix)):
                return changes
