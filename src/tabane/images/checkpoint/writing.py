"""A checkpoint on its way into a vault: chunk by chunk, and its manifest last."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from threading import Event, Lock

from tabane.images.checkpoint import trees
from tabane.images.checkpoint.manifest import HOLE, Manifest, Stored, Stream, encode_manifest
from tabane.images.checkpoint.seal import digest_of, sync_directory
from tabane.images.checkpoint.vault import Vault, describe, size_on_disk
from tabane.images.room import FULL, Claim, full_disk
from tabane.images.trees import sync_file_system

NICENESS = 10
"""Of the threads: whatever waits for an instance goes first."""


class Writing:
    """`write`, as often as it is broken off for want of room, then `publish`; `drop` in any case.
    Each may be called in any thread, and takes its time."""

    def __init__(self, vault: Vault, claim: Claim) -> None:
        self._vault = vault
        self._claim = claim
        self._place = Path(tempfile.mkdtemp(dir=vault.directory / "incoming"))
        self._lock = Lock()
        self._names: set[bytes] = set()
        """Referred to."""
        self._begun: set[str] = set()
        """Chunks that a thread looks after, or has."""
        self._there: set[str] = {HOLE}
        """Chunks that are on disk, in their place or in this one's."""
        self._fresh: set[bytes] = set()
        """Names of those in this one's."""
        self._windows: dict[int, str] = {}
        self._manifest: Path | None = None

    def write(self, directory: Path, stream: Stream, stop: Event) -> list[str]:
        """The chunks of all windows; returns their digests. Raises `NoRoom`, after which it may be
        called again and goes on where it was, `OSError`, and `GivenUp`."""

        def add(window: int) -> None:
            data = trees.read_window(directory, stream, window)
            self._windows[window] = HOLE if data is None else self._add(data)

        windows = range(stream.windows)
        left = [window for window in windows if self._windows.get(window) not in self._there]
        trees.for_each(left, add, stop, NICENESS)
        return [self._windows[window] for window in windows]

    def measure(self, directory: Path, stream: Stream, stop: Event) -> int:
        """What all chunks would take on disk, which is found out by sealing them. Raises
        `OSError`, and `GivenUp`."""
        sizes: dict[bytes, int] = {}

        def add(window: int) -> None:
            data = trees.read_window(directory, stream, window)
            if data is None or (raw := digest_of(data)) in sizes:
                return
            sizes[raw] = size_on_disk(len(self._vault.seal(self._vault.name(raw), data)))

        trees.for_each(range(stream.windows), add, stop, NICENESS)
        return sum(sizes.values())

    def _add(self, data: bytearray) -> str:
        """Have a chunk on disk. What another thread is at is left to it: when that fails, both
        windows come again."""
        raw = digest_of(data)
        digest, name = raw.hex(), self._vault.name(raw)
        with self._lock:
            if digest in self._begun:
                return digest
            self._begun.add(digest)
            if name not in self._names:
                self._vault.refer(name)
                self._names.add(name)
        try:
            if not self._vault.is_sound(raw):
                self._write(name, self._vault.seal(name, data))
                self._fresh.add(name)
        except BaseException:
            self._begun.discard(digest)
            raise
        self._there.add(digest)
        return digest

    def _write(self, name: bytes, blob: bytes) -> None:
        size = size_on_disk(len(blob))
        self._claim.spend(size)
        try:
            (self._place / name.hex()).write_bytes(blob)
        except OSError as error:
            self._claim.give_back(size)
            if error.errno in FULL:
                raise full_disk(self._vault.directory) from error
            raise

    def publish(self, manifest: Manifest, now: float) -> Stored:
        """It is there when this returns. Raises `NoRoom`, `OSError`."""
        digest, data = encode_manifest(manifest)
        path = self._vault.manifest_path(digest)
        scratch = self._place / "manifest"
        blob = self._vault.seal(path.name.encode(), data)
        self._claim.spend(size_on_disk(len(blob)))
        scratch.write_bytes(blob)
        os.utime(scratch, (now, now))
        sync_file_system(self._place)
        for name in self._fresh:
            self._vault.put(self._place / name.hex(), self._vault.chunk_path(name))
        sync_directory(self._vault.directory / "chunks")
        chunks = (self._vault.chunk_path(name).stat().st_size for name in self._names)
        size = size_on_disk(len(blob)) + sum(map(size_on_disk, chunks))
        self._manifest = path
        self._vault.put(scratch, path)
        sync_directory(path.parent)
        self._names, names = set(), self._names
        self._manifest = None
        self._vault.adopt(digest, names)
        return describe(digest, manifest, size, now)

    def drop(self) -> None:
        """What of it is not published goes. Idempotent."""
        shutil.rmtree(self._place, ignore_errors=True)
        if self._manifest is not None:
            self._vault.unlink(self._manifest)
        self._vault.release(self._names)
        self._names = set()
