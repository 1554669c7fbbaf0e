"""What the kernel knows of a file without asking anybody: statx(2) with AT_STATX_DONT_SYNC.

stat(2) of a file of a network or user-space file system asks its server, and waits for ever when
that does not answer. Through a link in /proc/PID, which needs no path to be walked, and with what
the kernel remembers, there is nothing to wait for.
"""

from __future__ import annotations

import ctypes
import os
import struct
from functools import cache
from typing import Any, NamedTuple

AT_FDCWD = -100
AT_STATX_DONT_SYNC = 0x4000
STATX_BASIC_STATS = 0x7FF
_SIZE = 256
_FIELDS = struct.Struct("=28xH2xQQ80x4I")
"""mode, inode, size, then major and minor numbers: of the device it is, of that where it lies."""


class Status(NamedTuple):
    """`size` is in bytes, None where it is not known. `device` is `major,minor` of the device that
    it is, else of its file system's."""

    mode: int
    inode: int
    size: int | None
    device: str


def status_of(path: str) -> Status:
    """Of the file that a link in /proc/PID leads to. Raises `OSError`."""
    buffer = ctypes.create_string_buffer(_SIZE)
    asked = (AT_FDCWD, os.fsencode(path), AT_STATX_DONT_SYNC, STATX_BASIC_STATS, buffer)
    if _libc().statx(*asked):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return parse_statx(buffer.raw)


def parse_statx(raw: bytes) -> Status:
    """A `struct statx`."""
    from stat import S_ISBLK, S_ISCHR

    mode, inode, size, major, minor, of_major, of_minor = _FIELDS.unpack_from(raw)
    is_device = S_ISCHR(mode) or S_ISBLK(mode)
    device = f"{major},{minor}" if is_device else f"{of_major},{of_minor}"
    return Status(mode, inode, size, device)


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
