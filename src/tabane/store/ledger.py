"""What a store holds, and how a batch of requests changes it. No IO, no clock, no tasks.

A `Draft` is a `Ledger` plus changes that are not durable yet. Requests run against the draft one
after the other, so each sees what those before it did; when the whole draft is on disk it is
applied to the ledger, which therefore never shows what a crash could take back.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tabane.errors import Conflict, NotFound, UsageError
from tabane.store.api import Change, Entry, Expect, Put, Write

T = TypeVar("T")


@dataclass
class Ledger:
    """The durable state: entries by key, and the term of each lease."""

    revision: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)
    leases: dict[str, float] = field(default_factory=dict)

    def range(self, prefix: str) -> list[Entry]:
        """Entries whose key starts with `prefix`, by key."""
        found = (entry for key, entry in self.entries.items() if key.startswith(prefix))
        return sorted(found, key=lambda entry: entry.key)


@dataclass(frozen=True, slots=True)
class Commit:
    """What one commit changed."""

    revision: int
    changes: tuple[Change, ...]


class Draft:
    """A batch on its way: `entries` and `leases` hold what differs from the ledger (None: gone)."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.revision = ledger.revision
        self.entries: dict[str, Entry | None] = {}
        self.leases: dict[str, float | None] = {}
        self.commits: list[Commit] = []

    def __bool__(self) -> bool:
        return bool(self.commits or self.leases)

    def get(self, key: str) -> Entry | None:
        return self.entries[key] if key in self.entries else self._ledger.entries.get(key)

    def has_lease(self, lease: str) -> bool:
        if lease in self.leases:
            return self.leases[lease] is not None
        return lease in self._ledger.leases

    def ends_lease(self, lease: str) -> bool:
        return self.leases.get(lease, 0.0) is None

    def commit(self, writes: Sequence[Write], expect: Sequence[Expect]) -> int:
        self._check(writes, expect)
        changing = [write for write in writes if isinstance(write, Put) or self.get(write.key)]
        if changing:
            self._apply(changing)
        return self.revision

    def grant(self, ttl_s: float) -> str:
        lease = uuid.uuid4().hex
        self.leases[lease] = ttl_s
        return lease

    def end(self, lease: str) -> None:
        """End a lease and delete its keys. Without effect on one that has ended."""
        if not self.has_lease(lease):
            return
        self.leases[lease] = None
        keys = sorted({*self._ledger.entries, *self.entries})
        held = [entry for entry in map(self.get, keys) if entry and entry.lease == lease]
        if held:
            self._record((entry.key, None) for entry in held)

    def apply(self) -> None:
        """Make the draft the ledger's state."""
        _merge(self._ledger.entries, self.entries)
        _merge(self._ledger.leases, self.leases)
        self._ledger.revision = self.revision

    def _check(self, writes: Sequence[Write], expect: Sequence[Expect]) -> None:
        for condition in expect:
            entry = self.get(condition.key)
            if (entry.version if entry else 0) != condition.version:
                found = f"version {entry.version}" if entry else "absent"
                wanted = f"version {condition.version}" if condition.version else "absent"
                raise Conflict(
                    f"{condition.key} is {found} where {wanted} was expected: read it again"
                )
        for write in writes:
            if isinstance(write, Put) and write.lease and not self.has_lease(write.lease):
                raise NotFound(f"the lease {write.lease} of {write.key} has ended: grant a new one")

    def _apply(self, writes: Iterable[Write]) -> None:
        self._record(
            (write.key, Entry(write.key, write.value, self.revision + 1, write.lease))
            if isinstance(write, Put)
            else (write.key, None)
            for write in writes
        )

    def _record(self, changed: Iterable[tuple[str, Entry | None]]) -> None:
        written = list(changed)
        self.revision += 1
        self.entries.update(written)
        changes = (
            Change(key, entry.value if entry else None, self.revision) for key, entry in written
        )
        self.commits.append(Commit(self.revision, tuple(changes)))


def _merge(into: dict[str, T], changed: dict[str, T | None]) -> None:
    for key, value in changed.items():
        if value is None:
            into.pop(key, None)
        else:
            into[key] = value


def check_writes(writes: Sequence[Write]) -> None:
    """Refuse keys that no store could keep, and two writes of the same key."""
    seen: set[str] = set()
    for write in writes:
        if not write.key or not write.key.isprintable():
            raise UsageError(f"a key of the store is printable text, not {write.key!r}")
        if write.key in seen:
            raise UsageError(f"one commit writes {write.key} twice: leave one of them out")
        seen.add(write.key)
