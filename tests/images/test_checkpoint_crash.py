"""The store of checkpoints, killed at any of its steps, or with a disk that is full at any."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tabane.errors import Corrupt
from tabane.images.checkpoint import CheckpointStore
from tabane.images.checkpoint.manifest import HOLE, WINDOW_BYTES
from tabane.images.checkpoint.seal import KEY_BYTES, Sealer
from tabane.images.room import NoRoom
from tabane.testing.dumps import (
    about,
    cool,
    files_on_disk,
    keep,
    make_store,
    read_tree,
    write_dump,
)
from tabane.testing.dying import fail_at_each_write, in_child, kill_at_each_step

Wanted = dict[int, dict[str, bytes]]
"""The files of each revision."""
Work = Callable[[CheckpointStore], Awaitable[object]]
WINDOWS = {1: 1, 2: 2}
"""Of the dump of a revision: the second has what the first has, and more."""
SMALL = 3 * WINDOW_BYTES


def load_libraries() -> None:
    """Here, so that not each child has to."""
    Sealer(bytes(KEY_BYTES)).seal(b"", b"")


def do(directory: Path, work: Work, quota_bytes: int = 1 << 30) -> None:
    """In a life of the store's own."""

    async def live() -> None:
        store = make_store(directory, quota_bytes=quota_bytes)
        await store.load()
        await work(store)

    asyncio.run(live())


def make(*revisions: int) -> Work:
    async def work(store: CheckpointStore) -> None:
        for revision in revisions:
            await keep(store, "memory", about(revision=revision), WINDOWS[revision])

    return work


async def remove(store: CheckpointStore) -> None:
    for stored in store.all():
        if stored.about.revision == 2:
            await store.remove(stored.digest)


async def open_damaged(store: CheckpointStore) -> None:
    """The second, of which somebody changed a chunk that the first has not; if it is there yet."""
    for stored in store.all():
        if stored.about.revision == 2:
            with pytest.raises(Corrupt):
                await store.open(stored.digest)


async def check(store: CheckpointStore, directory: Path, wanted: Wanted) -> None:
    """All that is there is whole, and there is nothing else."""
    names = set()
    for stored in store.all():
        manifest = await store.manifest(stored.digest)
        names |= {f"manifests/{store.vault.manifest_path(stored.digest).name}"}
        chunks = (bytes.fromhex(chunk) for chunk in manifest.chunks if chunk != HOLE)
        names |= {f"chunks/{store.vault.name(chunk).hex()}" for chunk in chunks}
        await cool(store, stored.digest)
        async with await store.open(stored.digest) as opened:
            assert read_tree(opened) == wanted[stored.about.revision]
    files = files_on_disk(directory)
    assert {name for name in files if not name.startswith("quarantine/")} == names
    assert store.room.used_bytes == sum(files.values())
    assert [*(directory / "disk/incoming").iterdir()] == []


def what_is_left(place: Path) -> frozenset[tuple[str, int]]:
    """On disk, for the next life: what was in memory is gone. Files by their names, and sizes."""
    return frozenset(
        (re.sub("incoming/[^/]+", "incoming/x", str(path.relative_to(place))), path.stat().st_size)
        for path in place.rglob("*")
        if not path.is_relative_to(place / "memory") and path.is_file()
    )


def revisions(store: CheckpointStore) -> set[int]:
    return {stored.about.revision for stored in store.all()}


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: who is killed loses nothing that the kernel has, and a disk takes its time."""
    with tempfile.TemporaryDirectory(prefix="tabane-test-", dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Wanted:
    found = {}
    for revision, windows in WINDOWS.items():
        directory = tmp_path_factory.mktemp(f"dump-{revision}")
        write_dump(directory, "memory", windows)
        found[revision] = read_tree(directory)
    return found


@pytest.mark.parametrize(
    ("first", "work", "quota", "least", "most"),
    [
        pytest.param(None, make(1), 1 << 30, set(), {1}, id="the first of a node"),
        pytest.param(make(1), make(2), 1 << 30, {1}, {1, 2}, id="another"),
        pytest.param(make(1, 2), remove, 1 << 30, {1}, {1, 2}, id="removing"),
        pytest.param(make(1), make(2), SMALL, set(), {1, 2}, id="another in place of the first"),
    ],
)
def test_killed_at_any_step(
    tmp_path: Path,
    wanted: Wanted,
    first: Work | None,
    work: Work,
    quota: int,
    least: set[int],
    most: set[int],
) -> None:
    """What was there before and was not to go is there, and readable; what was being made is there
    whole, or nothing of it. The next life works."""
    load_libraries()
    before, place = tmp_path / "before", tmp_path / "place"
    before.mkdir()
    if first is not None:
        assert in_child(lambda: do(before, first)) == 0
    shutil.copytree(before, place)
    seen: set[frozenset[tuple[str, int]]] = set()

    def outlive() -> None:
        async def check_and_go_on(store: CheckpointStore) -> None:
            assert least <= revisions(store) <= most
            assert store.quarantined() == 0, "there never is a manifest without its chunks"
            await check(store, place, wanted)
            await work(store)
            await check(store, place, wanted)

        do(place, check_and_go_on, quota)

    for _ in kill_at_each_step(place, lambda: do(place, work, quota)):
        if (left := what_is_left(place)) not in seen:
            assert in_child(outlive) == 0
            seen.add(left)
        shutil.rmtree(place)
        shutil.copytree(before, place)
    assert len(seen) > 2, "it was killed before and after it mattered"


def test_killed_at_any_step_of_discarding_one(tmp_path: Path, wanted: Wanted) -> None:
    load_libraries()
    before, place = tmp_path / "before", tmp_path / "place"
    before.mkdir()
    assert in_child(lambda: do(before, make(1))) == 0
    shared = {path.name for path in (before / "disk/chunks").iterdir()}
    assert in_child(lambda: do(before, make(2))) == 0
    own = next(path for path in (before / "disk/chunks").iterdir() if path.name not in shared)
    own.write_bytes(own.read_bytes()[:-1] + b"x")
    shutil.copytree(before, place)

    async def check_and_go_on(store: CheckpointStore) -> None:
        await open_damaged(store)
        assert revisions(store) == {1}
        await check(store, place, wanted)
        await make(2)(store)
        await check(store, place, wanted)

    seen: set[frozenset[tuple[str, int]]] = set()
    for _ in kill_at_each_step(place, lambda: do(place, open_damaged)):
        if (left := what_is_left(place)) not in seen:
            assert in_child(lambda: do(place, check_and_go_on)) == 0
            seen.add(left)
        shutil.rmtree(place)
        shutil.copytree(before, place)


def test_a_disk_that_is_full_at_any_write(tmp_path: Path, wanted: Wanted) -> None:
    """The first is open, so that nothing can be removed for the second: that is said, nothing is
    left of it, and once there is room it is made."""
    load_libraries()
    before, place = tmp_path / "before", tmp_path / "place"
    before.mkdir()
    assert in_child(lambda: do(before, make(1))) == 0
    shutil.copytree(before, place)

    async def work(store: CheckpointStore) -> None:
        lease = await store.open(store.all()[0].digest)
        failed = False
        try:
            await make(2)(store)
        except NoRoom as error:
            assert f"the disk below {place}" in error.message
            failed = True
        lease.close()
        assert revisions(store) == ({1} if failed else {1, 2})
        await check(store, place, wanted)
        if failed:
            await make(2)(store)
            await check(store, place, wanted)

    def prepare() -> None:
        shutil.rmtree(place)
        shutil.copytree(before, place)

    assert fail_at_each_write(place / "disk/incoming", lambda: do(place, work), prepare) >= 5


def test_the_watch_over_steps_sees_them(tmp_path: Path) -> None:
    """Of the tests' own tool: it kills before each operation, and not where there is none."""

    def work() -> None:
        (tmp_path / "one").write_bytes(b"")
        (tmp_path / "one").rename(tmp_path / "two")
        (tmp_path / "two").unlink()

    left = []
    for _ in kill_at_each_step(tmp_path, work):
        left.append([path.name for path in tmp_path.iterdir()])
        for path in tmp_path.iterdir():
            path.unlink()
    assert left == [[], ["one"], ["two"], []]
