"""A node's durable copy of a part of the control node's store.

The node reads its apps and peers from here only, so it starts and goes on without the control
node. Each update is on disk before it is served or told to subscribers; what the file holds is
always one whole revision of the source.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Self

from tabane.errors import Corrupt
from tabane.store.api import Change, Entry
from tabane.store.feed import Changes, Feed, Snapshot, Update
from tabane.store.ledger import Draft, Ledger
from tabane.store.sqlite import SqliteFile

log = logging.getLogger(__name__)

Subscriber = Callable[[tuple[Change, ...]], None]


class Replica:
    """Entries below `prefix`, as of `revision`. Made by `open`.

    `revision` 0 means that nothing was ever learnt, which is not the same as that nothing is there.
    """

    def __init__(self, file: SqliteFile, ledger: Ledger, prefix: str) -> None:
        self.prefix = prefix
        self._file = file
        self._ledger = ledger
        self._subscribers: list[Subscriber] = []

    @classmethod
    async def open(cls, path: Path, prefix: str) -> Self:
        """Begin with what the file at `path` holds. A damaged file is moved to `PATH.damaged` and
        the replica begins empty: the source still has it all.

        Raises `Unavailable`, `Unsupported` or `SystemFault` as the store does.
        """
        file = SqliteFile(path)
        try:
            ledger = await file.open()
        except Corrupt as error:
            log.error("beginning an empty replica: %s", error)
            _move_away(path)
            file = SqliteFile(path)
            ledger = await file.open()
        return cls(file, ledger, prefix)

    @property
    def revision(self) -> int:
        return self._ledger.revision

    def get(self, key: str) -> Entry | None:
        return self._ledger.entries.get(key)

    def range(self, prefix: str) -> list[Entry]:
        """Entries whose key starts with `prefix`, by key."""
        return self._ledger.range(prefix)

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """Call `callback` with each update's changes (none, when only the revision is newer), once
        they are on disk and served.

        Returns what ends the subscription. A callback must not block; when one raises, that is
        logged, and the others are called.
        """
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    async def follow(self, feed: Feed) -> None:
        """Take updates until the feed ends or raises; to be called again then."""
        async with aclosing(feed.follow(self.prefix, self.revision)) as updates:
            async for update in updates:
                await self.update(update)

    async def update(self, update: Update) -> None:
        """Take one update: a snapshot replaces everything, changes already known are nothing."""
        if isinstance(update, Snapshot):
            ledger = Ledger(update.revision, {entry.key: entry for entry in update.entries})
            changes = _differences(self._ledger, ledger)
            await self._file.replace(ledger)
            self._ledger = ledger
        elif update.revision > self.revision:
            changes = update.changes
            draft = _draft(self._ledger, update)
            await self._file.write(draft)
            draft.apply()
        else:
            return
        for callback in tuple(self._subscribers):
            try:
                callback(changes)
            except Exception:
                log.exception("revision %d is not taken in everywhere", self.revision)

    async def aclose(self) -> None:
        """Idempotent."""
        await self._file.aclose()


def _draft(ledger: Ledger, update: Changes) -> Draft:
    draft = Draft(ledger)
    draft.revision = update.revision
    for change in update.changes:
        draft.entries[change.key] = (
            None if change.value is None else Entry(change.key, change.value, change.revision)
        )
    return draft


def _differences(old: Ledger, new: Ledger) -> tuple[Change, ...]:
    """What turns `old` into `new`, by key."""
    deleted = (Change(key, None, new.revision) for key in old.entries.keys() - new.entries.keys())
    written = (
        Change(key, entry.value, entry.version)
        for key, entry in new.entries.items()
        if (known := old.entries.get(key)) is None or known.value != entry.value
    )
    return tuple(sorted((*deleted, *written), key=lambda change: change.key))


def _move_away(path: Path) -> None:
    for suffix in ("", "-wal", "-journal"):
        file = path.with_name(path.name + suffix)
        if file.exists():
            file.rename(path.with_name(f"{path.name}.damaged{suffix}"))
