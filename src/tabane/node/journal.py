"""Append-only records that outlive what they tell of: events and wakes.

One JSON object a line, rotated by size; the newest are also kept in memory for those who ask.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T", bound=msgspec.Struct)

KEPT = 2000
MAX_BYTES = 4 << 20


class Journal(Generic[T]):
    """A journal of records of one type. What was written before a restart is read back."""

    def __init__(self, path: Path, kind: type[T], *, max_bytes: int = MAX_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._decode = msgspec.json.Decoder(kind).decode
        self._followers: set[Callable[[T], None]] = set()
        self._recent: deque[T] = deque(self._read(), maxlen=KEPT)
        self._file = path.open("ab", buffering=0)
        if self._path.read_bytes()[-1:] not in (b"", b"\n"):
            self._file.write(b"\n")  # a power loss cut the last line: it shall not spoil the next

    def _read(self) -> list[T]:
        records = []
        for path in (self._older, self._path):
            for line in path.read_bytes().splitlines() if path.exists() else ():
                try:
                    records.append(self._decode(line))
                except (msgspec.DecodeError, UnicodeDecodeError):
                    continue  # cut by a power loss, or written by another version
        return records

    @property
    def _older(self) -> Path:
        return self._path.with_name(self._path.name + ".1")

    def add(self, record: T) -> None:
        self._recent.append(record)
        self._file.write(msgspec.json.encode(record) + b"\n")
        if self._file.tell() > self._max_bytes:
            self._file.close()
            self._path.replace(self._older)
            self._file = self._path.open("ab", buffering=0)
        for follower in tuple(self._followers):
            follower(record)

    def recent(self) -> tuple[T, ...]:
        """Oldest first."""
        return tuple(self._recent)

    def follow(self, follower: Callable[[T], None]) -> Callable[[], None]:
        """Call `follower` with each new record; the returned function ends it."""
        self._followers.add(follower)
        return lambda: self._followers.discard(follower)

    def close(self) -> None:
        self._file.close()
