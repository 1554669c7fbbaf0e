"""A layer's blob into a tree: decompressed, unpacked, and compared with what it should be."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tabane.errors import Corrupt
from tabane.images import rootfs
from tabane.images.rootfs import Spend

CHUNK_BYTES = 1 << 20
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
"""RFC 8878, 3.1.1."""


class Hashing:
    """A stream that hashes what is read from it."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._hash = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._source.read(size)
        self._hash.update(data)
        return data

    def digest(self) -> str:
        """Of the whole stream, whose rest is read for it."""
        while self.read(CHUNK_BYTES):
            pass
        return f"sha256:{self._hash.hexdigest()}"


def unpack(blob: Path, diff_id: str, tree: Path, spend: Spend = lambda size: None) -> None:
    """Apply a layer's blob to `tree`; `spend` as of `rootfs.unpack_layer`. Raises `Corrupt` when it
    is not what `diff_id` says.
    """
    with blob.open("rb") as raw, _reading(raw, diff_id) as plain:
        source = Hashing(plain)
        rootfs.unpack_layer(source, tree, spend)  # type: ignore[arg-type]
        found = source.digest()
    if found != diff_id:
        raise Corrupt(f"a layer unpacks to {found}, not to {diff_id}: make the image again")


@contextmanager
def _reading(raw: IO[bytes], diff_id: str) -> Iterator[Any]:
    """What a layer says. Whether it is compressed is seen from its first bytes: skopeo, for one,
    may name it wrongly."""
    magic = raw.read(4)
    raw.seek(0)
    if magic == ZSTD_MAGIC:
        with _unzstd(raw, diff_id) as plain:
            yield plain
        return
    try:
        yield gzip.GzipFile(fileobj=raw) if magic.startswith(GZIP_MAGIC) else raw
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise Corrupt(f"layer {diff_id} is not compressed as it says: {error}") from error


@contextmanager
def _unzstd(raw: IO[bytes], diff_id: str) -> Iterator[Any]:
    from zstandard import ZstdDecompressor, ZstdError

    try:
        yield ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False)
    except ZstdError as error:
        raise Corrupt(f"layer {diff_id} is not compressed as it says: {error}") from error
