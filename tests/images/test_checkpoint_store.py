"""The store of checkpoints: what comes out is what went in, sealed in between, within bounds."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import msgspec
import pytest

from tabane.errors import Conflict, UsageError
from tabane.images.checkpoint import CheckpointStore, Stored
from tabane.images.checkpoint.manifest import WINDOW_BYTES
from tabane.images.checkpoint.store import choose_unwanted
from tabane.images.room import NoRoom
from tabane.model import AppName
from tabane.testing.clock import VirtualClock
from tabane.testing.dumps import (
    MARK,
    about,
    cool,
    files_on_disk,
    keep,
    make_store,
    pages,
    read_tree,
    write_dump,
)

MIB = 1 << 20
CHUNK = WINDOW_BYTES + 4096
"""What a chunk that does not compress takes on disk."""


@pytest.fixture
async def store(tmp_path: Path) -> CheckpointStore:
    store = make_store(tmp_path)
    await store.load()
    return store


async def opened(store: CheckpointStore, digest: str) -> dict[str, bytes]:
    async with await store.open(digest) as directory:
        return read_tree(directory)


def dumped(tmp_path: Path, seed: str, windows: int = 3) -> dict[str, bytes]:
    """What a dump with that seed has."""
    directory = tmp_path / f"dump-{seed}"
    directory.mkdir()
    write_dump(directory, seed, windows)
    return read_tree(directory)


# In and out


async def test_what_was_dumped_comes_back(store: CheckpointStore, tmp_path: Path) -> None:
    stored = await keep(store, "one")
    wanted = dumped(tmp_path, "one")
    assert store.memory.is_warm(stored.digest)
    assert await opened(store, stored.digest) == wanted, "as it was dumped"
    await cool(store, stored.digest)
    assert await opened(store, stored.digest) == wanted, "as it was unsealed"
    again = make_store(tmp_path)
    await again.load()
    assert again.all() == [msgspec.structs.replace(stored, used_at=again.all()[0].used_at)]
    assert await opened(again, stored.digest) == wanted, "in another life"
    manifest = await again.manifest(stored.digest)
    assert manifest.about == about() and manifest.bytes == sum(map(len, wanted.values()))


async def test_an_empty_dump(store: CheckpointStore) -> None:
    async with store.dump(os.getgid()) as dump:
        stored = await dump.keep(about())
    await cool(store, stored.digest)
    assert await opened(store, stored.digest) == {}


async def test_holes_stay_holes(store: CheckpointStore) -> None:
    async with store.dump(os.getgid()) as dump:
        with (dump.directory / "memory").open("wb") as file:
            file.truncate(1 << 30)
            file.seek(100 * MIB + 8192)
            file.write(b"x" * 4096)
            file.seek(200 * MIB)
            file.write(bytes(MIB))
        stored = await dump.keep(about())
    assert (stored.bytes, stored.memory_bytes) == (1 << 30, WINDOW_BYTES)
    await cool(store, stored.digest)
    async with await store.open(stored.digest) as directory:
        found = (directory / "memory").stat()
        assert found.st_size == 1 << 30 and found.st_blocks * 512 <= 8192
        with (directory / "memory").open("rb") as file:
            file.seek(100 * MIB + 8192)
            assert file.read(4097) == b"x" * 4096 + b"\0"


async def test_nothing_is_plain_on_the_disk(store: CheckpointStore, tmp_path: Path) -> None:
    stored = await keep(store, "one")
    digests = {hash_ for hash_ in (await store.manifest(stored.digest)).chunks if hash_}
    for path in (tmp_path / "disk").rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        assert MARK not in data and b"default/hello" not in data and b"pages-1.img" not in data
        assert path.name not in digests, "names tell nothing to who has no key"
    assert stat.S_IMODE((tmp_path / "disk").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


async def test_only_the_apps_group_may_read_what_is_opened(store: CheckpointStore) -> None:
    stored = await keep(store, "one")
    for _ in range(2):
        async with await store.open(stored.digest) as directory:
            for path in (directory, *directory.rglob("*")):
                found = path.stat()
                wanted = 0o750 if path.is_dir() else 0o640
                assert (stat.S_IMODE(found.st_mode), found.st_gid) == (wanted, os.getgid())
            assert stat.S_IMODE(directory.parent.stat().st_mode) == 0o711, "no names to be seen"
        await cool(store, stored.digest)


async def test_a_dump_that_is_not_kept_is_gone(store: CheckpointStore, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the engine failed"):
        async with store.dump(os.getgid(), MIB) as dump:
            write_dump(dump.directory, "one")
            assert store.memory.used_bytes == MIB
            raise RuntimeError("the engine failed")
    assert [*(tmp_path / "memory").iterdir()] == [] and store.memory.used_bytes == 0


@pytest.mark.parametrize("kind", ["link", "pipe"])
async def test_what_is_no_file_is_refused(store: CheckpointStore, kind: str) -> None:
    async with store.dump(os.getgid()) as dump:
        path = dump.directory / "strange"
        path.symlink_to("/etc/passwd") if kind == "link" else os.mkfifo(path)
        with pytest.raises(UsageError, match="has files and directories: 'strange' is neither"):
            await dump.keep(about())
    assert store.all() == [] and store.room.used_bytes == 0


async def test_equal_memory_is_stored_once(store: CheckpointStore, tmp_path: Path) -> None:
    one = await keep(store, "one", about(revision=1))
    size = store.room.stored_bytes
    two = await keep(store, "one", about(revision=2))
    assert one.disk_bytes > 3 * CHUNK
    assert store.room.stored_bytes - size == 4096, "a manifest"
    await store.remove(one.digest)
    await cool(store, two.digest)
    assert await opened(store, two.digest) == dumped(tmp_path, "one")
    assert await store.remove(two.digest) == store.room.stored_bytes + size
    assert files_on_disk(tmp_path) == {} and store.room.used_bytes == 0


async def test_the_latest_of_a_revision_is_found_first(tmp_path: Path) -> None:
    clock = VirtualClock()
    store = make_store(tmp_path, clock=clock)
    await store.load()
    found = []
    for revision in (1, 2, 2):
        found.append(await keep(store, "one", about(revision=revision)))
        clock.advance(1)
    assert store.find(AppName("default/hello"), 2) == [found[2], found[1]]
    assert store.find(AppName("default/other"), 2) == []


# Many at once


class Gate:
    """Holds up the threads that come to a function, until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: object, name: str) -> None:
        self._reached = Event()
        self._go_on = Event()
        self._inner: Callable[..., Any] = getattr(owner, name)
        patch.setattr(owner, name, self._pass)

    def _pass(self, *arguments: Any) -> Any:
        self._reached.set()
        self._go_on.wait()
        return self._inner(*arguments)

    async def reached(self) -> None:
        await asyncio.to_thread(self._reached.wait)

    def open(self) -> None:
        self._go_on.set()


async def test_a_burst_of_clones_unseals_once(store: CheckpointStore, tmp_path: Path) -> None:
    stored = await keep(store, "one")
    await cool(store, stored.digest)
    leases = await asyncio.gather(*(store.open(stored.digest) for _ in range(50)))
    assert len({lease.directory for lease in leases}) == 1
    assert store.memory.users(stored.digest) == 50
    assert len([*(tmp_path / "memory").iterdir()]) == 1
    for lease in leases:
        lease.close()
        lease.close()
    assert store.memory.users(stored.digest) == 0 and store.memory.is_warm(stored.digest)


async def test_dumps_at_once_share_what_is_equal(store: CheckpointStore, tmp_path: Path) -> None:
    seeds = ("one", "two", "one", "one")
    kept = [keep(store, seed, about(revision=n)) for n, seed in enumerate(seeds)]
    stored = await asyncio.gather(*kept)
    assert store.room.used_bytes == store.vault.measure() < 7 * CHUNK + 10 * 4096
    for one, seed in zip(stored[:2], seeds, strict=False):
        await cool(store, one.digest)
        assert await opened(store, one.digest) == dumped(tmp_path, seed)


async def test_what_is_new_is_open_once_although_somebody_wants_it_at_once(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody finds it between its manifest on disk and its files in memory."""
    gate = Gate(monkeypatch, store.vault, "release")
    keeping = asyncio.ensure_future(keep(store, "one"))
    await gate.reached()
    found = store.all()
    opening = [asyncio.ensure_future(opened(store, one.digest)) for one in found]
    gate.open()
    stored = await keeping
    await asyncio.gather(*opening, opened(store, stored.digest))
    assert found == [] and store.memory.users(stored.digest) == 0
    assert len([*(tmp_path / "memory").iterdir()]) == 1


async def test_of_a_dump_that_nobody_waits_for_nothing_is_left(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await keep(store, "one")
    before = files_on_disk(tmp_path)
    gate = Gate(monkeypatch, store.vault, "seal")
    task = asyncio.ensure_future(keep(store, "two", windows=9))
    await gate.reached()
    task.cancel()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert files_on_disk(tmp_path) == before and [*(tmp_path / "disk/incoming").iterdir()] == []
    assert store.room.used_bytes == sum(before.values())
    assert len([*(tmp_path / "memory").iterdir()]) == 1


async def test_who_leaves_while_it_is_opened_leaves_others_theirs(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = await keep(store, "one")
    await cool(store, stored.digest)
    gate = Gate(monkeypatch, store.vault, "chunk")
    first, second = (asyncio.ensure_future(store.open(stored.digest)) for _ in range(2))
    await gate.reached()
    with pytest.raises(Conflict, match="is open, for somebody: try again in a moment"):
        await store.remove(stored.digest)
    first.cancel()
    gate.open()
    async with await second as directory:
        assert read_tree(directory) == dumped(tmp_path, "one")
    with pytest.raises(asyncio.CancelledError):
        await first
    assert store.memory.users(stored.digest) == 0 and len([*(tmp_path / "memory").iterdir()]) == 1


# Room on disk


async def small(
    tmp_path: Path, chunks: int, unwanted: frozenset[int] = frozenset()
) -> CheckpointStore:
    """Where so many chunks fit; revisions in `unwanted` are not wanted."""
    store = make_store(
        tmp_path,
        quota_bytes=chunks * CHUNK + 12 * 4096,
        wants=lambda about: about.revision not in unwanted,
        clock=VirtualClock(),
    )
    await store.load()
    return store


async def keep_at(store: CheckpointStore, revision: int, windows: int = 1) -> Stored:
    """A moment after the one before."""
    clock = store.clock
    assert isinstance(clock, VirtualClock)
    clock.advance(10)
    stored = await keep(store, f"{revision}", about(revision=revision), windows)
    await cool(store, stored.digest)
    return stored


def revisions(store: CheckpointStore) -> list[int]:
    return [stored.about.revision for stored in store.all()]


async def test_what_nobody_wants_goes_first_and_then_what_was_unused_for_longest(
    tmp_path: Path,
) -> None:
    store = await small(tmp_path, 4, frozenset({3}))
    stored = {revision: await keep_at(store, revision) for revision in (1, 2, 3, 4)}
    assert revisions(store) == [1, 2, 3, 4]
    clock = store.clock
    assert isinstance(clock, VirtualClock)
    clock.advance(10)
    async with await store.open(stored[1].digest):
        await keep_at(store, 5)
    assert revisions(store) == [2, 4, 1, 5], "3 is wanted by nobody"
    await keep_at(store, 6)
    assert revisions(store) == [4, 1, 5, 6], "2 was unused for longest, 1 was opened since"
    await keep_at(store, 7, windows=3)
    assert revisions(store) == [6, 7]
    assert store.room.used_bytes == store.vault.measure() <= store.room.limit_bytes


async def test_what_is_open_stays_whatever_is_wanted(tmp_path: Path) -> None:
    store = await small(tmp_path, 2, frozenset({1}))
    one = await keep_at(store, 1)
    async with await store.open(one.digest) as directory:
        with pytest.raises(NoRoom, match=r"checkpoints may take 568\.0 KiB here and .* of that"):
            await keep_at(store, 2, windows=2)
        assert revisions(store) == [1]
        assert (directory / "pages-1.img").read_bytes().startswith(pages("1 0"))
        with pytest.raises(Conflict, match="is open, for 1: try again in a moment"):
            await store.remove(one.digest)
    await keep_at(store, 2, windows=2)
    assert revisions(store) == [2]


async def test_what_would_never_fit(tmp_path: Path) -> None:
    store = await small(tmp_path, 2)
    await keep_at(store, 1)
    with pytest.raises(NoRoom, match=r"this alone takes more than the 568\.0 KiB") as caught:
        await keep_at(store, 2, windows=4)
    assert caught.value.is_hopeless
    assert revisions(store) == [1], "nothing goes for what cannot come"
    assert [*(tmp_path / "disk/incoming").iterdir()] == []
    assert store.room.used_bytes == store.vault.measure()


def test_what_is_unwanted() -> None:
    def made(at: float, revision: int = 1, driver: str = "runc") -> Stored:
        return Stored(f"{at}", about(revision=revision, driver=driver), at, 1, 1, 1, 10 - at)

    all_of = [made(1), made(2), made(3, 2), made(4, driver="runsc"), made(5, 9)]
    assert choose_unwanted(all_of, lambda about: about.revision < 9) == ["1", "5"]


async def test_removing_what_is_not_here(store: CheckpointStore) -> None:
    assert await store.remove("sha256:" + "0" * 64) == 0


# Room in memory


async def test_the_one_unused_for_longest_makes_room_in_memory(tmp_path: Path) -> None:
    store = make_store(tmp_path, memory_bytes=3 * MIB)
    await store.load()
    one, two = [await keep(store, seed, about(revision=n)) for n, seed in enumerate("ab")]
    assert store.memory.is_warm(one.digest) and store.memory.is_warm(two.digest)
    (await store.open(one.digest)).close()
    three = await keep(store, "c", about(revision=3), windows=6)
    assert [store.memory.is_warm(each.digest) for each in (one, two, three)] == [True, False, True]
    assert store.memory.used_bytes <= 3 * MIB and len([*(tmp_path / "memory").iterdir()]) == 2
    lease = await store.open(one.digest)
    with pytest.raises(NoRoom, match="that opened checkpoints may take are in use"):
        async with store.dump(os.getgid(), 3 * MIB):
            pass
    lease.close()
    async with store.dump(os.getgid(), 3 * MIB):
        assert store.memory.used_bytes == 3 * MIB and len([*(tmp_path / "memory").iterdir()]) == 1
    assert store.memory.used_bytes == 0


async def test_a_dump_takes_of_the_memory_what_it_really_takes(tmp_path: Path) -> None:
    """Not what was expected of it, and not both."""
    store = make_store(tmp_path, memory_bytes=MIB)
    await store.load()
    async with store.dump(os.getgid(), MIB) as dump:
        write_dump(dump.directory, "one")
        stored = await dump.keep(about())
        assert store.memory.is_warm(stored.digest)
    assert 3 * WINDOW_BYTES < store.memory.used_bytes < 4 * WINDOW_BYTES


async def test_of_a_dump_that_has_no_place_nothing_is_promised(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Path:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(store, "_make_place", fail)
    with pytest.raises(OSError, match="no room"):
        await keep(store, "one")
    with pytest.raises(OSError, match="no room"):
        async with store.dump(os.getgid(), MIB):
            pass
    assert store.memory.used_bytes == 0


async def test_what_is_larger_than_the_memory_is_kept_and_cannot_be_opened(tmp_path: Path) -> None:
    store = make_store(tmp_path, memory_bytes=MIB)
    await store.load()
    stored = await keep(store, "one", windows=6)
    assert not store.memory.is_warm(stored.digest) and [*(tmp_path / "memory").iterdir()] == []
    with pytest.raises(NoRoom, match=r"this takes 1\.8 MiB of memory, and all opened .* 1\.0 MiB"):
        await store.open(stored.digest)
    assert store.memory.used_bytes == 0


async def test_plain_files_of_an_earlier_life_are_gone(
    store: CheckpointStore, tmp_path: Path
) -> None:
    await keep(store, "one")
    assert [*(tmp_path / "memory").iterdir()] != []
    await make_store(tmp_path).load()
    assert [*(tmp_path / "memory").iterdir()] == []
