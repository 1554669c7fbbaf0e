"""A node's images: verified blobs, and the trees that instances run from.

    blobs/sha256/HEX     every blob has been hashed before it got its name
    images/HEX           one file per image (by its manifest's digest): the digests it consists of
    trees/HEX/rootfs     unpacked, for drivers; made when first wanted, by renaming what is complete
    host/HEX             skeletons for the image `host`
    incoming/            what is not complete yet; emptied when a store is opened

One process has the store open. Everything that takes time runs in threads.
"""

from __future__ import annotations

import asyncio
import ctypes
import gzip
import hashlib
import os
import shutil
import tempfile
import zlib
from collections.abc import AsyncIterable, Iterator
from pathlib import Path
from typing import IO

import msgspec

from tabane.errors import Corrupt, NotFound
from tabane.images import host, layout, oci, rootfs
from tabane.runtimes.api import Image

CHUNK_BYTES = 1 << 20
GZIP_MAGIC = b"\x1f\x8b"

_libc = ctypes.CDLL(None, use_errno=True)


class ImageStore:
    """See the module's text. `directory` is made if need be; others than root need not see it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        shutil.rmtree(directory / "incoming", ignore_errors=True)
        for name in ("blobs/sha256", "images", "trees", "host", "incoming"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        directory.chmod(0o700)
        self._prepared: dict[str, Image] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._changing = asyncio.Lock()
        """Held while blobs come or go, so that none is removed that another image just got."""

    def has(self, digest: str) -> bool:
        """Whether the whole image is here."""
        return self._marker(digest).exists()

    def digests(self) -> list[str]:
        """Of all images here."""
        return sorted(f"sha256:{path.name}" for path in (self._directory / "images").iterdir())

    async def import_layout(self, source: AsyncIterable[bytes] | Path) -> str:
        """Take in an image as `Packed.chunks()` or `export` give it; return its digest.

        Raises `Corrupt` when a blob is not what its name says or the stream breaks off, and
        `UsageError` when it cannot run here. Importing what is here already changes nothing.
        """
        place = Path(tempfile.mkdtemp(dir=self._directory / "incoming"))
        try:
            archive = source if isinstance(source, Path) else place / "archive"
            if not isinstance(source, Path):
                await _receive(source, archive)
            await asyncio.to_thread(layout.extract, archive, place / "layout", "the image")
            async with self._changing:
                return await asyncio.to_thread(self._adopt, place / "layout")
        finally:
            await asyncio.to_thread(shutil.rmtree, place)

    def _adopt(self, directory: Path) -> str:
        digest, manifest, _ = layout.find_manifest(directory, "", "the image")
        digests = (digest, *manifest.digests())
        for blob in digests:
            path = layout.blob_path(directory, blob)
            _sync_file(path)
            path.replace(layout.blob_path(self._directory, blob))
        marker = directory / "marker"
        marker.write_bytes(msgspec.json.encode(digests))
        _sync_file(marker)
        marker.replace(self._marker(digest))
        return digest

    def export(self, digest: str) -> Iterator[bytes]:
        """The image as a tar stream for another node's `import_layout`. Raises `NotFound`."""
        blobs = {d: layout.blob_path(self._directory, d) for d in self._digests_of(digest)}
        return layout.stream(digest, blobs)

    async def prepare(self, digest: str) -> Image:
        """The image, unpacked if it is not yet; many may ask at once. `host` is the host's own.

        Raises `NotFound` when it is not here, `Corrupt` when it does not unpack to what it says.
        """
        if digest in self._prepared:
            return self._prepared[digest]
        async with self._locks.setdefault(digest, asyncio.Lock()):
            if digest not in self._prepared:
                work = self._make_host if digest == "host" else self._unpack
                self._prepared[digest] = await asyncio.to_thread(work, digest)
        self._locks.pop(digest, None)
        return self._prepared[digest]

    def _make_host(self, digest: str) -> Image:
        return host.make_image(self._directory / "host", self._directory / "incoming")

    def _unpack(self, digest: str) -> Image:
        blobs = self._digests_of(digest)
        final = self._directory / "trees" / digest.removeprefix("sha256:")
        config = oci.parse_config(self._blob(blobs[1]).read_bytes())
        if not final.exists():
            place = Path(tempfile.mkdtemp(dir=self._directory / "incoming"))
            try:
                self._unpack_into(place / "rootfs", digest, config)
                _sync_file_system(place)
                place.rename(final)
            except BaseException:
                shutil.rmtree(place)
                raise
        return oci.make_image(digest, final / "rootfs", config)

    def _unpack_into(self, tree: Path, digest: str, config: oci.Config) -> None:
        tree.mkdir()
        tree.chmod(0o755)
        manifest = oci.parse_manifest(self._blob(digest).read_bytes())
        for layer, diff_id in zip(manifest.layers, config.rootfs.diff_ids, strict=True):
            unpack(self._blob(layer.digest), diff_id, tree)

    async def remove(self, digest: str) -> None:
        """Forget an image: its tree and the blobs no other image needs. Unknown ones are fine.

        Instances that run from it keep their files; drivers hold them.
        """
        async with self._changing:
            if self.has(digest):
                self._prepared.pop(digest, None)
                await asyncio.to_thread(self._remove, digest)

    def _remove(self, digest: str) -> None:
        gone = set(self._digests_of(digest))
        self._marker(digest).unlink()
        for other in self.digests():
            gone -= set(self._digests_of(other))
        for blob in gone:
            self._blob(blob).unlink(missing_ok=True)
        tree = self._directory / "trees" / digest.removeprefix("sha256:")
        if tree.exists():
            place = Path(tempfile.mkdtemp(dir=self._directory / "incoming"))
            tree.rename(place / "tree")
            shutil.rmtree(place)

    def _marker(self, digest: str) -> Path:
        return self._directory / "images" / oci.check_digest(digest).removeprefix("sha256:")

    def _blob(self, digest: str) -> Path:
        return layout.blob_path(self._directory, digest)

    def _digests_of(self, digest: str) -> list[str]:
        """What the image consists of: its manifest, its configuration, its layers."""
        if not self.has(digest):
            raise NotFound(f"image {digest} is not in this node's store: deploy its app again")
        return msgspec.json.decode(self._marker(digest).read_bytes(), type=list[str])


class _Hashing:
    """A stream that hashes what is read from it."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._hash = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size)
        self._hash.update(data)
        return data

    def digest(self) -> str:
        """Of the whole stream, whose rest is read for it."""
        while self.read(CHUNK_BYTES):
            pass
        return f"sha256:{self._hash.hexdigest()}"


def unpack(blob: Path, diff_id: str, tree: Path) -> None:
    """Apply a layer's blob to `tree`. Raises `Corrupt` when it is not what `diff_id` says.

    Whether it is compressed is seen from its first bytes: skopeo, for one, may name it wrongly.
    """
    with blob.open("rb") as raw:
        opener = gzip.open if raw.read(2) == GZIP_MAGIC else open
    with opener(blob, "rb") as file:
        source = _Hashing(file)  # type: ignore[arg-type]
        try:
            rootfs.unpack_layer(source, tree)  # type: ignore[arg-type]
            found = source.digest()
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise Corrupt(f"layer {diff_id} is not compressed as it says: {error}") from error
    if found != diff_id:
        raise Corrupt(f"a layer unpacks to {found}, not to {diff_id}: make the image again")


async def _receive(source: AsyncIterable[bytes], archive: Path) -> None:
    with archive.open("wb") as file:
        async for data in source:
            await asyncio.to_thread(file.write, data)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_file_system(path: Path) -> None:
    """Everything below is on disk before it gets its final name: one call for all its files."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _libc.syncfs(directory) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(directory)
