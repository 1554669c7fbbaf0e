"""The store of checkpoints on file systems of its own: full ones, and who may read what."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tabane.images.room import NoRoom
from tabane.node.checkpoints import mount_memory
from tabane.runtimes import mounts
from tabane.testing.containers import open_directory
from tabane.testing.dumps import (
    about,
    cool,
    files_on_disk,
    keep,
    make_store,
    pages,
    read_tree,
    write_dump,
)
from tabane.testing.dying import in_child

pytestmark = pytest.mark.real

MIB = 1 << 20
CLONE_NEWUSER = 0x10000000
MINE, ANOTHERS = 700_000, 800_000
"""First ids of two apps."""


@pytest.fixture
def place() -> Iterator[Path]:
    """Where other users can get to, with `memory` mounted."""
    with open_directory() as directory:
        mount_memory(directory / "memory", 4 * MIB)
        yield directory
        for name in ("memory", "disk"):
            while mounts.unmount(directory / name):
                pass


def as_root_of(base: int, work: Callable[[], object]) -> int:
    """Do it as root in a user namespace whose ids begin at `base`; as of `in_child`."""
    ready, go = os.pipe(), os.pipe()

    def enter() -> None:
        os.close(ready[0])
        os.close(go[1])
        assert ctypes.CDLL(None).unshare(CLONE_NEWUSER) == 0
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        work()

    child = os.fork()
    if child == 0:
        os._exit(0 if in_child(enter) == 0 else 1)
    os.close(ready[1])
    os.close(go[0])
    assert os.read(ready[0], 1) == b"x"
    inner = Path(f"/proc/{child}/task/{child}/children").read_text().strip()
    for kind in ("uid", "gid"):
        Path(f"/proc/{inner}/{kind}_map").write_text(f"0 {base} 65536")
    os.write(go[1], b"x")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(ready[0])
    os.close(go[1])
    return status


async def test_an_apps_root_reads_its_own_checkpoints_and_no_others(place: Path) -> None:
    store = make_store(place)
    await store.load()
    stored = await keep(store, "one", about(id_base=MINE))
    wanted = place / "wanted"
    wanted.mkdir()
    write_dump(wanted, "one")
    files = read_tree(wanted)
    await cool(store, stored.digest)

    async with await store.open(stored.digest) as directory:
        descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)

        def read() -> None:
            """By its path, and as CRIU does: from a directory that root has opened."""
            assert read_tree(directory) == files
            os.close(os.open("core-0.img", os.O_RDONLY, dir_fd=descriptor))

        def cannot_write() -> None:
            for path in (directory / "core-0.img", directory / "new"):
                with pytest.raises(PermissionError):
                    os.open(path, os.O_WRONLY | os.O_CREAT)
            with pytest.raises(PermissionError):
                (directory / "core-0.img").unlink()

        def cannot_read() -> None:
            for path in (directory / "core-0.img", "core-0.img"):
                with pytest.raises(PermissionError):
                    os.open(path, os.O_RDONLY, dir_fd=descriptor)
            with pytest.raises(PermissionError):
                next(directory.parent.iterdir())

        assert as_root_of(MINE, read) == 0
        assert as_root_of(MINE, cannot_write) == 0
        assert as_root_of(ANOTHERS, cannot_read) == 0
        os.close(descriptor)


async def test_a_disk_that_is_full_for_real(place: Path) -> None:
    (place / "disk").mkdir()
    mounts.mount("tmpfs", place / "disk", f"size={MIB}")
    store = make_store(place, quota_bytes=1 << 30)
    await store.load()
    small = await keep(store, "one", windows=1)
    async with await store.open(small.digest):
        before = files_on_disk(place)
        with pytest.raises(NoRoom, match=f"the disk below {place}/disk is full"):
            await keep(store, "two", about(revision=2), windows=5)
        assert files_on_disk(place) == before
        assert [*(place / "disk/incoming").iterdir()] == []
        assert store.room.used_bytes == sum(before.values())
    await keep(store, "two", about(revision=2), windows=3)
    assert [stored.about.revision for stored in store.all()] == [2], "the first made room"


async def test_an_engine_that_dumps_more_than_the_memory_has(place: Path) -> None:
    store = make_store(place, memory_bytes=4 * MIB)
    await store.load()
    with pytest.raises(OSError, match="No space left") as caught:
        async with store.dump(os.getgid(), MIB) as dump:
            (dump.directory / "pages-1.img").write_bytes(pages("large", 20))
    assert caught.value.errno == errno.ENOSPC
    assert [*(place / "memory").iterdir()] == []
    await keep(store, "one")


async def test_memory_that_others_took(place: Path) -> None:
    """The budget is more than the file system really has."""
    store = make_store(place, memory_bytes=1 << 30)
    await store.load()
    stored = await keep(store, "one", windows=5)
    await cool(store, stored.digest)
    (place / "memory" / "ballast").write_bytes(bytes(3 * MIB))
    with pytest.raises(NoRoom, match="/memory has no room left, though opened checkpoints may"):
        await store.open(stored.digest)
    (place / "memory" / "ballast").unlink()
    (await store.open(stored.digest)).close()
    assert store.memory.used_bytes < 2 * MIB


def test_memory_is_mounted_anew_and_empty(place: Path) -> None:
    (place / "memory" / "left").touch()
    mount_memory(place / "memory", 2 * MIB)
    assert [*(place / "memory").iterdir()] == []
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    options = [words[3] for words in lines if words[1] == str(place / "memory")]
    assert len(options) == 1 and {"nosuid", "nodev", "size=2048k"} < {*options[0].split(",")}
    assert "mode=711" in options[0] and "noswap" in options[0]
