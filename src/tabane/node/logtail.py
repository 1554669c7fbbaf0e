"""Reading an instance's log while the holder writes and rotates it.

The files of a log are known by their inodes, never by their names: rotation renames them. What is
open stays readable when it is renamed or removed, so a reader takes hold of each newer file as soon
as the kernel tells of it (inotify), however far it has read. Of what is there at one moment, the
files are opened from the newest name to the oldest: rotation only moves a file towards the older
names, so one may be met twice (and is taken once), but none is missed.

A line is passed on whole or, when the disk was full, cut and ended; never glued to another.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Protocol

from tabane.errors import UsageError
from tabane.node.logfile import format_stamp
from tabane.units import parse_seconds, shorten

BLOCK_BYTES = 64 << 10
POLL_S = 0.2
"""Where the kernel has no inotify instance left to give."""
MOST_HELD = 16
"""Files of a log that wait for a slow reader; what is older is given up, and said."""
STAMP_LENGTH = len("2026-01-31T23:59:59.123456789Z")
_LOST = "stderr F tabane: lines are missing here: they were rotated away unread"
LOST = f"{format_stamp(0)} {_LOST}\n".encode()
IN_MODIFY, IN_MOVED_TO, IN_CREATE = 0x2, 0x80, 0x100
RFC3339 = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?([Zz]|[+-]\d\d:\d\d)")


class Life(Protocol):
    """Of who writes the log."""

    def goes_on(self) -> bool: ...

    def subscribe(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Have `wake` called when that may have changed; returns how to end it."""


def parse_since(text: str, now: float) -> str:
    """A log's stamp from an age (`10m`; `30`: seconds) or a moment of RFC 3339. Raises
    `UsageError`."""
    if (found := RFC3339.fullmatch(text)) is None:
        try:
            return format_stamp(max(0, int((now - parse_seconds(text)) * 1e9)))
        except UsageError:
            problem = "write an age as 10m or 2h, or a moment as 2026-01-31T09:00:00Z"
            raise UsageError(f"since: {shorten(text)}: {problem}") from None
    day, clock, part, zone = found.groups()
    try:
        moment = datetime.fromisoformat(f"{day}T{clock}{zone.upper().replace('Z', '+00:00')}")
        seconds = int(moment.astimezone(UTC).timestamp())
    except (ValueError, OverflowError):
        raise UsageError(f"since: {shorten(text)} is no moment there is") from None
    return format_stamp(max(0, seconds) * 10**9 + int((part or "0").ljust(9, "0")))


async def read_lines(path: Path, since: str, tail: int) -> AsyncIterator[bytes]:
    """What is there: lines from the stamp `since` on (all when it is empty), of those the last
    `tail` (0: all)."""
    files = _Files(path)
    try:
        files.look()
        async for block in _select(files, since, tail):
            yield block
    finally:
        files.close()


async def follow_lines(path: Path, since: str, tail: int, life: Life) -> AsyncIterator[bytes]:
    """The same, and then all that is added until who writes has ended."""
    changed = asyncio.Event()
    files = _Files(path)

    def look() -> None:
        files.look()
        changed.set()

    watch = _Watch(path, look)
    end = life.subscribe(changed.set)
    try:
        files.look()
        async for block in _select(files, since, tail):
            yield block
        while True:
            alive = life.goes_on()
            watch.renew()
            files.look()
            for block in files.blocks():
                if kept := _since(block, since):
                    yield kept
            if not alive:
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(None if watch.works else POLL_S):
                    await changed.wait()
            changed.clear()
        if rest := files.rest():
            yield rest
    finally:
        end()
        watch.close()
        files.close()


async def _select(files: _Files, since: str, tail: int) -> AsyncIterator[bytes]:
    """What is there, as asked; other work gets its turn between two blocks."""
    last: deque[bytes] = deque()
    count = 0
    for block in files.blocks():
        kept = _since(block, since)
        if not tail:
            if kept:
                yield kept
        else:
            for line in kept.splitlines(True):
                last.append(line)
                count += _completes(line)
                while count > tail:
                    count -= _completes(last.popleft())
        await asyncio.sleep(0)
    if last:
        yield b"".join(last)


def _since(block: bytes, since: str) -> bytes:
    """Its lines from that stamp on. Stamps have one length and sort as they are written."""
    if not since or not block or block is LOST:
        return block
    first = since.encode()
    if block[:STAMP_LENGTH] >= first:
        return block
    return b"".join(line for line in block.splitlines(True) if line[:STAMP_LENGTH] >= first)


def _completes(line: bytes) -> bool:
    """Whether a stored line ends one of the program's; a long one is stored in parts."""
    words = line.split(b" ", 3)
    return len(words) < 3 or words[2] != b"P"


class _Files:
    """The log's files from the oldest that is not read yet; the last is the newest known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: deque[FileIO] = deque()
        self._rest = b""
        self._is_missing = False

    def look(self) -> None:
        """Take hold of the files that are newer than the newest known."""
        newest = _identity(self._files[-1]) if self._files else None
        fresh: list[FileIO] = []
        met = set()
        for file in _open_all(self._path):
            if (identity := _identity(file)) == newest:
                file.close()
                break
            if identity in met:
                file.close()
                continue
            met.add(identity)
            fresh.append(file)
        else:
            self._is_missing = self._is_missing or newest is not None
        self._files.extend(reversed(fresh))
        while len(self._files) > MOST_HELD:
            self._files.popleft().close()
            self._is_missing = True

    def blocks(self) -> Iterator[bytes]:
        """What is there and not read yet: whole lines, in blocks."""
        while self._files:
            if self._is_missing:
                self._is_missing = False
                yield LOST
            file = self._files[0]
            while block := file.read(BLOCK_BYTES):
                whole, newline, self._rest = (self._rest + block).rpartition(b"\n")
                if newline:
                    yield whole + newline
            if self._files[0] is file and len(self._files) > 1:
                if cut := self.rest():
                    yield cut
                self._files.popleft().close()
            elif self._files[0] is file:
                return

    def rest(self) -> bytes:
        """What there is of a line that nobody will complete any more."""
        rest, self._rest = self._rest, b""
        return rest + b"\n" if rest else b""

    def close(self) -> None:
        while self._files:
            self._files.pop().close()


def _identity(file: FileIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino


def _open_all(path: Path) -> Iterator[FileIO]:
    """The log's files, the newest first."""
    with suppress(FileNotFoundError):
        yield FileIO(path)
    for number in sorted(_numbers(path)):
        with suppress(FileNotFoundError):
            yield FileIO(path.with_name(f"{path.name}.{number}"))


def _numbers(path: Path) -> Iterable[int]:
    names = [found.name for found in path.parent.iterdir()] if path.parent.exists() else []
    suffixes = [name.removeprefix(f"{path.name}.") for name in names if name != path.name]
    return [int(suffix) for suffix in suffixes if suffix.isdigit()]


class _Watch:
    """Calls `tell` when something may have been written to the log, or it was rotated. Its
    directory is made with its first line: until then, that of all logs is watched."""

    def __init__(self, path: Path, tell: Callable[[], object]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._path = path
        self._tell = tell
        self._is_near = False
        self._descriptor = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        self.works = self._descriptor >= 0
        if self.works:
            asyncio.get_running_loop().add_reader(self._descriptor, self._on_event)
            self.works = self._add(path.parent.parent, IN_CREATE | IN_MOVED_TO)
        self.renew()

    def renew(self) -> None:
        """Watch the log's own directory, once it is there."""
        if self.works and not self._is_near:
            self._is_near = self._add(self._path.parent, IN_CREATE | IN_MOVED_TO | IN_MODIFY)

    def _add(self, directory: Path, mask: int) -> bool:
        added = self._libc.inotify_add_watch(self._descriptor, os.fsencode(directory), mask)
        return bool(added >= 0)

    def _on_event(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._descriptor, BLOCK_BYTES)
        self.renew()
        self._tell()

    def close(self) -> None:
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
