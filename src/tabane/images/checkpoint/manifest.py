"""What a checkpoint is: who it is of, what a restore of it needs, and which bytes it consists of.
Pure.

The files that a dump left are one *stream*: small ones end to end, each large one from the start of
a window, so that the same memory in two checkpoints gives the same windows. A window that is all
zeros is a hole; any other is a chunk, named by the SHA-256 of its bytes. The manifest names them
all, so its own digest, which is the checkpoint's, is a hash of the whole.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import PurePosixPath
from typing import NamedTuple

import msgspec

from tabane.errors import Corrupt
from tabane.model import AppName, Class, InstanceId, Trust, Value

FORMAT = 1
WINDOW_BYTES = 256 << 10
"""See docs/decisions/checkpoint-store.md for what other sizes give."""
MAX_WINDOW_BYTES = 1 << 20
"""In a manifest that somebody else has made."""
HOLE = ""
"""In place of the digest of a window that is all zeros."""
DIGEST = re.compile("[0-9a-f]{64}")
MAX_MANIFEST_BYTES = 64 << 20


class Kept(Value, frozen=True, omit_defaults=True):
    """What else is remembered of an instance that was put away: it goes on under its own name.
    `counter`: of its generation."""

    counter: int = 1
    created_at: float = 0.0
    trust: Trust | None = None


class About(Value, frozen=True, omit_defaults=True):
    """Who a checkpoint is of, and what a restore of it needs; what is empty there needs nothing.

    `isolation` is its class; `images`: of all its containers, as in `App.images`; `id_base`: of the
    app's id range, whose ids the saved state has; `machine`: as `uname -m` says; `cpu_vendor` and
    `cpu_flags` (names with blanks between): what the program may have seen of the processor, if it
    has; `kernel`: the release, when the kernel's state is part of it; `versions`: of the engines
    (`runc`, `criu`, ...); `instance`: that was dumped; `kept`: it was put away, and nobody else
    begins from here.
    """

    app: AppName
    revision: int
    driver: str
    isolation: Class
    images: tuple[str, ...] = ()
    id_base: int = 0
    machine: str = ""
    cpu_vendor: str = ""
    cpu_flags: str = ""
    kernel: str = ""
    versions: dict[str, str] = msgspec.field(default_factory=dict)
    instance: InstanceId = InstanceId("")
    kept: Kept | None = None


class File(Value, frozen=True):
    """A file of `size` bytes, which begins at `offset` of the stream."""

    path: str
    size: int
    offset: int


class Manifest(Value, frozen=True):
    """`bytes`: of all files; `memory_bytes`: what they take in memory at the most, without holes;
    `files` in the stream's order; `chunks`: each window's digest, or `HOLE`."""

    about: About
    made_at: float
    bytes: int
    memory_bytes: int
    directories: tuple[str, ...]
    files: tuple[File, ...]
    chunks: tuple[str, ...]
    window_bytes: int = WINDOW_BYTES
    format: int = FORMAT


class Stored(Value, frozen=True):
    """A checkpoint that is here. `bytes`, `memory_bytes`: as of its manifest; `disk_bytes`: of its
    chunks, some of which it may share, and its manifest; `used_at`: when it was last opened, or
    made."""

    digest: str
    about: About
    made_at: float
    bytes: int
    memory_bytes: int
    disk_bytes: int
    used_at: float


class Piece(NamedTuple):
    """Where a part of a file is in its window."""

    path: str
    file_offset: int
    window_offset: int
    size: int


class Stream:
    """Files laid end to end, and cut in windows."""

    def __init__(self, files: Iterable[File], window_bytes: int = WINDOW_BYTES) -> None:
        self.files = tuple(sorted(files, key=lambda file: file.offset))
        self._window_bytes = window_bytes
        self._filled = [file for file in self.files if file.size]
        self._offsets = [file.offset for file in self._filled]

    @property
    def bytes(self) -> int:
        """Of its length, with what is between files."""
        last = self._filled[-1] if self._filled else None
        return last.offset + last.size if last is not None else 0

    @property
    def windows(self) -> int:
        """How many there are."""
        return -(-self.bytes // self._window_bytes)

    def window_size(self, window: int) -> int:
        """The last may be shorter than the others."""
        return min(self._window_bytes, self.bytes - window * self._window_bytes)

    def pieces(self, window: int) -> Iterator[Piece]:
        """What of which file a window has, in order."""
        start = window * self._window_bytes
        end = start + self.window_size(window)
        first = max(0, bisect_right(self._offsets, start) - 1)
        for file in self._filled[first:]:
            if file.offset >= end:
                break
            begin, stop = max(start, file.offset), min(end, file.offset + file.size)
            if begin < stop:
                yield Piece(file.path, begin - file.offset, begin - start, stop - begin)


def lay_out(sizes: Mapping[str, int], window_bytes: int = WINDOW_BYTES) -> Stream:
    """A stream of files with these sizes."""
    files, offset = [], 0
    for path in sorted(sizes, key=lambda path: (sizes[path] >= window_bytes, path)):
        if sizes[path] >= window_bytes:
            offset = -(-offset // window_bytes) * window_bytes
        files.append(File(path, sizes[path], offset))
        offset += sizes[path]
    return Stream(files, window_bytes)


def make_manifest(
    about: About, made_at: float, directories: Iterable[str], stream: Stream, chunks: Iterable[str]
) -> Manifest:
    chunks = tuple(chunks)
    kept = (stream.window_size(n) for n, digest in enumerate(chunks) if digest != HOLE)
    size = sum(file.size for file in stream.files)
    return Manifest(about, made_at, size, sum(kept), tuple(directories), stream.files, chunks)


def stream_of(manifest: Manifest) -> Stream:
    return Stream(manifest.files, manifest.window_bytes)


def encode_manifest(manifest: Manifest) -> tuple[str, bytes]:
    """Its digest (`sha256:...`), which is the checkpoint's, and its JSON."""
    data = msgspec.json.encode(manifest, order="deterministic")
    return f"sha256:{hashlib.sha256(data).hexdigest()}", data


def parse_manifest(data: bytes) -> Manifest:
    """Raises `Corrupt` for what is none, or leads out of its directory."""
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Corrupt(f"its manifest cannot be read ({error})") from None
    if manifest.format != FORMAT:
        raise Corrupt(f"its manifest has format {manifest.format}, and {FORMAT} is known here")
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    if not 0 < manifest.window_bytes <= MAX_WINDOW_BYTES:
        raise Corrupt(f"its manifest has windows of {manifest.window_bytes} bytes")
    paths = (*manifest.directories, *(file.path for file in manifest.files))
    for path in paths:
        if not is_inside(path):
            raise Corrupt(f"its manifest names {path!r}, which leads out of it")
    if len({*paths}) < len(paths):
        raise Corrupt("its manifest has two files of one name")
    stream = stream_of(manifest)
    filled = [file for file in stream.files if file.size]
    overlap = any(one.offset + one.size > two.offset for one, two in pairwise(filled))
    if overlap or any(file.size < 0 or file.offset < 0 for file in stream.files):
        raise Corrupt("its manifest has files on top of each other")
    if stream.windows != len(manifest.chunks):
        raise Corrupt(f"its manifest has {len(manifest.chunks)} of {stream.windows} chunks")
    if not all(digest == HOLE or DIGEST.fullmatch(digest) for digest in manifest.chunks):
        raise Corrupt("its manifest names a chunk by what is no digest")


def is_inside(path: str) -> bool:
    """Whether a path below a directory stays there, and is written in one way only."""
    parts = PurePosixPath(path).parts
    is_plain = bool(parts) and path == "/".join(parts) and "\0" not in path
    return is_plain and not {"..", "/"} & {*parts}
