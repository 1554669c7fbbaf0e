"""The `Store` interface: the little that must be strongly consistent.

Keys are `/`-separated text (`apps/default/hello`), values bytes. Every commit has a revision, one
higher than the last; a key's `version` is the revision that wrote it last (0: no such key).
Implementations: `memory`, `sqlite` (and etcd); all pass `tabane.testing.check_store`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
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
        """The revision read at, and every entry below `prefix`, by key."""

    async def commit(self, writes: list[Write], expect: list[Expect] = ()) -> int:  # type: ignore[assignment]
        """Apply all writes or none; return the new revision once it is durable.

        Raises `Conflict` naming the first key whose version differs. A put with an unknown lease
        raises `NotFound`.
        """

    def watch(self, prefix: str, *, after: int | None = None) -> AbstractAsyncContextManager[Watch]:
        """Watch keys below `prefix`; `after` replays what came after that revision first.

        Raises `Stale` when `after` is older than the history kept: read `range` again.
        """

    async def grant_lease(self, ttl_s: float) -> str:
        """A lease id. Keys put with it vanish when it ends."""

    async def renew_lease(self, lease: str) -> None:
        """Start its term again. Raises `NotFound` when it has ended."""

    async def revoke_lease(self, lease: str) -> None: ...

    async def aclose(self) -> None: ...
