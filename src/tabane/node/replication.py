"""How the store reaches every node: the control agent sends each follower all changes, in order.

A follower says which revision it has. It gets what came after, or, when that is no longer kept, a
snapshot in pages. Each message is acknowledged before the next is sent, so a slow node slows only
itself. One that is there and cannot take a message is sent it again, after growing pauses; one that
goes away asks again when it is back. All tell each other their revisions (`node.lag`), so a
follower also notices that it hears nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

from tabane.clock import Clock, sleep_until
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
FIRST_RETRY_S = 0.2
LAST_RETRY_S = 5.0

Send = Callable[[str, bytes], Awaitable[object]]


class Publisher:
    """On the control node: one task for each follower. `is_there`: whether a member can be seen."""

    def __init__(
        self,
        feed: Feed,
        send: Send,
        tasks: Supervisor,
        clock: Clock,
        is_there: Callable[[str], bool],
    ) -> None:
        self._feed = feed
        self._send = send
        self._tasks = tasks
        self._clock = clock
        self._is_there = is_there
        self._followers: dict[str, asyncio.Task[None]] = {}

    def follow(self, member: str, after: int) -> None:
        """Send `member` what came after that revision, and go on until it is not there."""
        if (previous := self._followers.get(member)) is not None:
            previous.cancel()
        self._followers[member] = self._tasks.start(f"feed {member}", self._serve(member, after))

    async def _serve(self, member: str, after: int) -> None:
        pause_s = FIRST_RETRY_S
        while True:
            try:
                async with aclosing(self._feed.follow("", after)) as updates:
                    async for update in updates:
                        for message in to_messages(update):
                            await self._send(member, encode(message))
                        after, pause_s = update.revision, FIRST_RETRY_S
            except (PeerError, Unavailable, UsageError) as error:
                if not self._is_there(member):
                    log.info("follower %s is gone until it asks again: %s", member, error)
                    return
                log.warning("follower %s stays at revision %d for now: %s", member, after, error)
            await sleep_until(self._clock, self._clock.now() + pause_s)
            pause_s = min(2 * pause_s, LAST_RETRY_S)


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
        self.heard = 0
        """Messages so far: while they come, the publisher is at it."""
        self._replica = replica
        self._pages: list[Entry] = []

    async def on_page(self, page: StorePage) -> None:
        self.heard += 1
        if page.first:
            self._pages = []
        self._pages += page.entries
        if page.last:
            entries, self._pages = tuple(self._pages), []
            await self._replica.update(Snapshot(page.revision, entries))

    async def on_changes(self, changes: StoreChanges) -> None:
        self.heard += 1
        await self._replica.update(Changes(changes.changes))

    async def aclose(self) -> None:
        """Idempotent."""
        await self._replica.aclose()


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
