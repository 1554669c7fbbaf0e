"""How the store reaches every node: the control agent sends each follower all changes, in order.

A follower says which revision it has. It gets what came after, or, when that is no longer kept, a
snapshot in pages. Each message is acknowledged before the next is sent, so a slow node slows only
itself, and one that goes away simply asks again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

from tabane.errors import PeerError, Unavailable, UsageError
from tabane.node.messages import StoreChanges, StorePage, encode
from tabane.store.api import Entry
from tabane.store.feed import Changes, Feed, Snapshot, Update
from tabane.store.replica import Replica
from tabane.supervise import Supervisor

log = logging.getLogger(__name__)

PAGE_BYTES = 256 << 10
ENTRY_BYTES = 128
"""No less than what an entry takes beside its key and value."""

Send = Callable[[str, bytes], Awaitable[object]]


class Publisher:
    """On the control node: one task for each follower."""

    def __init__(self, feed: Feed, send: Send, tasks: Supervisor) -> None:
        self._feed = feed
        self._send = send
        self._tasks = tasks
        self._followers: dict[str, asyncio.Task[None]] = {}

    def follow(self, member: str, after: int) -> None:
        """Send `member` what came after that revision, and go on until it cannot be reached."""
        if (previous := self._followers.get(member)) is not None:
            previous.cancel()
        self._followers[member] = self._tasks.start(f"feed {member}", self._serve(member, after))

    async def _serve(self, member: str, after: int) -> None:
        try:
            async with aclosing(self._feed.follow("", after)) as updates:
                async for update in updates:
                    for message in to_messages(update):
                        await self._send(member, encode(message))
        except (PeerError, Unavailable, UsageError) as error:
            log.info("follower %s is gone until it asks again: %s", member, error)


def to_messages(update: Update) -> list[StorePage] | list[StoreChanges]:
    """An update as messages that fit into a frame."""
    if isinstance(update, Changes):
        return [StoreChanges(update.changes)]
    pages = split(update.entries)
    last = len(pages) - 1
    return [
        StorePage(update.revision, tuple(page), first=number == 0, last=number == last)
        for number, page in enumerate(pages)
    ]


class Follower:
    """On every other node: puts what arrives into the replica."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._pages: list[Entry] = []

    async def on_page(self, page: StorePage) -> None:
        if page.first:
            self._pages = []
        self._pages += page.entries
        if page.last:
            entries, self._pages = tuple(self._pages), []
            await self._replica.update(Snapshot(page.revision, entries))

    async def on_changes(self, changes: StoreChanges) -> None:
        await self._replica.update(Changes(changes.changes))


def split(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Pages of at most `PAGE_BYTES`; at least one, which may be empty."""
    pages: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        entry_bytes = len(entry.key.encode()) + len(entry.value) + ENTRY_BYTES
        if pages[-1] and size + entry_bytes > PAGE_BYTES:
            pages.append([])
            size = 0
        pages[-1].append(entry)
        size += entry_bytes
    return pages
