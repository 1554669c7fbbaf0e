"""An instance's output on disk: CRI log lines, rotated by size.

A line is `2026-01-31T23:59:59.123456789Z stdout F text` (F: the whole line; P: a part, more
follows), as the Kubernetes container runtime interface defines it, so its tools can read it.
Standard library only: the holder writes these.
"""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path

LINE_BYTES = 16 << 10
"""A longer line is written in parts, so that a program without newlines costs no memory."""

_LINE = re.compile(rb"([0-9T:.-]+Z) (\w+) ([FP]) (.*)", re.DOTALL)


class LogFile:
    """Appends to `path`; at `max_bytes` it is renamed `path.1`, and so on: `files` in all.

    It is made, with its directory, when there is something to write: a start does not wait for a
    disk, and a quiet program leaves no file.
    """

    def __init__(self, path: Path, max_bytes: int, files: int) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._files = files
        self._partial: dict[str, bytes] = {}
        self._file: FileIO | None = None
        self._size = 0

    def write(self, stream: str, data: bytes, at_ns: int) -> None:
        """Add output of `stream`; empty `data` is its end and completes its last line."""
        *lines, rest = (self._partial.pop(stream, b"") + data).split(b"\n")
        entries = [entry for line in lines for entry in _entries(line)]
        *parts, (_, rest) = _entries(rest)
        entries += parts
        if rest and data:
            self._partial[stream] = rest
        elif rest:
            entries.append((b"F", rest))
        head = f"{format_stamp(at_ns)} {stream} ".encode()
        if entries:
            self._append(b"".join(head + tag + b" " + text + b"\n" for tag, text in entries))

    def _append(self, block: bytes) -> None:
        file = self._file or self._open("ab")
        if self._size and self._size + len(block) > self._max_bytes:
            file = self._rotate()
        file.write(block)
        self._size += len(block)

    def _open(self, mode: str) -> FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = FileIO(self.path, mode)
        self._size = os.fstat(self._file.fileno()).st_size
        return self._file

    def _rotate(self) -> FileIO:
        for number in range(self._files - 1, 0, -1):
            older = self._name(number - 1)
            if older.exists():
                older.replace(self._name(number))
        self.close()
        return self._open("wb")

    def _name(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path

    def close(self) -> None:
        """Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _entries(line: bytes) -> list[tuple[bytes, bytes]]:
    """A line as tagged pieces of at most `LINE_BYTES`, the last of which completes it."""
    starts = range(0, len(line) or 1, LINE_BYTES)
    pieces = [line[start : start + LINE_BYTES] for start in starts]
    return [*((b"P", piece) for piece in pieces[:-1]), (b"F", pieces[-1])]


def format_stamp(at_ns: int) -> str:
    """RFC 3339 in UTC with nanoseconds."""
    seconds, nanoseconds = divmod(at_ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z"


def parse_line(line: bytes) -> tuple[str, str, bool, bytes] | None:
    """A stored line as (stamp, stream, whole, text); None when it is not one."""
    found = _LINE.fullmatch(line.removesuffix(b"\n"))
    if found is None:
        return None
    stamp, stream, tag, text = found.groups()
    return stamp.decode(), stream.decode(), tag == b"F", text
