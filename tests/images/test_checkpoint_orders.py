"""The store of checkpoints in any order of what may happen to it: it never has more than it counts,
never loses what is open, and gives back what was put in."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import tempfile
from collections.abc import Coroutine
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tabane.errors import Conflict, Corrupt
from tabane.images.checkpoint import Lease, trees
from tabane.images.checkpoint.manifest import WINDOW_BYTES
from tabane.images.checkpoint.seal import KEY_BYTES
from tabane.images.room import NoRoom
from tabane.testing.clock import VirtualClock
from tabane.testing.dumps import about, cool, files_on_disk, make_store, pages, read_tree

QUOTA = 6 * WINDOW_BYTES
MEMORY = 5 * WINDOW_BYTES
SEEDS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=3)
"""Of the windows of a dump: they share many."""
PICK = st.integers(0, 99)


class Open(NamedTuple):
    digest: str
    lease: Lease


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="tabane-test-", dir="/dev/shm"))
        self.loop = asyncio.Runner()
        self.clock = VirtualClock()
        (self.place / "key").write_bytes(bytes(KEY_BYTES))
        (self.place / "key").chmod(0o600)
        self.wanted: dict[str, dict[str, bytes]] = {}
        """What each checkpoint that was ever made has in it."""
        self.open: list[Open] = []
        self.damaged: set[str] = set()
        """Chunk files that somebody has changed."""
        self.begin()

    def teardown(self) -> None:
        self.loop.close()
        shutil.rmtree(self.place)

    def begin(self) -> None:
        self.store = make_store(
            self.place,
            quota_bytes=QUOTA,
            memory_bytes=MEMORY,
            wants=lambda about: about.revision > 1,
            clock=self.clock,
        )
        self.do(self.store.load())

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        self.clock.advance(100)
        return self.loop.run(work)

    def pick(self, number: int) -> str:
        stored = self.store.all()
        return stored[number % len(stored)].digest

    def has_some(self) -> bool:
        return bool(self.store.all())

    @rule(seeds=SEEDS, revision=st.integers(1, 3))
    def make(self, seeds: list[str], revision: int) -> None:
        self.do(self._make(seeds, revision))

    async def _make(self, seeds: list[str], revision: int) -> None:
        async with self.store.dump(os.getgid()) as dump:
            (dump.directory / "core.img").write_bytes(seeds[0].encode())
            (dump.directory / "pages.img").write_bytes(b"".join(map(pages, seeds)))
            files = read_tree(dump.directory)
            try:
                stored = await dump.keep(about(revision=revision))
            except NoRoom:
                kept = {one.digest for one in self.store.all()}
                assert kept <= {one.digest for one in self.open}, "whatever is not open had to go"
            else:
                self.wanted[stored.digest] = files

    @rule(seeds=SEEDS, number=st.integers(1, 4))
    def fail_to_make(self, seeds: list[str], number: int) -> None:
        """The disk gives an error at that seal, if there are so many."""
        self.do(self._fail_to_make(seeds, number))

    async def _fail_to_make(self, seeds: list[str], number: int) -> None:
        vault, sealed = self.store.vault, count(1)
        seal = vault.seal

        def fail(label: bytes, data: bytes | bytearray) -> bytes:
            if next(sealed) == number:
                raise OSError(errno.EIO, "the disk is broken")
            return seal(label, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vault, "seal", fail)
            try:
                await self._make(seeds, 2)
            except OSError as error:
                assert error.errno == errno.EIO

    @precondition(has_some)
    @rule(number=PICK)
    def begin_to_use(self, number: int) -> None:
        digest = self.pick(number)
        try:
            lease = self.do(self.store.open(digest))
        except NoRoom:
            assert self.open, "else there would be room"
        except Corrupt:
            assert self.damaged, "nobody has been at it"
            assert digest not in {one.digest for one in self.store.all()}
        else:
            self.open.append(Open(digest, lease))

    @precondition(lambda self: bool(self.open))
    @rule(number=PICK)
    def end_to_use(self, number: int) -> None:
        self.open.pop(number % len(self.open)).lease.close()

    @precondition(has_some)
    @rule(number=PICK)
    def remove(self, number: int) -> None:
        digest = self.pick(number)
        is_open = digest in {one.digest for one in self.open}
        try:
            self.do(self.store.remove(digest))
        except Conflict:
            assert is_open
        else:
            assert not is_open

    @rule()
    def collect(self) -> None:
        for digest in self.store.unwanted():
            self.do(self.store.remove(digest))
        kept = {one.digest for one in self.open}
        assert all(one.digest in kept for one in self.store.all() if one.about.revision == 1)

    @precondition(has_some)
    @rule(number=PICK)
    def forget_the_plain_files(self, number: int) -> None:
        digest = self.pick(number)
        if not self.store.is_used(digest):
            self.do(cool(self.store, digest))

    @rule()
    def crash(self) -> None:
        """All that was in memory is gone, and something half-made is left."""
        half = self.place / "disk/incoming/half"
        half.mkdir()
        (half / "chunk").write_bytes(b"half")
        (self.place / "disk/chunks" / ("0" * 64)).write_bytes(b"nobody names it")
        before = {one.digest for one in self.store.all()}
        self.open = []
        self.begin()
        after = {one.digest for one in self.store.all()}
        assert not half.exists()
        assert after <= before and (after == before or self.damaged), "a chunk may be missing now"

    @precondition(has_some)
    @rule(number=PICK)
    def damage(self, number: int) -> None:
        chunks = sorted((self.place / "disk/chunks").iterdir())
        path = chunks[number % len(chunks)]
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        self.damaged.add(path.name)

    @invariant()
    def it_counts_what_it_has_and_keeps_its_bounds(self) -> None:
        files = files_on_disk(self.place)
        assert self.store.room.used_bytes == sum(files.values()) <= QUOTA
        assert self.store.memory.used_bytes <= MEMORY
        assert [*(self.place / "disk/incoming").iterdir()] == []
        opened = sum(self.store.memory.is_warm(digest) for digest in self.wanted)
        assert len([*(self.place / "memory").iterdir()]) == opened

    @invariant()
    def what_is_open_stays_as_it_was(self) -> None:
        for digest, lease in self.open:
            assert read_tree(lease.directory) == self.wanted[digest]

    @invariant()
    def what_is_here_was_put_in(self) -> None:
        assert {one.digest for one in self.store.all()} <= self.wanted.keys()


def test_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one thread and one key, so that the same orders end alike."""
    monkeypatch.setattr(trees, "WORKERS", 1)
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=25,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
