"""A transaction as those write it who read first: many reads and writes, one commit."""

from __future__ import annotations

from tabane.errors import Conflict
from tabane.store.api import Delete, Entry, Expect, Put, Store, Write


class Overtaken(Exception):
    """Another commit came between what was read and ours: read again."""


class Edit:
    """What was read is as it was when the commit is made, or nothing is written; it is read once.
    Own writes are seen by reads that come after them (`version` 0)."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._read: dict[str, Entry | None] = {}
        self._written: dict[str, Write] = {}

    async def get(self, key: str) -> Entry | None:
        match self._written.get(key):
            case Put(value=value):
                return Entry(key, value, 0)
            case Delete():
                return None
        if key not in self._read:
            self._read[key] = await self._store.get(key)
        return self._read[key]

    def put(self, key: str, value: bytes) -> None:
        self._written[key] = Put(key, value)

    def delete(self, key: str) -> None:
        self._written[key] = Delete(key)

    def __len__(self) -> int:
        """Keys that are written."""
        return len(self._written)

    async def commit(self) -> int:
        """Returns the new revision. Raises `Overtaken`."""
        expect = [Expect(key, entry.version if entry else 0) for key, entry in self._read.items()]
        try:
            return await self._store.commit([*self._written.values()], expect)
        except Conflict as conflict:
            raise Overtaken from conflict
