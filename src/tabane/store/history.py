"""The last commits, for those who watch: as many as make up `CHANGES_KEPT` changes.

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

CHANGES_KEPT = 8192


class History:
    """Commits after revision `floor`, the oldest first: the last, and those before that have no
    more than `limit` changes with it."""

    def __init__(self, revision: int, *, limit: int = CHANGES_KEPT) -> None:
        self.floor = revision
        self._limit = limit
        self._commits: deque[Commit] = deque()
        self._changes = 0
        self._news = asyncio.Event()
        self._closed = False

    @property
    def revision(self) -> int:
        return self.floor + len(self._commits)

    def publish(self, commits: Iterable[Commit]) -> None:
        for commit in commits:
            self._commits.append(commit)
            self._changes += len(commit.changes)
        while self._changes > self._limit and len(self._commits) > 1:
            oldest = self._commits.popleft()
            self.floor = oldest.revision
            self._changes -= len(oldest.changes)
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
