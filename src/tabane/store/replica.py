"""A node's durable copy of a part of the control node's store.

The node reads its apps and peers from here only, so it starts and goes on without the control
node. Each update is on disk before it is served or told to subscribers; what the file holds is
always one whole revision of the source.
"""

from __future__ import annotations

import logging
from contextlib import aclosing
from pathlib import Path
from typing import Self

from tabane.errors import Corrupt
from tabane.store.api import Change, Entry
from tabane.store.feed import Changes, Feed, Snapshot, Update
from tabane.store.ledger import Draft, Ledger
from tabane.store.sqlite import SqliteFile
from tabane.store.view import View

log = logging.getLogger(__name__)


class Replica(View):
    """Entries below `prefix`, as of `revision`. Made by `open`.

    `revision` 0 means that nothing was ever learnt, which is not the same as that nothing is there.
    """

    def __init__(self, file: SqliteFile, ledger: Ledger, prefix: str) -> None:
        super().__init__(ledger)
        self.prefix = prefix
        self._file = file

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
        self.tell(changes)

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
