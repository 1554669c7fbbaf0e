"""CRIU's images, as far as they are changed here: pure, bytes to bytes.

An image file is two magic numbers (the inventory: one), then entries: a length (32 bits,
little-endian) and so many bytes of a protocol buffer (images/*.proto of CRIU). Of each process,
`ids-N.img` says which namespaces it has, by numbers that count within the dump, and `inventory.img`
which ones the dumper had. Those with the dumper's number are not made by a restore, but are the
restorer's own. `core-N.img`, of a thread, has a number for its cgroups, too, which a restore that
is to leave them alone moves threads into all the same, unless it is not there.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from tabane.errors import Corrupt

HEADER_BYTES, INVENTORY_HEADER_BYTES = 8, 4
ROOT_IDS = 3
"""Field of the inventory: the dumper's."""
UTS, USER, CGROUP, TIME = 8, 10, 11, 12
"""Fields of the ids: namespaces, those that `stage.c` makes or enters."""
MADE_BEFORE = (UTS, USER, CGROUP, TIME)
PIPES_DATA = "pipes-data.img"
PIPE_ID, PIPE_BYTES = 1, 2
"""Fields of what was in a pipe; after each entry come so many bytes of it."""
THREAD_CORE, CG_SET = 5, 16
"""Fields of the core, and of what it has of the thread."""
_LENGTH = struct.Struct("<I")
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

Field = tuple[int, int, int | bytes]
"""Number, wire type, value."""


def stay(directory: Path) -> None:
    """Have a restore from `directory` stay in the cgroups of who restores, and in the namespaces
    that are `MADE_BEFORE`. Raises `Corrupt` when the images are not whole."""
    inventory = next(_entries(directory / "inventory.img", INVENTORY_HEADER_BYTES), b"")
    roots = [value for number, _, value in _fields(inventory) if number == ROOT_IDS]
    if not roots or not isinstance(roots[0], bytes):
        raise Corrupt(f"{directory}/inventory.img names no namespaces")
    dumpers = {number: value for number, _, value in _fields(roots[0])}

    def adopt(entry: bytes) -> bytes:
        fields = (
            (number, kind, dumpers.get(number, value) if number in MADE_BEFORE else value)
            for number, kind, value in _fields(entry)
        )
        return b"".join(_encode(*field) for field in fields)

    for path in directory.glob("ids-*.img"):
        _rewrite(path, adopt)
    for path in directory.glob("core-*.img"):
        _rewrite(path, _without_cgroups)


def forget_unread(directory: Path, outputs: Collection[str]) -> None:
    """Drop what was in the pipes named in `outputs` (as `pipe:[1234]`) and not yet read: its reader
    has it, and no copy is to say it once more. Raises `Corrupt`."""
    path = directory / PIPES_DATA
    if not path.exists():
        return
    data = path.read_bytes()
    kept, at = data[:HEADER_BYTES], HEADER_BYTES
    while at < len(data):
        entry, after = _entry(path, data, at)
        numbers = {field: value for field, _, value in _fields(entry) if isinstance(value, int)}
        end = after + numbers.get(PIPE_BYTES, 0)
        if end > len(data):
            raise Corrupt(f"{path} is cut off")
        if f"pipe:[{numbers.get(PIPE_ID)}]" not in outputs:
            kept += data[at:end]
        at = end
    path.write_bytes(kept)


def _without_cgroups(core: bytes) -> bytes:
    def change(number: int, kind: int, value: int | bytes) -> bytes:
        if number == THREAD_CORE and isinstance(value, bytes):
            value = b"".join(_encode(*field) for field in _fields(value) if field[0] != CG_SET)
        return _encode(number, kind, value)

    return b"".join(change(*field) for field in _fields(core))


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    entries = [change(entry) for entry in _entries(path)]
    body = b"".join(_LENGTH.pack(len(entry)) + entry for entry in entries)
    path.write_bytes(path.read_bytes()[:HEADER_BYTES] + body)


def _entries(path: Path, header_bytes: int = HEADER_BYTES) -> Iterator[bytes]:
    data, at = path.read_bytes(), header_bytes
    while at < len(data):
        entry, at = _entry(path, data, at)
        yield entry


def _entry(path: Path, data: bytes, at: int) -> tuple[bytes, int]:
    """That which begins at `at`, and where it ends."""
    try:
        (size,) = _LENGTH.unpack_from(data, at)
    except struct.error:
        raise Corrupt(f"{path} is cut off") from None
    at += _LENGTH.size
    if at + size > len(data):
        raise Corrupt(f"{path} is cut off")
    return data[at : at + size], at + size


def _fields(message: bytes) -> Iterator[Field]:
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(message, at)
            yield number, kind, value
            continue
        if kind == BYTES:
            size, at = _varint(message, at)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise Corrupt(f"an image has a field of kind {kind}, which is unknown")
        if at + size > len(message):
            raise Corrupt("an image has a field that is cut off")
        yield number, kind, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message):
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise Corrupt("an image has a number that is cut off")


def _encode(number: int, kind: int, value: int | bytes) -> bytes:
    key = _encode_varint(number << 3 | kind)
    if isinstance(value, int):
        return key + _encode_varint(value)
    return key + (_encode_varint(len(value)) if kind == BYTES else b"") + value


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
