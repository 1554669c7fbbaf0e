"""The `Store` interface: the little that must be strongly consistent.

Keys are `/`-separated text (`apps/default/hello`), values bytes. Every commit has a revision, one
higher than the last; a key's `version` is the revision that wrote it last (0: no such key).
Implementations: `memory`, `sqlite` (and etcd); all pass `tabane.testing.check_store`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from tabane.model import Value


class Entry(Value, frozen=True):
    key: str
    value: bytes
    version: int
    lease: str = ""


class Change(Value, frozen=True):
    """One key written (`value`) or deleted (`None`) by the commit `revision`."""

    key: str
    value: bytes | None
    revision: int


class Put(Value, frozen=True, tag="put"):
    key: str
    value: bytes
    lease: str = ""


class Delete(Value, frozen=True, tag="delete"):
    key: str


Write = Put | Delete


class Expect(Value, frozen=True):
    """A condition of a transaction: the key's version is exactly this (0: absent)."""

    key: str
    version: int


class Watch(Protocol):
    """Changes from the moment `watch` returned, each commit's together and in order."""

    def __aiter__(self) -> AsyncIterator[tuple[Change, ...]]: ...


class Store(Protocol):
    async def get(self, key: str) -> Entry | None: ...

    async def range(self, prefix: str) -> tuple[int, list[Entry]]:
        """The revision read at, and every entry whose key starts with `prefix`, by key."""

    async def commit(self, writes: Sequence[Write], expect: Sequence[Expect] = ()) -> int:
        """Apply all writes or none; return the new revision once it is durable.

        Raises `Conflict` naming the first key whose version differs. A put with an unknown lease
        raises `NotFound`. A commit that changes nothing makes no revision and returns the last.
        A caller that is cancelled does not know whether its commit was made.
        """

    def watch(self, prefix: str, *, after: int | None = None) -> AbstractAsyncContextManager[Watch]:
        """Watch keys that start with `prefix`; `after` replays what came after that revision first.

        Raises `Stale` when `after` is older than the history kept, or was never reached: read
        `range` again. A watcher that falls behind the history gets `Stale` too, one whose store
        is closed `Closed`.
        """

    async def grant_lease(self, ttl_s: float) -> str:
        """A lease id. Keys put with it vanish when it ends.

        Terms are the store's own monotonic time. When the store itself was away (restarted,
        stopped), every lease gets a full term."""

    async def renew_lease(self, lease: str) -> None:
        """Start its term again. Raises `NotFound` when it has ended."""

    async def revoke_lease(self, lease: str) -> None: ...

    async def aclose(self) -> None: ...
