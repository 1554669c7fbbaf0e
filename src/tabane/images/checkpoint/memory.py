"""Opened checkpoints: plain files in memory, within a budget.

What is opened stays (*warm*) when nobody uses it any more, until its room is wanted: the one unused
for longest goes first. So a burst of clones decrypts once. `directory` is root's; each checkpoint
in it can be read by its app's root (by its group), so that an engine can restore it within the
app's user namespace, and by no other app.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tabane.errors import Conflict
from tabane.images.room import NoRoom
from tabane.units import show_size


@dataclass
class Opened:
    """A checkpoint that is open, or (without `users`) warm."""

    directory: Path
    bytes: int
    users: int = 0


class Memory:
    """See the module's text. Not for threads: what takes time here is left to the caller."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.directory = directory
        self.limit_bytes = limit_bytes
        self._opened: dict[str, Opened] = {}
        """The one used least recently first."""
        self._promised_bytes = 0

    def clear(self) -> None:
        """Remove what an earlier life has left."""
        self._opened.clear()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o711)
        for path in self.directory.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    @property
    def used_bytes(self) -> int:
        return self._promised_bytes + sum(opened.bytes for opened in self._opened.values())

    def promise(self, size: int) -> list[Path]:
        """Keep room for `size` bytes, until `give_back`; returns directories to be removed for it.
        Raises `NoRoom`."""
        if size > self.limit_bytes:
            raise NoRoom(
                f"this takes {show_size(size)} of memory, and all opened checkpoints may take "
                f"{show_size(self.limit_bytes)} here: set a larger checkpoint memory",
                is_hopeless=True,
            )
        gone = self._choose(size - (self.limit_bytes - self.used_bytes))
        self._promised_bytes += size
        return [self._opened.pop(digest).directory for digest in gone]

    def _choose(self, needed: int) -> list[str]:
        gone: list[str] = []
        for digest, opened in self._opened.items():
            if needed <= 0:
                break
            if not opened.users:
                gone.append(digest)
                needed -= opened.bytes
        if needed > 0:
            raise NoRoom(
                f"{show_size(self.used_bytes)} of the {show_size(self.limit_bytes)} that opened "
                "checkpoints may take are in use: try again when fewer start, or set a larger "
                "checkpoint memory"
            )
        return gone

    def give_back(self, size: int) -> None:
        self._promised_bytes -= size

    def add(self, digest: str, directory: Path, size: int) -> None:
        """It is open now, for nobody yet."""
        self._opened[digest] = Opened(directory, size)

    def use(self, digest: str) -> Path | None:
        """One more uses it; None when it is not open."""
        opened = self._opened.pop(digest, None)
        if opened is None:
            return None
        self._opened[digest] = opened
        opened.users += 1
        return opened.directory

    def leave(self, digest: str) -> None:
        """One user less."""
        self._opened[digest].users -= 1

    def take_out(self, digest: str) -> Path | None:
        """Forget one, if it is open; returns what is to be removed. Raises `Conflict` when somebody
        uses it."""
        if self.users(digest):
            raise Conflict(f"checkpoint {digest[:19]} is in use")
        opened = self._opened.pop(digest, None)
        return opened.directory if opened is not None else None

    def users(self, digest: str) -> int:
        opened = self._opened.get(digest)
        return opened.users if opened is not None else 0

    def is_warm(self, digest: str) -> bool:
        return digest in self._opened
