"""How much images may take: quota, disks that fill up, archives that are bombs."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path

import pytest

from tabane.images import ImageStore, pack
from tabane.images.room import NoRoom, Room
from tabane.images.store import StoredImage, choose_to_remove
from tabane.supervise import Supervisor
from tabane.testing.clock import VirtualClock
from tabane.testing.layouts import make_manifest, tar_of, write_index
from tabane.units import show_size

MIB = 1 << 20


async def sent(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def bring(store: ImageStore, source: str, base: Path) -> str:
    with pack(source, base) as packed:
        return await store.import_layout(sent(packed.chunks()))


def make_layout(directory: Path, *layers: bytes) -> None:
    write_index(directory, make_manifest(directory, *layers))


def is_empty(store: Path) -> bool:
    return not any((store / "incoming").iterdir()) and not any((store / "trees").iterdir())


async def test_what_images_take(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "store", 10 * MIB)
    make_layout(tmp_path / "one", tar_of(a="x" * MIB))
    make_layout(tmp_path / "two", tar_of(a="x" * MIB), tar_of(b="y" * MIB))
    one, two = [await bring(store, f"oci:{name}", tmp_path) for name in ("one", "two")]
    assert 2 * MIB < store.room.stored_bytes < 2.1 * MIB  # the layer they share counts once
    assert store.describe(two).bytes > 2 * MIB > store.describe(one).bytes > MIB
    await store.prepare(two)
    assert 2 * MIB < store.describe(two).unpacked_bytes < 2.1 * MIB
    assert 4 * MIB < store.room.used_bytes == store.room.stored_bytes < 4.2 * MIB
    again = ImageStore(tmp_path / "store", 10 * MIB)
    assert again.room.stored_bytes == store.room.stored_bytes
    await again.remove(two)
    await again.remove(one)
    assert again.room.used_bytes == 0


async def test_what_drivers_keep_beside_a_tree_counts_and_goes_with_it(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "store", 10 * MIB)
    make_layout(tmp_path / "one", tar_of(a="1"))
    digest = await bring(store, "oci:one", tmp_path)
    disk = (await store.prepare(digest)).tree.parent / "disk.img"
    disk.write_bytes(bytes(MIB))
    assert store.describe(digest).unpacked_bytes > MIB
    await store.remove(digest)
    assert not disk.exists()


async def test_an_image_that_is_larger_than_the_quota(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "store", MIB)
    make_layout(tmp_path / "l", tar_of(a="x" * MIB))
    with pytest.raises(NoRoom, match=r"this alone takes more than the 1.0 MiB that all") as error:
        await bring(store, "oci:l", tmp_path)
    assert error.value.is_hopeless
    assert store.digests() == [] and store.room.used_bytes == 0
    assert is_empty(tmp_path / "store")


async def test_a_layer_that_unpacks_to_more_than_there_is_room_for(tmp_path: Path) -> None:
    """It is given up before it is written."""
    store = ImageStore(tmp_path / "store", 10 * MIB)
    make_layout(tmp_path / "bomb", gzip.compress(tar_of(a=bytes(40 * MIB))))
    digest = await bring(store, "oci:bomb", tmp_path)
    with pytest.raises(NoRoom, match=r"this alone takes more than the 10\.0 MiB"):
        await store.prepare(digest)
    assert is_empty(tmp_path / "store") and store.room.used_bytes < MIB


async def test_a_layer_of_very_many_entries(tmp_path: Path) -> None:
    """Each takes an inode, though it is empty."""
    store = ImageStore(tmp_path / "store", MIB)
    names = {f"{number}": "" for number in range(4000)}
    make_layout(tmp_path / "many", gzip.compress(tar_of(**names)))
    digest = await bring(store, "oci:many", tmp_path)
    with pytest.raises(NoRoom):
        await store.prepare(digest)
    assert is_empty(tmp_path / "store")


def test_what_is_announced_counts_at_once(tmp_path: Path) -> None:
    room = Room(tmp_path, 10)
    with room.claim() as one:
        one.spend(6)
        with room.claim() as two, pytest.raises(NoRoom, match="4 B of that are left") as error:
            two.spend(5)
        assert not error.value.is_hopeless
        assert room.left_bytes == 4
    assert room.left_bytes == 10


def test_without_a_quota_it_is_a_share_of_the_disk(tmp_path: Path) -> None:
    assert 0 < Room(tmp_path).limit_bytes < 1 << 60


@pytest.mark.parametrize(
    ("size", "shown"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB")]
)
def test_sizes_in_sentences(size: int, shown: str) -> None:
    assert show_size(size) == shown


def test_what_was_not_used_for_longest_goes_first() -> None:
    def image(name: str, used_at: float) -> StoredImage:
        return StoredImage(name, "linux", "", 1, 1, used_at)

    images = [image("new", 9), image("old", 1), image("kept", 0), image("older", 0.5)]
    assert choose_to_remove(images, {"kept"}) == ["older", "old", "new"]


async def test_use_is_remembered(tmp_path: Path) -> None:
    clock = VirtualClock()
    store = ImageStore(tmp_path / "store", clock=clock)
    for name in ("one", "two"):
        make_layout(tmp_path / name, tar_of(a=name))
    one, two = [await bring(store, f"oci:{name}", tmp_path) for name in ("one", "two")]
    for digest, wait_s in ((one, 10.0), (two, 10.0), (one, 90.0)):
        clock.advance(wait_s)
        await store.prepare(digest)
    assert [image.digest for image in store.list_images()] == [two, one]
    assert store.used_lately() == {one}
    assert [image.digest for image in ImageStore(tmp_path / "store").list_images()] == [two, one]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o", "size=6m", "none", str(place))
    subprocess.run(mount, check=True)
    try:
        yield place
    finally:
        subprocess.run(("umount", str(place)), check=True)


@pytest.mark.real
async def test_a_disk_that_fills_up(small_disk: Path, tmp_path: Path) -> None:
    store = ImageStore(small_disk / "store", 1 << 40)
    make_layout(tmp_path / "large", tar_of(a=bytes(5 * MIB)))
    make_layout(tmp_path / "bomb", gzip.compress(tar_of(a=bytes(20 * MIB))))
    with pytest.raises(NoRoom, match=f"the disk below {small_disk}/store is full"):
        await bring(store, "oci:large", tmp_path)
    digest = await bring(store, "oci:bomb", tmp_path)
    with pytest.raises(NoRoom, match="is full: remove what is not needed there"):
        await store.prepare(digest)
    assert is_empty(small_disk / "store")
    make_layout(tmp_path / "small", tar_of(a=bytes(MIB)))
    small = await bring(store, "oci:small", tmp_path)
    assert ((await store.prepare(small)).tree / "a").stat().st_size == MIB


async def test_an_import_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "store")
    waiting = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b"x" * 100
        waiting.set()
        await asyncio.Event().wait()

    async def importing() -> None:
        await store.import_layout(endless())

    async with Supervisor("test") as tasks:
        task = tasks.start("import", importing())
        await waiting.wait()
        assert store.room.used_bytes == 100
        task.cancel()
        await asyncio.wait([task])
    assert is_empty(tmp_path / "store")
    assert store.room.used_bytes == 0
