"""The append-only audit log of a node: who did what to what, when, and what came of it.

One JSON object a line. A line is written at once, so that it survives the process that writes it;
on disk it is, whatever happens to the machine, when `sync` has returned. Actions on processes are
written before they are done (`doing`) and after (`done`, `failed`), and synced before they are
answered. Full files are renamed (`audit.log.1` is the newest) and the oldest of `FILES` removed:
who must keep them for longer copies them away.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import msgspec

from tabane.model import Value

MAX_BYTES = 16 << 20
FILES = 8
"""With the one being written."""


class Line(Value, frozen=True, omit_defaults=True):
    """`kind`, `uid` and `pid` are of who asked; `at` is in seconds since the epoch.

    `process`, `incarnation` and `start_ticks` say which process `target` was. `outcome` is `doing`,
    `done`, `failed`, `refused`, or `would` for a dry run; empty where only the request is logged.
    """

    at: float
    kind: str
    uid: int
    pid: int
    action: str
    target: str
    process: str = ""
    incarnation: str = ""
    start_ticks: int = 0
    outcome: str = ""
    reason: str = ""
    dry_run: bool = False
    force: bool = False
    key: str = ""
    """The idempotency key."""
    via: str = ""
    """The node that passed the request on; `pid` is one of its processes then."""


class AuditLog:
    """For any thread. Raises `OSError` when the disk does not take it."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES, files: int = FILES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._files = files
        self._lock = threading.Lock()
        self._fd = _open(path)
        self._cut = _is_cut(path)
        """Whether the last line was cut, by a power loss or a full disk, and may spoil the next."""

    def add(self, line: Line) -> None:
        """Write it, to the disk's cache."""
        data = msgspec.json.encode(line) + b"\n"
        with self._lock:
            if os.fstat(self._fd).st_size + len(data) > self._max_bytes:
                self._rotate()
            before = b"\n" if self._cut else b""
            self._cut = True
            _write(self._fd, before + data)
            self._cut = False

    def sync(self) -> None:
        """Return when all that was added is on the disk itself. Blocks for some milliseconds; lines
        can be added meanwhile."""
        with self._lock:
            fd = os.dup(self._fd)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Sync and close. Once."""
        self.sync()
        os.close(self._fd)

    def _rotate(self) -> None:
        os.fsync(self._fd)
        os.close(self._fd)
        for number in range(self._files - 2, 0, -1):
            if (older := self._numbered(number)).exists():
                older.replace(self._numbered(number + 1))
        self._path.replace(self._numbered(1))
        self._fd = _open(self._path)
        self._cut = False

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")


def read_lines(path: Path) -> list[Line]:
    """Of one file. What is cut, or of another version, is left out."""
    found = []
    for raw in path.read_bytes().splitlines():
        try:
            found.append(msgspec.json.decode(raw, type=Line))
        except msgspec.DecodeError:
            continue
    return found


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _write(fd: int, data: bytes) -> None:
    """The whole line, or what the disk takes of it and then `OSError`."""
    while data:
        data = data[os.write(fd, data) :]


def _is_cut(path: Path) -> bool:
    with path.open("rb") as file:
        end = file.seek(0, 2)
        file.seek(max(0, end - 1))
        return file.read() not in (b"", b"\n")
