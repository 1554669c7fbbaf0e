"""What a store holds as one sees it who works with it: entries, and who is told of changes."""

from __future__ import annotations

import logging
from collections.abc import Callable

from tabane.store.api import Change, Entry
from tabane.store.ledger import Ledger

log = logging.getLogger(__name__)

Subscriber = Callable[[tuple[Change, ...]], None]


class View:
    """A ledger to be read, as of `revision`; who owns that tells what changed."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._subscribers: list[Subscriber] = []

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

    def tell(self, changes: tuple[Change, ...]) -> None:
        """They are on disk, and in the ledger."""
        for callback in tuple(self._subscribers):
            try:
                callback(changes)
            except Exception:
                log.exception("revision %d is not taken in everywhere", self.revision)
