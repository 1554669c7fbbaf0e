"""An instance's root file system: the image below, a small layer of its own above.

    layer/        a tmpfs as large as the app's disk quota; of a pod, a directory in its `layers`
      up, work      overlay's upper layer and its work directory
      dev           the instance's /dev, with its devices
    rootfs/       overlay: `layer/up` over the init layer over the image

The image is below through a mount that maps its owners to the app's id range, made once for an
image and an app and kept: making it costs a walk over nothing, and no file is ever chowned. Overlay
clones its lower mounts, so dropping a kept one never disturbs an instance. All of it is a dozen
system calls in the node's mount namespace, under a millisecond, and no process is started.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from tabane.errors import Unsupported
from tabane.runtimes import mounts
from tabane.runtimes.api import InstanceSpec

MOST_KEPT = 256
OWN_BYTES = 64 << 10
"""What Tabane itself writes into the layer, on top of the quota."""
PAGE_BYTES = 4096
DEVICES = {
    "full": (1, 7),
    "null": (1, 3),
    "random": (1, 8),
    "tty": (5, 0),
    "urandom": (1, 9),
    "zero": (1, 5),
}
LINKS = {
    "fd": "/proc/self/fd",
    "ptmx": "pts/ptmx",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}


class Lowers:
    """Kept id-mapped mounts of images (or of /usr); what was not used for longest goes first."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._kept: OrderedDict[Path, None] | None = None

    def get(self, source: Path, id_base: int, user_namespace: str) -> Path:
        """`source` with its owners mapped to the range that starts at `id_base`, read-only.

        An image that was removed and came back is another directory, so its mount is made anew.
        """
        kept = self._known()
        target = self._directory / f"{source.parent.name}-{source.name}-{id_base}"
        if target in kept and not os.path.samestat(target.stat(), source.stat()):
            del kept[target]
            _drop(target)
        if target not in kept:
            target.mkdir(mode=0o700, exist_ok=True)
            mounts.mount_idmapped(source, target, user_namespace)
            kept[target] = None
        kept.move_to_end(target)
        while len(kept) > MOST_KEPT:
            _drop(kept.popitem(last=False)[0])
        return target

    def drop_all(self) -> None:
        """Unmount all that is kept. Instances keep what they have."""
        for target in self._known():
            _drop(target)
        self._kept = None

    def _known(self) -> OrderedDict[Path, None]:
        if self._kept is None:
            self._kept = OrderedDict.fromkeys(mounts.targets_below(self._directory))
        return self._kept


def _drop(target: Path) -> None:
    mounts.unmount(target)
    target.rmdir()


def build(spec: InstanceSpec, lowers: tuple[Path, ...], files: dict[str, str]) -> None:
    """Make and mount the root file system of `spec` over `lowers` (the topmost first).

    `files` go into its /etc. What is half made when this fails, `tear_down` removes.
    """
    owner = spec.app.id_base
    layer, rootfs = spec.layer, spec.directory / "rootfs"
    if spec.pod is None:
        mount_layers(layer, spec.app.resources.disk_bytes)
    for target in (layer, rootfs):
        target.mkdir(exist_ok=True)
    layer.chmod(0o711)
    _make_directory(layer / "up", spec.image.tree.stat(), owner)
    (layer / "work").mkdir(mode=0o700)
    _make_dev(layer / "dev", owner)
    _write_etc(spec.image.tree / "etc", layer / "up/etc", owner, files)
    _mount_overlay(layer, rootfs, lowers)


def refill(spec: InstanceSpec, lowers: tuple[Path, ...], fill: Callable[[Path], None]) -> None:
    """Have `fill` change the layer of what `build` made: the overlay is away meanwhile, which must
    not see that. When it fails, `tear_down` removes the rest."""
    rootfs = spec.directory / "rootfs"
    mounts.unmount(rootfs)
    fill(spec.layer)
    _mount_overlay(spec.layer, rootfs, lowers)


def _mount_overlay(layer: Path, rootfs: Path, lowers: tuple[Path, ...]) -> None:
    below = ":".join(mounts.escape(lower) for lower in lowers)
    up, work = mounts.escape(layer / "up"), mounts.escape(layer / "work")
    options = f"lowerdir={below},upperdir={up},workdir={work}"
    mounts.mount("overlay", rootfs, options, mounts.MS_NOSUID | mounts.MS_NODEV)


def mount_layers(target: Path, disk_bytes: int, count: int = 1) -> None:
    """Make a file system for `count` layers, which together may have so much written to them."""
    target.mkdir(exist_ok=True)
    size_bytes = max(PAGE_BYTES, disk_bytes) + count * OWN_BYTES
    inodes = size_bytes // PAGE_BYTES + count * 1024
    options = f"size={size_bytes},nr_inodes={inodes},mode=0711"
    mounts.mount("tmpfs", target, options, mounts.MS_NOSUID)


def tear_down(directory: Path) -> None:
    """Unmount and remove what `build` made in `directory`. Idempotent; takes milliseconds."""
    for name in ("rootfs", "layer"):
        remove_mount(directory / name)


def remove_mount(target: Path) -> None:
    """Unmount all that is there, and remove the directory. Idempotent."""
    if target.exists():
        while mounts.unmount(target):
            pass
        target.rmdir()


def write_run(spec: InstanceSpec, directory: str, name: str, text: str) -> None:
    """Put a file into a directory of /run in the layer, which no overlay sees at the time; the
    program can read it. Follows no link, since the layer may be a program's work. Raises
    `Unsupported` when /run is no directory."""
    owner, below, above = spec.app.id_base, spec.image.tree / "run", spec.layer / "up/run"
    if not os.path.lexists(above) and (not os.path.lexists(below) or _is_directory(below)):
        like = below if below.exists() else spec.image.tree
        _make_directory(above, like.stat(), owner)
    if not _is_directory(above):
        raise Unsupported(f"/run of {spec.app.key} is no directory: make it one in its image")
    place, target = above / directory, above / directory / name
    if not _is_directory(place):
        place.unlink(missing_ok=True)
        _make_directory(place, spec.image.tree.stat(), owner)
    if _is_directory(target):
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    target.write_text(text)
    os.chown(target, owner, owner)
    target.chmod(0o444)


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _make_directory(path: Path, like: os.stat_result, id_base: int) -> None:
    path.mkdir()
    os.chown(path, id_base + like.st_uid, id_base + like.st_gid)
    path.chmod(stat.S_IMODE(like.st_mode))


def _make_dev(dev: Path, owner: int) -> None:
    dev.mkdir()
    os.chown(dev, owner, owner)
    dev.chmod(0o755)
    directory = os.open(dev, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name, (major, minor) in DEVICES.items():
            device = os.makedev(major, minor)
            os.mknod(name, stat.S_IFCHR | 0o666, device, dir_fd=directory)
            os.chmod(name, 0o666, dir_fd=directory)
        for name, target in LINKS.items():
            os.symlink(target, name, dir_fd=directory)
        for name, mode in (("pts", 0o755), ("shm", 0o1777)):
            os.mkdir(name, mode, dir_fd=directory)
            os.chown(name, owner, owner, dir_fd=directory)
            os.chmod(name, mode, dir_fd=directory)
    finally:
        os.close(directory)


def _write_etc(below: Path, above: Path, owner: int, files: dict[str, str]) -> None:
    """Put `files` into the upper layer's /etc, which must look like the image's own."""
    like = below.lstat() if os.path.lexists(below) else below.parent.lstat()
    if not stat.S_ISDIR(like.st_mode):
        raise Unsupported(f"the image's /etc ({below}) is not a directory: make it one")
    _make_directory(above, like, owner)
    for name, text in files.items():
        file = os.open(f"{above}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
        try:
            os.write(file, text.encode())
            os.fchown(file, owner, owner)
            os.fchmod(file, 0o644)
        finally:
            os.close(file)
