"""This machine's real procfs, in the shell's own pid namespace, as seen from outside of it.

It is mounted within the view; the server holds its directory open. Whatever the view does not serve
by itself are links into it, so that the kernel itself answers, with its own checks of who may see
what. A process that ends in the middle of something raises one of `GONE`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from tabane.k2i.procfs import GONE

__all__ = ["GONE", "Local", "Owner", "host_btime", "host_uptime_s"]


class Owner(NamedTuple):
    uid: int
    gid: int


class Local:
    """The procfs whose directory is open as `fd`; None as long as there is none."""

    def __init__(self, fd: int | None = None) -> None:
        self.fd = fd

    def pids(self) -> list[int]:
        if self.fd is None:
            return []
        return sorted(int(name) for name in os.listdir(self.fd) if name.isdigit())  # noqa: PTH208

    def owner(self, pid: int) -> Owner:
        """Raises one of `GONE`."""
        found = self._stat(str(pid))
        return Owner(found.st_uid, found.st_gid)

    def names(self, pid: int) -> list[str]:
        """What its directory has. Raises one of `GONE`."""
        fd = self._open(str(pid), os.O_DIRECTORY)
        try:
            return os.listdir(fd)  # noqa: PTH208
        finally:
            os.close(fd)

    def has(self, pid: int, name: str) -> bool:
        """Whether its directory has that."""
        try:
            self._stat(f"{pid}/{name}")
        except OSError:
            return False
        return True

    def target(self, pid: int, name: str) -> str:
        """Of a link. Raises one of `GONE`."""
        return os.readlink(f"{pid}/{name}", dir_fd=self._directory())

    def read(self, pid: int, name: str) -> bytes:
        """Raises one of `GONE`."""
        fd = self._open(f"{pid}/{name}", 0)
        try:
            return os.read(fd, 1 << 16)
        finally:
            os.close(fd)

    def _stat(self, path: str) -> os.stat_result:
        return os.stat(path, dir_fd=self._directory(), follow_symlinks=False)

    def _open(self, path: str, flags: int) -> int:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags, dir_fd=self._directory())

    def _directory(self) -> int:
        if self.fd is None:
            raise ProcessLookupError("the shell has not begun")
        return self.fd


def host_uptime_s() -> float:
    """Seconds since this machine was started."""
    return float(Path("/proc/uptime").read_bytes().split()[0])


def host_btime() -> int:
    """When this machine was started, in seconds since the epoch."""
    after = Path("/proc/stat").read_bytes().partition(b"\nbtime ")[2]
    return int(after.split(None, 1)[0])
