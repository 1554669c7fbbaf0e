"""Checkpoints with the wrong key, or that somebody has been at: said, and never restored."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tabane.errors import Corrupt, Denied, NotFound, Unavailable
from tabane.images.checkpoint import CheckpointStore, WrongKey
from tabane.testing.dumps import about, cool, files_on_disk, keep, make_store, read_tree, write_dump


@pytest.fixture
async def store(tmp_path: Path) -> CheckpointStore:
    store = make_store(tmp_path)
    await store.load()
    return store


async def opened(store: CheckpointStore, digest: str) -> dict[str, bytes]:
    async with await store.open(digest) as directory:
        return read_tree(directory)


def dumped(tmp_path: Path, seed: str) -> dict[str, bytes]:
    """What a dump with that seed has."""
    directory = tmp_path / f"dump-{seed}"
    directory.mkdir(exist_ok=True)
    if not any(directory.iterdir()):
        write_dump(directory, seed)
    return read_tree(directory)


# The key


async def test_another_key_is_said_and_nothing_is_lost(
    store: CheckpointStore, tmp_path: Path
) -> None:
    stored = await keep(store, "one")
    key = (tmp_path / "key").read_bytes()
    (tmp_path / "key").write_bytes(os.urandom(32))
    other = make_store(tmp_path)
    with pytest.raises(WrongKey, match="were sealed with another key than this node's: put that"):
        await other.load()
    with pytest.raises(Unavailable, match="there are no checkpoints here: the checkpoints in"):
        await other.open(stored.digest)
    assert "another key" in other.problem
    (tmp_path / "key").write_bytes(key)
    await other.load()
    assert await opened(other, stored.digest) == dumped(tmp_path, "one") and other.problem == ""


async def test_a_lost_key_is_made_anew_once_the_checkpoints_are_gone(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    await store.load()
    stored = await keep(store, "one")
    await cool(store, stored.digest)
    (tmp_path / "key").unlink()
    with pytest.raises(WrongKey):
        await make_store(tmp_path).load()
    await store.remove(stored.digest)
    again = make_store(tmp_path)
    await again.load()
    stored = await keep(again, "two")
    await cool(again, stored.digest)
    assert await opened(again, stored.digest) == dumped(tmp_path, "two")


async def test_a_key_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(os.urandom(32))
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(Denied, match="can be read by others"):
        await make_store(tmp_path).load()
    (tmp_path / "key").chmod(0o600)
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(Corrupt, match="is no key of 32 bytes: put the right one back"):
        await make_store(tmp_path).load()


async def test_a_key_may_be_elsewhere(tmp_path: Path) -> None:
    """On a device that is not always there: then none is made in its place."""
    (tmp_path / "key").symlink_to(tmp_path / "device" / "key")
    with pytest.raises(Corrupt, match="is a link to nothing: mount what has the key"):
        await make_store(tmp_path).load()
    (tmp_path / "device").mkdir()
    (tmp_path / "device" / "key").write_bytes(os.urandom(32))
    (tmp_path / "device" / "key").chmod(0o600)
    await make_store(tmp_path).load()
    assert (tmp_path / "key").is_symlink()


# Damage


def chunks_of(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "disk/chunks").iterdir(), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap(path: Path) -> None:
    other = next(each for each in path.parent.iterdir() if each != path)
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (flip, "is not what was sealed with this node's key"),
        (swap, "is not what was sealed with this node's key"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is not what was sealed"),
        (lambda path: path.write_bytes(b""), "is cut off"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
async def test_a_damaged_chunk(
    store: CheckpointStore, tmp_path: Path, damage: object, problem: str
) -> None:
    assert callable(damage)
    stored = await keep(store, "one")
    await cool(store, stored.digest)
    damage(chunks_of(tmp_path)[-1])
    with pytest.raises(Corrupt) as caught:
        await store.open(stored.digest)
    assert caught.value.message.startswith(
        f"checkpoint {stored.digest[:19]} of default/hello is damaged (chunk "
    )
    assert problem in caught.value.message
    assert caught.value.message.endswith("and was discarded: the app starts without")
    with pytest.raises(NotFound):
        await store.open(stored.digest)
    left = files_on_disk(tmp_path)
    assert {name.partition("/")[0] for name in left} == {"quarantine"}
    assert sum(left.values()) == store.room.used_bytes and [*(tmp_path / "memory").iterdir()] == []
    again = await keep(store, "one")
    await cool(store, again.digest)
    assert await opened(store, again.digest) == dumped(tmp_path, "one")


async def test_a_damaged_manifest(store: CheckpointStore, tmp_path: Path) -> None:
    one, two = await keep(store, "one"), await keep(store, "two")
    for stored in (one, two):
        await cool(store, stored.digest)
    manifests = [store.vault.manifest_path(stored.digest) for stored in (one, two)]
    swap(manifests[0])
    with pytest.raises(Corrupt, match="is not what was sealed with this node's key"):
        await store.open(one.digest)
    again = make_store(tmp_path)
    await again.load()
    assert again.all() == [] and again.room.used_bytes == 2 * 4096, "both are in quarantine"


async def test_a_chunk_that_went_missing_is_noticed_at_the_start(
    store: CheckpointStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = await keep(store, "one"), await keep(store, "two")
    manifest = await store.manifest(one.digest)
    lost = {hash_ for hash_ in manifest.chunks if hash_} - {
        *(await store.manifest(two.digest)).chunks
    }
    for hash_ in [*lost][:2]:
        store.vault.chunk_path(store.vault.name(bytes.fromhex(hash_))).unlink()
    again = make_store(tmp_path)
    await again.load()
    assert [stored.digest for stored in again.all()] == [two.digest]
    assert f"checkpoint {one.digest[:19]} is discarded: 2 of its" in caplog.text


async def test_a_damaged_chunk_is_not_relied_on_by_the_next_dump(
    store: CheckpointStore, tmp_path: Path
) -> None:
    one = await keep(store, "one", about(revision=1))
    for path in chunks_of(tmp_path):
        flip(path)
    two = await keep(store, "one", about(revision=2))
    for stored in (one, two):
        await cool(store, stored.digest)
        assert await opened(store, stored.digest) == dumped(tmp_path, "one")
    assert store.room.used_bytes == store.vault.measure()


async def test_quarantine_keeps_the_latest_only(store: CheckpointStore, tmp_path: Path) -> None:
    for number in range(20):
        stored = await keep(store, f"{number}", windows=1)
        await cool(store, stored.digest)
        flip(store.vault.manifest_path(stored.digest))
        with pytest.raises(Corrupt):
            await store.open(stored.digest)
    kept = {path.name for path in (tmp_path / "disk/quarantine").iterdir()}
    assert len(kept) == store.quarantined() == 16
    assert store.vault.manifest_path(stored.digest).name in kept
    assert store.room.used_bytes == store.vault.measure() == 16 * 4096
