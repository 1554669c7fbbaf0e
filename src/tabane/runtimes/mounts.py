"""Mounting by system call: a mount command costs a process, these cost microseconds.

The calls of the newer interface (Linux 5.12) have no wrapper in every C library, so they go by
number, which is the same on all architectures.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

from tabane.errors import Unsupported

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MNT_DETACH = 2
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH = 4
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_IDMAP = 0x100000
SYS_OPEN_TREE = 428
SYS_MOVE_MOUNT = 429
SYS_MOUNT_SETATTR = 442

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    *(ctypes.c_char_p,) * 3,
    ctypes.c_ulong,
    ctypes.c_char_p,
)


class _Attributes(ctypes.Structure):
    """`struct mount_attr` of linux/mount.h."""

    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")
    )


def mount(kind: str, target: Path, options: str, flags: int = 0) -> None:
    """Mount a new file system of this kind. Raises `OSError` naming the target."""
    arguments = (kind.encode(), os.fsencode(target), kind.encode(), flags, os.fsencode(options))
    if _libc.mount(*arguments) != 0:
        raise _error(f"mount {kind}", target)


def unmount(target: Path) -> bool:
    """Detach what is mounted last on `target`; False when nothing is."""
    return int(_libc.umount2(os.fsencode(target), MNT_DETACH)) == 0


def sync(path: Path) -> None:
    """Return when all of the file system that `path` is on is on its disk."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(directory) != 0:
            raise _error("sync", path)
    finally:
        os.close(directory)


def mount_idmapped(
    source: Path, target: Path, user_namespace: str, *, read_only: bool = True
) -> None:
    """Bind `source` on `target`, its owners shifted by the namespace's map.

    What belongs to id N on disk belongs to the namespace's id N in the mount, so that one tree
    serves every app and is never chowned. Raises `Unsupported` when the file system cannot.
    """
    tree = _syscall(SYS_OPEN_TREE, AT_FDCWD, os.fsencode(source), OPEN_TREE_CLONE | os.O_CLOEXEC)
    if tree < 0:
        raise _error("open", source)
    namespace = os.open(user_namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        flags = MOUNT_ATTR_IDMAP | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
        flags |= MOUNT_ATTR_RDONLY if read_only else 0
        attributes = _Attributes(flags, 0, 0, namespace)
        size = ctypes.c_size_t(ctypes.sizeof(attributes))
        changed = _syscall(
            SYS_MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, ctypes.byref(attributes), size
        )
        if changed < 0:
            reason = os.strerror(ctypes.get_errno())
            raise Unsupported(
                f"{source} lies on a file system that cannot map ids ({reason}): "
                "keep Tabane's state on ext4, xfs or btrfs"
            )
        target_bytes = os.fsencode(target)
        if _syscall(SYS_MOVE_MOUNT, tree, b"", AT_FDCWD, target_bytes, MOVE_MOUNT_F_EMPTY_PATH) < 0:
            raise _error("mount", target)
    finally:
        os.close(namespace)
        os.close(tree)


def bind_read_only(source: Path, target: Path) -> None:
    """Bind `source`, a file or a directory, on `target`; nobody can write to it there. Raises
    `OSError`."""
    tree = _syscall(SYS_OPEN_TREE, AT_FDCWD, os.fsencode(source), OPEN_TREE_CLONE | os.O_CLOEXEC)
    if tree < 0:
        raise _error("open", source)
    try:
        flags = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
        attributes = _Attributes(flags, 0, 0, 0)
        size = ctypes.c_size_t(ctypes.sizeof(attributes))
        given = ctypes.byref(attributes)
        if _syscall(SYS_MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, given, size) < 0:
            raise _error("make read-only", source)
        place = os.fsencode(target)
        if _syscall(SYS_MOVE_MOUNT, tree, b"", AT_FDCWD, place, MOVE_MOUNT_F_EMPTY_PATH) < 0:
            raise _error("mount", target)
    finally:
        os.close(tree)


def targets_below(directory: Path) -> list[Path]:
    """What is mounted below `directory` in this mount namespace, the latest last."""
    prefix = f"{directory}/"
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    targets = (line.split(" ", 5)[4].replace("\\040", " ") for line in lines)
    return [Path(target) for target in targets if target.startswith(prefix)]


def remove_tree(directory: Path) -> None:
    """Remove a directory with all that is in it, but nothing of what is mounted there: that is
    somebody's image or data, and is unmounted. Raises `OSError`."""
    for target in reversed(targets_below(directory)):
        if not unmount(target):
            raise _error("unmount", target)
    shutil.rmtree(directory)


def escape(path: Path) -> str:
    """`path` as it may stand in overlay's options, which `:` and `,` divide."""
    text = str(path).replace("\\", "\\\\")
    return text.replace(":", "\\:").replace(",", "\\,")


def _syscall(number: int, *arguments: object) -> int:
    return int(_libc.syscall(number, *arguments))


def _error(action: str, path: Path) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{action}: {os.strerror(number)}", str(path))
