"""A node's checkpoints: sealed on disk within a quota, opened in memory within a budget.

    async with store.dump(group, expected_bytes) as dump:  # an empty directory in memory
        await driver.checkpoint(handle, dump.directory, leave_running=True)
        stored = await dump.keep(about)  # on disk now, and still open
    async with await store.open(stored.digest) as directory:  # plain files, for many at once
        await driver.restore(spec, handle, directory)

What is plain is in memory only, from the dump on. One process has the store open. All decisions are
made on the event loop, so that nothing is removed that somebody just began to use; whatever takes
time runs in threads, and is waited for even when its caller is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import TypeVar

import msgspec

from tabane.clock import SYSTEM, Clock
from tabane.errors import Conflict, Corrupt, NotFound, TabaneError, Unavailable
from tabane.images.checkpoint import trees
from tabane.images.checkpoint.manifest import (
    About,
    Manifest,
    Stored,
    Stream,
    lay_out,
    make_manifest,
)
from tabane.images.checkpoint.memory import Memory
from tabane.images.checkpoint.seal import Damaged, Sealer, load_key
from tabane.images.checkpoint.vault import Vault, restore_files
from tabane.images.checkpoint.writing import Writing
from tabane.images.room import FULL, NoRoom, Room
from tabane.model import AppName, InstanceId
from tabane.units import show_size

log = logging.getLogger(__name__)

T = TypeVar("T")

SHARE = 0.2
"""Of the disk, unless a quota is set: beside images, which may take half."""
MEMORY_SHARE = 0.1
"""Of the machine's memory, unless a budget is set."""
USED_S = 60.0
"""That a checkpoint is used is written down so often at the most."""
WRITERS, OPENERS = 1, 2
"""At once, each with a few threads: writing is in no hurry, and an opening has work for all."""


class Lease:
    """A checkpoint that stays open until this is closed; a context of its directory. Who has a file
    of it mapped (as a machine its memory) closes it when that has ended."""

    def __init__(self, directory: Path, leave: Callable[[], None]) -> None:
        self.directory = directory
        self._leave: Callable[[], None] | None = leave

    def close(self) -> None:
        """Idempotent."""
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()

    async def __aenter__(self) -> Path:
        return self.directory

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Dump:
    """A place in memory for what an engine dumps."""

    def __init__(
        self, store: CheckpointStore, directory: Path, group: int, promised_bytes: int
    ) -> None:
        self.directory = directory
        self.group = group
        self.promised_bytes = promised_bytes
        """Of the memory's budget."""
        self.is_kept = False
        self._store = store

    async def keep(self, about: About) -> Stored:
        """Make a checkpoint of it. Raises `NoRoom`, `UsageError` when there is something else than
        files, `OSError`."""
        return await self._store.keep(self, about)


class CheckpointStore:
    """See the module's text. `directory`: on disk; `memory`: in memory, root's; `key`: the file of
    the node's key; `quota_bytes`, `memory_bytes`: 0 means a share of the disk, of the memory;
    `wants`: whether an app as it is deployed would use such a checkpoint."""

    def __init__(
        self,
        directory: Path,
        memory: Path,
        key: Path,
        *,
        quota_bytes: int = 0,
        memory_bytes: int = 0,
        wants: Callable[[About], bool] = lambda about: True,
        clock: Clock = SYSTEM,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.room = Room(directory, quota_bytes, share=SHARE, kind="checkpoint")
        self.memory = Memory(memory, memory_bytes or default_memory())
        self._directory = directory
        self._key = key
        self._wants = wants
        self.clock = clock
        self._vault: Vault | None = None
        self._problem = "they are not loaded yet"
        self._stored: dict[str, Stored] = {}
        self._noted: dict[str, float] = {}
        self._turns: dict[str, asyncio.Lock] = {}
        self._waiting: Counter[str] = Counter()
        """Who waits for its turn, or has it, at opening a checkpoint."""
        self._writers = asyncio.Semaphore(WRITERS)
        self._openers = asyncio.Semaphore(OPENERS)

    async def load(self) -> None:
        """Find what is here, without what is half-made or damaged. Raises `Corrupt` or `Denied` for
        a key that is not the right one, and `OSError`: then there is a `problem`."""
        try:
            self._vault, found = await asyncio.to_thread(self._load)
        except (TabaneError, OSError) as error:
            self.give_up(str(error))
            raise
        self._stored = {stored.digest: stored for stored in found}

    def give_up(self, problem: str) -> None:
        """There are no checkpoints here, and why."""
        self._vault, self._problem, self._stored = None, problem, {}

    def _load(self) -> tuple[Vault, list[Stored]]:
        self.memory.clear()
        vault = Vault(self._directory, Sealer(load_key(self._key)), self.room)
        return vault, vault.load()

    @property
    def problem(self) -> str:
        """Why there are no checkpoints on this node; empty when there can be."""
        return "" if self._vault is not None else self._problem

    @property
    def vault(self) -> Vault:
        """Raises `Unavailable`."""
        if self._vault is None:
            raise Unavailable(f"there are no checkpoints here: {self._problem}")
        return self._vault

    # What is here

    def all(self) -> list[Stored]:
        """The one used least recently first."""
        return sorted(self._stored.values(), key=lambda stored: stored.used_at)

    def quarantined(self) -> int:
        """How many files there are that were found damaged, lately."""
        return self._vault.quarantined() if self._vault is not None else 0

    def describe(self, digest: str) -> Stored:
        """Raises `NotFound`."""
        if digest not in self._stored:
            raise NotFound(f"checkpoint {digest[:19]} is not here")
        return self._stored[digest]

    def find(self, app: AppName, revision: int) -> list[Stored]:
        """Those of a revision from which others begin, the latest first."""
        found = [
            s
            for s in self._stored.values()
            if (s.about.app, s.about.revision) == (app, revision) and s.about.kept is None
        ]
        return sorted(found, key=lambda stored: stored.made_at, reverse=True)

    def kept(self, instance: InstanceId) -> Stored | None:
        """As which this instance was put away, if it was."""
        kept = (s for s in self._stored.values() if s.about.kept and s.about.instance == instance)
        return next(kept, None)

    async def manifest(self, digest: str) -> Manifest:
        """Raises `NotFound`, `Corrupt`."""
        return await asyncio.to_thread(self.vault.manifest, digest)

    # Coming

    @asynccontextmanager
    async def dump(self, group: int, expected_bytes: int = 0) -> AsyncIterator[Dump]:
        """A place in memory for a dump of about that size; what is not kept when the block ends is
        gone. `group`: who may read it, the app's root. Raises `NoRoom`."""
        self.vault  # noqa: B018
        dump = Dump(self, self._make_place(), group, 0)
        try:
            gone = self.memory.promise(expected_bytes)
            dump.promised_bytes = expected_bytes
            await self.remove_files(gone)
            await asyncio.to_thread(trees.give_to, dump.directory, group)
            yield dump
        finally:
            self.memory.give_back(dump.promised_bytes)
            if not dump.is_kept:
                await self.remove_files([dump.directory])

    async def keep(self, dump: Dump, about: About) -> Stored:
        """As `Dump.keep`."""
        sizes, directories = await asyncio.to_thread(trees.survey, dump.directory)
        size = await asyncio.to_thread(trees.give_to, dump.directory, dump.group)
        fits = await self._promise_instead(dump, size)
        async with self._writers:
            stored = await self._write(about, directories, lay_out(sizes), dump.directory)
        if fits:
            self.memory.give_back(dump.promised_bytes)
            dump.promised_bytes = 0
            self.memory.add(stored.digest, dump.directory, size)
            dump.is_kept = True
        return stored

    async def _promise_instead(self, dump: Dump, size: int) -> bool:
        """What it really takes, in place of what was expected. False: it cannot stay open, and is
        opened anew when it is wanted."""
        self.memory.give_back(dump.promised_bytes)
        dump.promised_bytes = 0
        try:
            gone = self.memory.promise(size)
        except NoRoom:
            return False
        dump.promised_bytes = size
        await self.remove_files(gone)
        return True

    async def _write(
        self, about: About, directories: tuple[str, ...], stream: Stream, source: Path
    ) -> Stored:
        published: list[Stored] = []
        now = self.clock.wall()

        def publish(writing: Writing, chunks: list[str]) -> None:
            manifest = make_manifest(about, now, directories, stream, chunks)
            published.append(writing.publish(manifest, now))

        with self.room.claim() as claim:
            writing = Writing(self.vault, claim)
            try:
                measure = lambda: run(lambda stop: writing.measure(source, stream, stop))  # noqa: E731
                write = lambda: run(lambda stop: writing.write(source, stream, stop))  # noqa: E731
                chunks = await self._with_room(write, measure)
                await self._with_room(lambda: run(lambda stop: publish(writing, chunks)))
            finally:
                try:
                    await run(lambda stop: writing.drop())
                finally:  # with no wait until its files count as open: nobody opens it twice
                    self._stored |= {stored.digest: stored for stored in published}
        return published[0]

    async def _with_room(
        self, work: Callable[[], Awaitable[T]], measure: Callable[[], Awaitable[int]] | None = None
    ) -> T:
        """Do it, and again each time that a checkpoint was removed for it; none is for what is
        larger than the quota, by `measure`."""
        while True:
            try:
                return await work()
            except NoRoom as error:
                if measure is not None and not error.is_hopeless:
                    self.room.check(await measure())
                    measure = None
                if error.is_hopeless or not await self._remove_one():
                    raise

    # Use

    async def open(self, digest: str) -> Lease:
        """Have its files in memory; at once when they are. Raises `NotFound`, `NoRoom` (of the
        memory), and `Corrupt` for what is damaged, which is not here any more then."""
        self.vault  # noqa: B018
        self.describe(digest)
        directory = self.memory.use(digest)
        if directory is None:
            async with self._turn(digest):
                directory = self.memory.use(digest)
                if directory is None:
                    await self._bring(self.describe(digest))
                    directory = self.memory.use(digest)
        assert directory is not None
        self._note_use(digest)
        return Lease(directory, lambda: self.memory.leave(digest))

    @asynccontextmanager
    async def _turn(self, digest: str) -> AsyncIterator[None]:
        """One at a time for each checkpoint."""
        lock = self._turns.setdefault(digest, asyncio.Lock())
        self._waiting[digest] += 1
        try:
            async with lock:
                yield
        finally:
            self._waiting[digest] -= 1
            if not self._waiting[digest]:
                del self._waiting[digest], self._turns[digest]

    async def _bring(self, stored: Stored) -> None:
        async with self._promised(stored.memory_bytes):
            directory = self._make_place()
            try:
                async with self._openers:
                    size = await run(lambda stop: self._restore_files(stored, directory, stop))
            except BaseException as error:
                await self.remove_files([directory])
                if isinstance(error, Corrupt):
                    raise await self._discard(stored, error) from error
                if isinstance(error, OSError) and error.errno in FULL:
                    raise self._no_memory() from error
                raise
        self.memory.add(stored.digest, directory, size)

    def _restore_files(self, stored: Stored, directory: Path, stop: Event) -> int:
        manifest = self.vault.manifest(stored.digest)
        restore_files(self.vault, manifest, directory, stop)
        return trees.give_to(directory, manifest.about.id_base)

    def _no_memory(self) -> NoRoom:
        limit = show_size(self.memory.limit_bytes)
        return NoRoom(
            f"{self.memory.directory} has no room left, though opened checkpoints may take {limit} "
            "there: set a smaller checkpoint memory, or free some of the machine's"
        )

    async def _discard(self, stored: Stored, error: Corrupt) -> Corrupt:
        """It is never used again. Returns what is to be said of it."""
        chunk = error.chunk if isinstance(error, Damaged) else ""
        self._stored.pop(stored.digest, None)
        await run(lambda stop: self.vault.discard(stored.digest, chunk))
        what = f"checkpoint {stored.digest[:19]} of {stored.about.app}"
        problem = f"{what} is damaged ({error.message}) and was discarded: the app starts without"
        log.error("%s", problem)
        return Corrupt(problem)

    def _note_use(self, digest: str) -> None:
        now = self.clock.wall()
        self._stored[digest] = msgspec.structs.replace(self._stored[digest], used_at=now)
        if now - self._noted.get(digest, 0.0) > USED_S:
            self._noted[digest] = now
            with suppress(OSError):  # it is only for the order after the next start
                os.utime(self.vault.manifest_path(digest), (now, now))

    # Going

    async def remove(self, digest: str) -> int:
        """Returns what was freed, in bytes; 0 for what is not here. Raises `Conflict` for one that
        is open."""
        vault, before = self.vault, self.room.stored_bytes
        if self.is_used(digest):
            users = self.memory.users(digest) or "somebody"
            raise Conflict(f"checkpoint {digest[:19]} is open, for {users}: try again in a moment")
        self._stored.pop(digest, None)
        self._noted.pop(digest, None)
        directory = self.memory.take_out(digest)
        await run(lambda stop: vault.remove(digest))
        await self.remove_files([directory] if directory is not None else [])
        return max(0, before - self.room.stored_bytes)

    async def use_up(self, digest: str) -> None:
        """Nothing ever goes on from it again, whatever happens from here on: it is gone from the
        disk when this returns, but for what takes room (`remove`). Of what is not here: nothing.
        Raises `OSError`: then it may still be here."""
        vault = self.vault
        if digest in self._stored:
            await run(lambda stop: vault.forget(digest))
            self._stored.pop(digest, None)

    def is_used(self, digest: str) -> bool:
        """Whether it is open, or being opened."""
        return digest in self._waiting or self.memory.users(digest) > 0

    def unwanted(self) -> list[str]:
        """What no app as it is deployed would use, the longest unused first."""
        return [one for one in choose_unwanted(self.all(), self._wants) if not self.is_used(one)]

    async def _remove_one(self) -> bool:
        """The one that is missed least, if there is any that may go. Another can be made of each,
        but for instances that are put away."""
        others = (stored.digest for stored in self.all() if stored.about.kept is None)
        candidates = [*self.unwanted(), *others]
        for digest in candidates:
            if not self.is_used(digest):
                log.info("checkpoint %s is removed, as there is no room for another", digest[:19])
                await self.remove(digest)
                return True
        return False

    # Memory

    def _make_place(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.memory.directory))

    @asynccontextmanager
    async def _promised(self, size: int) -> AsyncIterator[None]:
        gone = self.memory.promise(size)
        with self._giving_back(size):
            await self.remove_files(gone)
            yield

    @contextmanager
    def _giving_back(self, size: int) -> Iterator[None]:
        try:
            yield
        finally:
            self.memory.give_back(size)

    async def remove_files(self, directories: Iterable[Path]) -> None:
        for directory in directories:
            await run(lambda stop, path=directory: shutil.rmtree(path))  # type: ignore[misc]


def choose_unwanted(stored: Iterable[Stored], wants: Callable[[About], bool]) -> list[str]:
    """In that order: those of no use, or of which there is a later one of the same kind."""
    stored = list(stored)
    latest: dict[tuple[object, ...], Stored] = {}
    for one in sorted(stored, key=lambda each: each.made_at):
        latest[_kind(one.about)] = one
    return [
        one.digest for one in stored if latest[_kind(one.about)] is not one or not wants(one.about)
    ]


def _kind(about: About) -> tuple[object, ...]:
    itself = about.instance if about.kept is not None else ""
    return about.app, about.revision, about.driver, about.isolation, itself


async def run(work: Callable[[Event], T]) -> T:
    """Do it in a thread. When the caller is cancelled the thread is told to `stop`, and waited for:
    it may have files open that are to be removed next."""
    stop = Event()
    future = asyncio.get_running_loop().run_in_executor(None, work, stop)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        stop.set()
        while not future.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        future.exception()
        raise


def default_memory() -> int:
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * MEMORY_SHARE)
