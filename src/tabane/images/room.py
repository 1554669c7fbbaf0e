"""How much a node's images, or its checkpoints, may take, and what of it is spoken for.

What is being brought or unpacked counts from the moment it is announced, so that two that fit alone
are not both begun. A bound on the disk itself stands beside the quota: images never take its last.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tabane.errors import Unavailable
from tabane.units import show_size

SHARE = 0.5
"""Of the file system that images are on, unless a quota is set. (Kubernetes begins to collect
images at 85 % of a disk that has little else on it; a node's directory also has logs.)"""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class NoRoom(Unavailable):
    """It would fit if images were removed, or if there were a larger quota; `is_hopeless`: only
    with a larger quota."""

    def __init__(self, message: str, *, is_hopeless: bool = False) -> None:
        super().__init__(message)
        self.is_hopeless = is_hopeless


class Claim:
    """What one piece of work has announced to write."""

    def __init__(self, room: Room) -> None:
        self.bytes = 0
        self._room = room

    def spend(self, size: int) -> None:
        """Before it is written. Raises `NoRoom`. May be called from any thread."""
        self._room.take(self, size)

    def give_back(self, size: int) -> None:
        """It was not written after all."""
        self._room.give_back(self, size)


class Room:
    """`limit_bytes` of it; 0 means `share` of the file system of `directory`. `kind`: of what is
    kept there, as commands name it."""

    def __init__(
        self, directory: Path, limit_bytes: int = 0, *, share: float = SHARE, kind: str = "image"
    ) -> None:
        self._directory = directory
        self._kind = kind
        self._claims: set[Claim] = set()
        self._lock = threading.Lock()
        disk = os.statvfs(directory)
        self.limit_bytes = limit_bytes or int(disk.f_blocks * disk.f_frsize * share)
        self.stored_bytes = 0
        """By whole images and trees, as the store measures it."""

    @property
    def used_bytes(self) -> int:
        return self.stored_bytes + sum(claim.bytes for claim in tuple(self._claims))

    @property
    def left_bytes(self) -> int:
        """More than nothing, or how much too much there is."""
        return self.limit_bytes - self.used_bytes

    def take(self, claim: Claim, size: int) -> None:
        with self._lock:
            self.check(claim.bytes + size)
            if size > (left := self.left_bytes):
                raise NoRoom(
                    f"{self._kind}s may take {show_size(self.limit_bytes)} here and "
                    f"{show_size(max(0, left))} of that are left: remove some with "
                    f"`tabane {self._kind} gc` or `tabane {self._kind} rm`, or set a larger "
                    f"{self._kind} quota"
                )
            claim.bytes += size

    def give_back(self, claim: Claim, size: int) -> None:
        with self._lock:
            claim.bytes -= size

    def check(self, size: int) -> None:
        """Raises `NoRoom` for what would not even fit alone."""
        if size > self.limit_bytes:
            raise NoRoom(
                f"this alone takes more than the {show_size(self.limit_bytes)} that all "
                f"{self._kind}s may take here: set a larger {self._kind} quota",
                is_hopeless=True,
            )

    @contextmanager
    def claim(self) -> Iterator[Claim]:
        """For the time of one piece of work. A disk that is full is said as `NoRoom` as well."""
        claim = Claim(self)
        self._claims.add(claim)
        try:
            yield claim
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise full_disk(self._directory) from error
        finally:
            self._claims.discard(claim)


def full_disk(directory: Path) -> NoRoom:
    return NoRoom(f"the disk below {directory} is full: remove what is not needed there")
