"""The kernel's FUSE protocol, as far as a file system of small read-only files needs it.

Bytes to values and values to bytes; include/uapi/linux/fuse.h has the layouts. Three things in it
make reading fast, and are why this is not left to a library:

- READDIRPLUS: a listing brings the attributes of what it names, so no look-up follows for each.
- OPEN is answered with ENOSYS, once: from then on the kernel opens and closes files by itself
  (FUSE_NO_OPEN_SUPPORT), and keeps their pages.
- AUTO_INVAL_DATA with real sizes and times: the kernel reads a file again only when its attributes,
  which it asks for when they are no longer valid, say that it has changed.
"""

from __future__ import annotations

import errno
import stat
import struct
from typing import NamedTuple

ROOT = 1
BUFFER_BYTES = 1 << 13
"""For a request: the least that the kernel takes."""
MAX_WRITE = 4096
MAX_PAGES = 32
"""In one answer, a part of a listing too."""

LOOKUP, FORGET, GETATTR, READLINK = 1, 2, 3, 5
READ, STATFS, INIT, OPENDIR, RELEASEDIR = 15, 17, 26, 27, 29
INTERRUPT, DESTROY = 36, 38
BATCH_FORGET, READDIRPLUS = 42, 44
SILENT = frozenset({FORGET, BATCH_FORGET, INTERRUPT, DESTROY})
"""Nobody waits for an answer to these."""

_INVAL_INODE, _INVAL_ENTRY = 2, 3
_VERSION = (7, 31)
_FLAGS = 1 << 0 | 1 << 12 | 1 << 13 | 1 << 18 | 1 << 22
"""ASYNC_READ, AUTO_INVAL_DATA, DO_READDIRPLUS, PARALLEL_DIROPS, MAX_PAGES."""

_HEAD = struct.Struct("<IIQQIIIHH")
_ANSWER = struct.Struct("<IiQ")
_ATTR = struct.Struct("<6Q10I")
_ENTRY = struct.Struct("<4Q2I6Q10I")
_ATTR_OUT = struct.Struct("<QII")
_DIRENT = struct.Struct("<QQII")
_READ = struct.Struct("<QQI")
_INIT_IN = struct.Struct("<4I")
_INIT_OUT = struct.Struct("<4I2H2I2HI28x")
_INVAL = struct.Struct("<QII")
_CHANGED = struct.Struct("<Qqq")
_STATFS = struct.Struct("<5Q3I28x")
_NS = 1_000_000_000

FOREVER_S = 1 << 31


class Request(NamedTuple):
    """What the kernel asks. `body` is what follows the header."""

    opcode: int
    unique: int
    node: int
    uid: int
    gid: int
    pid: int
    body: bytes

    @property
    def name(self) -> bytes:
        """Of LOOKUP."""
        return self.body.rstrip(b"\0")

    @property
    def span(self) -> tuple[int, int, int]:
        """Of READ and READDIRPLUS: the handle, where, and how much at most."""
        return _READ.unpack_from(self.body)


class Attributes(NamedTuple):
    """Of a file. `valid_s`: how long the kernel may believe them."""

    node: int
    mode: int
    size: int = 0
    uid: int = 0
    gid: int = 0
    changed_ns: int = 0
    valid_s: float = 0.0
    links: int = 1


def parse_request(data: bytes) -> Request:
    length, opcode, unique, node, uid, gid, pid, _, _ = _HEAD.unpack_from(data)
    return Request(opcode, unique, node, uid, gid, pid, data[_HEAD.size : length])


def encode_answer(unique: int, body: bytes = b"") -> bytes:
    return _ANSWER.pack(_ANSWER.size + len(body), 0, unique) + body


def encode_error(unique: int, number: int) -> bytes:
    """`number` as in errno."""
    return _ANSWER.pack(_ANSWER.size, -number, unique)


def encode_init(request: Request) -> bytes:
    """Agree on the protocol; EPROTO for a kernel that is too old for it (before 5.4)."""
    major, minor, readahead, offered = _INIT_IN.unpack_from(request.body)
    if (major, minor) < _VERSION:
        return encode_error(request.unique, errno.EPROTO)
    flags = _FLAGS & offered
    body = _INIT_OUT.pack(*_VERSION, readahead, flags, 16, 12, MAX_WRITE, 1, MAX_PAGES, 0, 0)
    return encode_answer(request.unique, body)


def encode_attributes(attributes: Attributes) -> bytes:
    """The body of GETATTR's answer."""
    seconds, nanoseconds = _split(attributes.valid_s)
    return _ATTR_OUT.pack(seconds, nanoseconds, 0) + _ATTR.pack(*_fields(attributes))


def encode_entry(attributes: Attributes, name_valid_s: float | None = None) -> bytes:
    """The body of LOOKUP's answer. The name is good for as long as the attributes, unless told."""
    valid, valid_ns = _split(attributes.valid_s)
    name, name_ns = (valid, valid_ns) if name_valid_s is None else _split(name_valid_s)
    head = (attributes.node, 0, name, valid, name_ns, valid_ns)
    return _ENTRY.pack(*head, *_fields(attributes))


def encode_listed(offset: int, name: bytes, attributes: Attributes) -> bytes:
    """One entry of READDIRPLUS; `offset` is where the next one begins."""
    kind = stat.S_IFMT(attributes.mode) >> 12
    entry = encode_entry(attributes) + _DIRENT.pack(attributes.node, offset, len(name), kind) + name
    return entry + bytes(-len(entry) % 8)


def encode_handle(handle: int) -> bytes:
    """The body of OPENDIR's answer."""
    return struct.pack("<QII", handle, 0, 0)


def encode_statfs() -> bytes:
    return _STATFS.pack(0, 0, 0, 0, 0, 4096, 255, 4096)


def encode_changed(node: int) -> bytes:
    """Tells the kernel that a file's contents and attributes are others now. Never to be written by
    whoever answers requests: it waits for those that are under way."""
    return _ANSWER.pack(_ANSWER.size + _CHANGED.size, _INVAL_INODE, 0) + _CHANGED.pack(node, 0, 0)


def encode_invalid(parent: int, name: bytes) -> bytes:
    """Tells the kernel to forget a name, and all below it. The same holds for it."""
    body = _INVAL.pack(parent, len(name), 0) + name + b"\0"
    return _ANSWER.pack(_ANSWER.size + len(body), _INVAL_ENTRY, 0) + body


def _fields(attributes: Attributes) -> tuple[int, ...]:
    node, mode, size, uid, gid, changed_ns, _, links = attributes
    at, ns = divmod(changed_ns, _NS)
    return (node, size, -(-size // 512), at, at, at, ns, ns, ns, mode, links, uid, gid, 0, 4096, 0)


def _split(seconds: float) -> tuple[int, int]:
    whole = int(seconds)
    return whole, int((seconds - whole) * _NS)


ABSENCE = encode_entry(Attributes(0, 0), FOREVER_S)
"""The body of LOOKUP's answer for what is not there and never will be."""
