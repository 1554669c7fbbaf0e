"""The append-only audit log of a node: who did what to what, when, and what came of it.

One JSON object a line. A line is written at once, so that it survives the process that writes it;
on disk it is, whatever happens to the machine, when `sync` has returned. Actions on processes are
written before they are done (`doing`) and after (`done`, `failed`), and synced before they are
answered. Full files are renamed (`audit.log.1` is the newest) and the oldest of `FILES` removed:
who must keep them for longer copies them away.

Anybody may send orders that are refused, for ever. So that these push nothing out that was done, of
each user other than root at most `MOST_IDLE` lines in `WINDOW_S` are written of what changed
nothing; then a line says that more are only counted, and another one how many there were.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec.structs import replace

from tabane.model import Value
from tabane.security.identity import Principal

MAX_BYTES = 16 << 20
FILES = 8
"""With the one being written."""
WINDOW_S = 600.0
MOST_IDLE = 100
"""These are at most 10 MB a day: of one user, the files last for two weeks."""
ONLY_ASKS = "signal 0"


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

    @property
    def is_idle(self) -> bool:
        """Whether nothing was changed: it was refused, tried without effect, or only asked."""
        return self.outcome in ("refused", "would") or self.action == ONLY_ASKS


@dataclass
class _Window:
    """Of one user: since `began`, in seconds since the epoch. `last` of those `left_out`."""

    began: float
    written: int = 0
    left_out: int = 0
    last: Line | None = None

    def admit(self, line: Line) -> list[Line]:
        if self.written < MOST_IDLE:
            self.written += 1
            return [line]
        self.left_out += 1
        first, self.last = self.last is None, line
        said = f"more that changes nothing is only counted for {WINDOW_S:g} s"
        return [replace(line, reason="; ".join(filter(None, (line.reason, said))))] if first else []

    def summary(self, at: float) -> list[Line]:
        if self.last is None or self.left_out == 1:
            return []
        line = self.last
        said = f"{self.left_out - 1} more that changed nothing, since {self.began:.0f}; the last"
        return [replace(line, at=at, reason=f"{said}: {line.reason}")]


class Shares:
    """What is written of all that is to be: see the module's text. Pure."""

    def __init__(self) -> None:
        self._windows: dict[tuple[str, int], _Window] = {}

    def admit(self, line: Line) -> list[Line]:
        """The lines to be written, that one last if it is among them."""
        over = [
            user
            for user, window in self._windows.items()
            if not 0 <= line.at - window.began < WINDOW_S
        ]
        said = [it for user in over for it in self._windows.pop(user).summary(line.at)]
        if not line.is_idle or Principal(line.kind, line.uid).is_root:
            return [*said, line]
        window = self._windows.setdefault((line.kind, line.uid), _Window(line.at))
        return said + window.admit(line)

    def end(self) -> list[Line]:
        """What is to be said yet."""
        windows = list(self._windows.values())
        self._windows.clear()
        return [it for one in windows if one.last for it in one.summary(one.last.at)]


class AuditLog:
    """For any thread. Raises `OSError` when the disk does not take it."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES, files: int = FILES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._files = files
        self._lock = threading.Lock()
        self._shares = Shares()
        self._fd = _open(path)
        self._cut = _is_cut(path)
        """Whether the last line was cut, by a power loss or a full disk, and may spoil the next."""

    def add(self, line: Line) -> None:
        """Write it, to the disk's cache, or count it."""
        with self._lock:
            for each in self._shares.admit(line):
                self._write(each)

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
        with self._lock:
            for line in self._shares.end():
                self._write(line)
        self.sync()
        os.close(self._fd)

    def _write(self, line: Line) -> None:
        data = msgspec.json.encode(line) + b"\n"
        if os.fstat(self._fd).st_size + len(data) > self._max_bytes:
            self._rotate()
        before = b"\n" if self._cut else b""
        self._cut = True
        _write(self._fd, before + data)
        self._cut = False

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
