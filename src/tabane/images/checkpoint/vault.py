"""The disk half of the store: sealed chunks and manifests, whole or not at all.

    key-id              whose key they are sealed with
    chunks/NAME         a sealed chunk, by its keyed name
    manifests/HEX       a sealed manifest, by its digest; its time is when it was last used
    incoming/X/         what is being written; emptied when the vault is opened
    quarantine/         what was found damaged, the latest few

A checkpoint is there when its manifest is. So that is written last, when all its chunks are on
disk, and removed first. Whatever is killed in between leaves chunks that no manifest names, which
the next start removes.

A chunk stays while anything *refers* to it: a manifest, or something that is being written, which
refers to a chunk from the moment it relies on it. All here may be called from any thread, and takes
its time.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from tabane.errors import Corrupt, NotFound
from tabane.images.checkpoint import trees
from tabane.images.checkpoint.manifest import (
    DIGEST,
    HOLE,
    MAX_MANIFEST_BYTES,
    MAX_WINDOW_BYTES,
    Manifest,
    Stored,
    parse_manifest,
    stream_of,
)
from tabane.images.checkpoint.seal import Damaged, Sealer, digest_of
from tabane.images.room import Room

log = logging.getLogger(__name__)

BLOCK_BYTES = 4096
"""File systems give room in these."""
MOST_QUARANTINED = 16
PARTS = ("chunks", "manifests", "incoming", "quarantine")


class WrongKey(Corrupt):
    """What is there was sealed with another key."""


class Vault:
    """See the module's text. `directory` is made if need be; `load` it before anything else."""

    def __init__(self, directory: Path, sealer: Sealer, room: Room) -> None:
        self.directory = directory
        self.room = room
        self._sealer = sealer
        self._lock = threading.Lock()
        """Held while a chunk comes or goes, one at a time."""
        self._references: Counter[bytes] = Counter()
        self._names: dict[str, tuple[bytes, ...]] = {}
        """Of the chunks of each checkpoint."""

    # What is here

    def load(self) -> list[Stored]:
        """Remove what is half-made or damaged; return what is there. Raises `WrongKey`."""
        shutil.rmtree(self.directory / "incoming", ignore_errors=True)
        for part in PARTS:
            (self.directory / part).mkdir(exist_ok=True)
        self.directory.chmod(0o700)
        self._check_key()
        sizes = {
            bytes.fromhex(entry.name): size_on_disk(entry.stat().st_size)
            for entry in os.scandir(self.directory / "chunks")
            if DIGEST.fullmatch(entry.name)
        }
        found = [*self._load_manifests(sizes)]
        for name in sizes.keys() - self._references.keys():
            self.chunk_path(name).unlink()
        self.room.stored_bytes = self.measure()
        return found

    def _check_key(self) -> None:
        path = self.directory / "key-id"
        said = path.read_text() if path.exists() else ""
        if said == self._sealer.fingerprint:
            return
        if said and any((self.directory / "manifests").iterdir()):
            raise WrongKey(
                f"the checkpoints in {self.directory} were sealed with another key than this "
                "node's: put that one back, or remove them"
            )
        scratch = self.directory / "incoming" / "key-id"
        scratch.write_text(self._sealer.fingerprint)
        sync_file(scratch)
        scratch.rename(path)

    def _load_manifests(self, sizes: dict[bytes, int]) -> Iterator[Stored]:
        for path in sorted((self.directory / "manifests").iterdir()):
            digest = f"sha256:{path.name}"
            try:
                manifest = self.manifest(digest)
                names = self.names(manifest)
                if missing := len(names - sizes.keys()):
                    raise Damaged(f"{missing} of its {len(names)} chunks are missing")
            except Corrupt as error:
                log.warning("checkpoint %s is discarded: %s", digest[:19], error.message)
                self._quarantine(path)
                continue
            self._references.update(names)
            self._names[digest] = tuple(names)
            used = path.stat()
            size = size_on_disk(used.st_size) + sum(sizes[name] for name in names)
            yield describe(digest, manifest, size, used.st_mtime)

    def manifest(self, digest: str) -> Manifest:
        """Raises `NotFound`, `Corrupt`."""
        path = self.manifest_path(digest)
        try:
            blob = path.read_bytes()
        except FileNotFoundError:
            raise NotFound(f"checkpoint {digest[:19]} is not here") from None
        data = self._sealer.unseal(path.name.encode(), blob, MAX_MANIFEST_BYTES)
        if digest_of(data).hex() != path.name:
            raise Damaged("its manifest is another one's")
        return parse_manifest(data)

    def chunk(self, digest: str, most_bytes: int) -> bytes:
        """What is in a chunk. Raises `Damaged`, also when it is missing."""
        raw = bytes.fromhex(digest)
        name = self._sealer.name(raw)
        try:
            return self._sealer.unseal(name, self.chunk_path(name).read_bytes(), most_bytes)
        except FileNotFoundError:
            raise Damaged(f"chunk {digest[:12]} is missing", digest) from None
        except Damaged as error:
            raise Damaged(f"chunk {digest[:12]}: {error.message}", digest) from None

    def measure(self) -> int:
        """What is on disk, looked up anew, but for what is being written."""
        kept = (self.directory / part for part in PARTS if part != "incoming")
        entries = (entry for directory in kept for entry in os.scandir(directory))
        return sum(size_on_disk(entry.stat().st_size) for entry in entries)

    def quarantined(self) -> int:
        """How many files there are that were found damaged, lately."""
        return sum(1 for _ in (self.directory / "quarantine").iterdir())

    # Going

    def remove(self, digest: str) -> None:
        """Of what is not here: nothing."""
        self.unlink(self.manifest_path(digest))
        self.release(self._names.pop(digest, ()))

    def forget(self, digest: str) -> None:
        """Its manifest goes, and does not come back when the power fails."""
        path = self.manifest_path(digest)
        self.unlink(path)
        sync_file(path.parent)

    def discard(self, digest: str, chunk: str = "") -> None:
        """Take a checkpoint away that is damaged (its `chunk`, if it is not its manifest), and keep
        what tells why."""
        self._quarantine(self.manifest_path(digest))
        if chunk and not self.is_sound(raw := bytes.fromhex(chunk)):
            self._quarantine(self.chunk_path(self.name(raw)))
        self.release(self._names.pop(digest, ()))
        with self._lock:  # somebody else has been at the files
            self.room.stored_bytes = self.measure()

    def _quarantine(self, path: Path) -> None:
        kept = self.directory / "quarantine"
        with self._lock:
            if path.exists():
                self._unlink(kept / path.name)
                path.rename(kept / path.name)
            oldest = sorted(kept.iterdir(), key=lambda each: each.stat().st_ctime)
            for each in oldest[: max(0, len(oldest) - MOST_QUARANTINED)]:
                self._unlink(each)

    def release(self, names: Iterable[bytes]) -> None:
        """Something refers to these chunks no more; those of nobody go."""
        for name in names:
            with self._lock:
                self._references[name] -= 1
                if self._references[name] > 0:
                    continue
                del self._references[name]
                self._unlink(self.chunk_path(name))

    def unlink(self, path: Path) -> None:
        """A file that may be there goes."""
        with self._lock:
            self._unlink(path)

    def _unlink(self, path: Path) -> None:
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return
        self.room.stored_bytes -= size_on_disk(size)

    # For what is being written

    def refer(self, name: bytes) -> None:
        """Keep a chunk, if it is here; `release` it."""
        with self._lock:
            self._references[name] += 1

    def adopt(self, digest: str, names: Iterable[bytes]) -> None:
        """What was referred to belongs to this checkpoint, which has its manifest."""
        self._names[digest] = tuple(names)

    def is_sound(self, digest: bytes) -> bool:
        """Whether a chunk is here and can be relied on."""
        try:
            return digest_of(self.chunk(digest.hex(), MAX_WINDOW_BYTES)) == digest
        except Damaged:
            return False

    def put(self, source: Path, target: Path) -> None:
        """Give what is complete its name."""
        with self._lock:
            before = size_on_disk(target.stat().st_size) if target.exists() else 0
            after = size_on_disk(source.stat().st_size)
            source.rename(target)
            self.room.stored_bytes += after - before

    def name(self, digest: bytes) -> bytes:
        return self._sealer.name(digest)

    def seal(self, label: bytes, data: bytes | bytearray) -> bytes:
        return self._sealer.seal(label, data)

    def names(self, manifest: Manifest) -> set[bytes]:
        """Of all its chunks."""
        return {self.name(bytes.fromhex(one)) for one in manifest.chunks if one != HOLE}

    def chunk_path(self, name: bytes) -> Path:
        return self.directory / "chunks" / name.hex()

    def manifest_path(self, digest: str) -> Path:
        return self.directory / "manifests" / digest.removeprefix("sha256:")


def restore_files(vault: Vault, manifest: Manifest, directory: Path, stop: threading.Event) -> None:
    """All files of a checkpoint in the empty `directory`. Raises `Damaged`, `OSError`."""
    stream = stream_of(manifest)
    trees.make_files(directory, manifest.directories, stream)

    def bring(window: int) -> None:
        digest, size = manifest.chunks[window], stream.window_size(window)
        data = vault.chunk(digest, size)
        if len(data) != size:
            raise Damaged(f"chunk {digest[:12]} has {len(data)} of {size} bytes", digest)
        trees.write_window(directory, stream, window, data)

    filled = [window for window, digest in enumerate(manifest.chunks) if digest != HOLE]
    trees.for_each(filled, bring, stop)


def describe(digest: str, manifest: Manifest, disk_bytes: int, used_at: float) -> Stored:
    """What is kept in mind of it: nearly all have the same processor's flags."""
    flags = sys.intern(manifest.about.cpu_flags)
    about = msgspec.structs.replace(manifest.about, cpu_flags=flags)
    sizes = manifest.bytes, manifest.memory_bytes, disk_bytes
    return Stored(digest, about, manifest.made_at, *sizes, used_at)


def size_on_disk(size: int) -> int:
    """What a file of this size takes."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
