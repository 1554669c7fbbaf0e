"""An OCI layout on disk and as a tar stream, the form in which images travel.

A stream has `oci-layout`, `index.json` and the blobs. Taking one apart trusts nothing: only those
names are read, and each blob must have the digest of its name.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from tabane.errors import Corrupt, UsageError
from tabane.images import oci

CHUNK_BYTES = 1 << 20


def blob_path(layout: Path, digest: str) -> Path:
    return layout / "blobs/sha256" / oci.check_digest(digest).removeprefix("sha256:")


def read_document(path: Path, what: str) -> bytes:
    """A small JSON file. Raises `Corrupt` when it is missing or too large to be one."""
    try:
        if path.stat().st_size > oci.MOST_DOCUMENT_BYTES:
            raise Corrupt(f"{what} is larger than {oci.MOST_DOCUMENT_BYTES >> 20} MiB")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise Corrupt(f"{what} is missing ({path})") from None


def find_manifest(layout: Path, tag: str, where: str) -> tuple[str, oci.Manifest, oci.Config]:
    """The one image of a layout directory that runs here, checked but for its layers' digests.

    Raises `UsageError` (nothing that fits) or `Corrupt` (missing, truncated), naming `where`.
    """

    def read(digest: str) -> bytes:
        return read_document(blob_path(layout, digest), f"{where}: blob {digest}")

    index = oci.parse_index(read_document(layout / "index.json", f"{where}: index.json"))
    digest = oci.pick(index, read, tag, where)
    manifest = oci.parse_manifest(read(digest))
    config = oci.parse_config(read(manifest.config.digest))
    oci.check(manifest, config, where)
    for descriptor in (manifest.config, *manifest.layers):
        check_size(blob_path(layout, descriptor.digest), descriptor, where)
    return digest, manifest, config


def check_size(path: Path, descriptor: oci.Descriptor, where: str) -> None:
    """Raises `Corrupt` for a blob that is not there, or not as long as it is said to be (a size of
    -1 says nothing)."""
    size = path.stat().st_size if path.exists() else None
    if size is None or size != descriptor.size >= 0:
        problem = "is missing" if size is None else f"has {size} of {descriptor.size} bytes"
        raise Corrupt(f"{where}: blob {descriptor.digest} {problem}: make the image again")


def stream(digest: str, blobs: Mapping[str, Path]) -> Iterator[bytes]:
    """The image whose manifest is `digest` as a tar stream, in chunks. `blobs` includes it."""
    manifest = oci.Descriptor(oci.MANIFEST, digest, blobs[digest].stat().st_size)
    index = oci.encode(oci.Index((manifest,)))
    for name, data in (("oci-layout", oci.LAYOUT), ("index.json", index)):
        yield from _member(name, len(data), io.BytesIO(data))
    for blob, path in blobs.items():
        with path.open("rb") as file:
            name = f"blobs/sha256/{blob.removeprefix('sha256:')}"
            yield from _member(name, os.fstat(file.fileno()).st_size, file)
    yield tarfile.NUL * (2 * tarfile.BLOCKSIZE)


def _member(name: str, size: int, file: IO[bytes]) -> Iterator[bytes]:
    info = tarfile.TarInfo(name)
    info.size = size
    yield info.tobuf()
    while data := file.read(CHUNK_BYTES):
        yield data
    yield tarfile.NUL * (-size % tarfile.BLOCKSIZE)


def extract(archive: Path, layout: Path, where: str) -> set[str]:
    """Take a layout's tar apart into the directory `layout`, verifying each blob; returns their
    digests.

    Raises `Corrupt` for a blob that is not what its name says, or an archive that breaks off, and
    `UsageError` for one that is no layout.
    """
    (layout / "blobs/sha256").mkdir(parents=True, exist_ok=True)
    found: set[str] = set()
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                found |= _extract_member(tar, member, layout, where)
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise Corrupt(f"{where} is no tar archive, or is cut off: make it again") from error
    if not (layout / "index.json").exists():
        raise UsageError(f"{where} is not an OCI image archive: it has no index.json")
    return found


def _extract_member(
    tar: tarfile.TarFile, member: tarfile.TarInfo, layout: Path, where: str
) -> set[str]:
    name = member.name.removeprefix("./")
    file = tar.extractfile(member) if member.isreg() else None
    if file is None:
        return set()
    if name == "index.json":
        (layout / name).write_bytes(file.read(oci.MOST_DOCUMENT_BYTES))
    elif name.startswith("blobs/sha256/"):
        digest = oci.check_digest(f"sha256:{name.removeprefix('blobs/sha256/')}")
        if copy_verified(file, blob_path(layout, digest)) != digest:
            raise Corrupt(f"{where}: blob {digest} is not what its name says: make it again")
        return {digest}
    return set()


def copy_verified(source: IO[bytes], target: Path) -> str:
    """Copy to `target` and return the digest of what was copied."""
    hashed = hashlib.sha256()
    with target.open("wb") as file:
        while data := source.read(CHUNK_BYTES):
            hashed.update(data)
            file.write(data)
    return f"sha256:{hashed.hexdigest()}"
