"""Volumes: what of an app is to outlive its instances, on the node that has it.

    NAMESPACE/APP/NAME.ext4     a sparse file with an ext4 file system as large as the volume
      data/                     in there: what instances see, owned by ids as inside
    NAMESPACE/APP/NAME.lent     another kernel than this one may have written it since

A file system of its own is a quota that the kernel keeps on any disk, and any class can have it: a
container by a loop device and an id-mapped mount, a virtual machine as a disk. One instance at a
time uses it. It is mounted when that is prepared and unmounted when it is destroyed, so all that
was written is on disk when an instance is gone.

A machine's kernel writes what it likes, as its app may have it in its power. So this one does not
mount what was lent to another until that is checked, and follows no link in it.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tabane.clock import SYSTEM
from tabane.errors import Busy, EngineError, UsageError
from tabane.model import App, Volume
from tabane.runtimes import mounts
from tabane.runtimes.api import Storage
from tabane.runtimes.lookup import resolve

DATA = "data"
SUFFIX = ".ext4"
MOUNTED = "volumes"
"""In an instance's directory: `NAME.fs`, the file system, and `NAME`, what the instance sees."""
OPTIONS = "loop,nosuid,nodev,errors=remount-ro"
RELEASE_S = 5.0
"""How long another namespace that was just copied from ours may hold a mount that we dropped."""
POLL_S = 0.01


class VolumeFiles:
    """The volumes of a node, below `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def file(self, key: str, name: str) -> Path:
        """Of the volume `name` of the app `key`, whether it is there or not."""
        return self._directory / key / f"{name}{SUFFIX}"

    def of(self, app: App) -> tuple[Storage, ...]:
        """Those of an app, as its instances have them."""
        return tuple(
            Storage(volume.name, volume.path, self.file(app.key, volume.name))
            for volume in app.volumes
        )

    def ensure(self, app: App) -> None:
        """Make those of the app's volumes that are not there yet, and enlarge those that are to be
        larger. Blocking. Raises `UsageError` when one is larger already, `EngineError`."""
        for volume in app.volumes:
            self._ensure(app, volume)

    def _ensure(self, app: App, volume: Volume) -> None:
        file = self.file(app.key, volume.name)
        if not file.exists():
            _make(file, volume.size_bytes)
        elif (size := file.stat().st_size) > volume.size_bytes:
            there = f"volume {volume.name} of {app.key} has {size} bytes"
            raise UsageError(f"{there}, and {volume.size_bytes} are asked for: it cannot shrink")
        elif size < volume.size_bytes or _growing(file).exists():
            _enlarge(file, volume.size_bytes)

    def remove(self, key: str, name: str) -> None:
        """For good. Unknown ones are fine."""
        file = self.file(key, name)
        file.unlink(missing_ok=True)
        for mark in (_mark_of(file), _growing(file)):
            mark.unlink(missing_ok=True)
        for parent in (file.parent, file.parent.parent):
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()

    def sizes(self) -> Iterator[tuple[str, str, int, int]]:
        """Of each: the app's key, its name, its size and how much of the disk it takes, in
        bytes."""
        for file in sorted(self._directory.glob(f"*/*/*{SUFFIX}")):
            key = str(file.parent.relative_to(self._directory))
            status = file.stat()
            yield key, file.name.removesuffix(SUFFIX), status.st_size, status.st_blocks * 512


def _make(file: Path, size_bytes: int) -> None:
    """A name is there only for what is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".new")
    with fresh.open("wb") as sparse:
        sparse.truncate(size_bytes)
    fresh.chmod(0o600)
    try:
        _run("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "root_owner=0:0", str(fresh))
        _sync(fresh)
        fresh.rename(file)
        _sync(file.parent)
    finally:
        fresh.unlink(missing_ok=True)


def _enlarge(file: Path, size_bytes: int) -> None:
    """It is marked meanwhile, as the file is larger before its file system is."""
    wait_free(file)
    mark = _growing(file)
    mark.touch(mode=0o600)
    _sync(mark.parent)
    os.truncate(file, size_bytes)
    _check(file)
    _run("resize2fs", str(file))
    mark.unlink()


def _growing(file: Path) -> Path:
    return file.with_suffix(".growing")


def _check(file: Path) -> None:
    """All of it, also where it is said to be clean; what can be is mended. Raises `EngineError`."""
    _run("e2fsck", "-f", "-p", str(file), accept=(0, 1))


def _mark_of(file: Path) -> Path:
    return file.with_suffix(".lent")


def lend(file: Path) -> None:
    """Before a volume is given to another kernel as a disk. Blocking. Raises `Busy` as long as this
    one has it."""
    wait_free(file)
    mark = _mark_of(file)
    if not mark.exists():
        mark.touch(mode=0o600)
        _sync(mark.parent)


def settle(file: Path) -> None:
    """What another kernel wrote to a volume is on this machine's disk afterwards. Idempotent, also
    when there is none any more. Blocking."""
    with suppress(FileNotFoundError):
        _sync(file)


def _take_back(file: Path) -> None:
    mark = _mark_of(file)
    if mark.exists():
        wait_free(file)
        _check(file)
        mark.unlink()


def _run(*argv: str, accept: tuple[int, ...] = (0,)) -> None:
    path = shutil.which(argv[0], path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if path is None:
        raise EngineError(f"volumes need {argv[0]}: install the package e2fsprogs", argv=argv)
    done = subprocess.run((path, *argv[1:]), capture_output=True, text=True, check=False)
    if done.returncode not in accept:
        words = (done.stderr or done.stdout).strip()
        problem = f"{argv[0]} failed for {argv[-1]}: {words}"
        raise EngineError(problem, argv=argv, status=done.returncode, output=words)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def mount(storage: Storage, directory: Path, image: Path, user_namespace: str) -> Path:
    """Mount a volume for an instance with this directory; returns what is to be bound inside.

    What is new there belongs to whom `storage.path` belongs in the image's tree. Blocking, as the
    journal of a machine that was cut off is replayed. What is half made, `unmount_all` removes.
    """
    place = directory / MOUNTED
    whole, shown = place / f"{storage.name}.fs", place / storage.name
    for target in (whole, shown):
        target.mkdir(parents=True, exist_ok=True)
    _take_back(storage.file)
    _run("mount", "-t", "ext4", "-o", OPTIONS, str(storage.file), str(whole))
    data = whole / DATA
    if os.path.lexists(data):
        _check_directory(data, storage)
    else:
        _make_data(data, resolve(image, storage.path), storage)
    mounts.mount_idmapped(data, shown, user_namespace, read_only=False)
    return shown


def _check_directory(path: Path, storage: Storage) -> None:
    if not stat.S_ISDIR(path.lstat().st_mode):
        problem = f"{path.name} in {storage.file} is no directory, as it was made"
        raise EngineError(f"{problem}: remove the volume {storage.name}, or put it right by hand")


def _make_data(data: Path, like: Path | None, storage: Storage) -> None:
    fresh = data.with_suffix(".new")
    if not os.path.lexists(fresh):
        fresh.mkdir()
    _check_directory(fresh, storage)
    if like is not None and like.is_dir():
        status = like.stat()
        os.chown(fresh, status.st_uid, status.st_gid)
        fresh.chmod(stat.S_IMODE(status.st_mode))
    fresh.rename(data)


def unmount_all(directory: Path) -> None:
    """Of the instance with this directory; what was written is on disk then. Idempotent."""
    place = directory / MOUNTED
    if not place.exists():
        return
    for target in sorted(place.iterdir(), key=lambda path: path.suffix):
        mounts.sync(target)
        while mounts.unmount(target):
            pass
        target.rmdir()
    place.rmdir()


def wait_free(file: Path) -> None:
    """Wait until no loop device has the file: then it may be given to another kernel. Blocking.
    Raises `Busy`."""
    deadline = SYSTEM.now() + RELEASE_S
    while users := _loops_of(file):
        if SYSTEM.now() > deadline:
            raise Busy(f"{file} is still in use by {', '.join(users)}")
        time.sleep(POLL_S)


def _loops_of(file: Path) -> list[str]:
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if file.samefile(backing.read_text().rstrip("\n")):
                found.append(backing.parts[3])
        except OSError:
            continue
    return found
