"""What a solo5 unikernel says of itself, from the notes in its ELF file. Pure.

`ABI1` names the tender it is for, `MFT1` the devices that it must be given (solo5's elf_abi.h and
mft_abi.h). A note's content is aligned as in C, so the manifest, which has 64-bit numbers, begins
four bytes after its header's end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from tabane.errors import UsageError
from tabane.model import Value

OWNER = b"Solo5\0"
ABI, MANIFEST = 0x31494241, 0x3154464D
"""Types of notes: `ABI1`, `MFT1`."""
TARGETS = {1: "hvt", 2: "spt", 3: "virtio", 4: "muen", 5: "genode", 6: "xen"}
BLOCK, NET, RESERVED = 1, 2, 1 << 30
MANIFEST_VERSION = 1
MOST_ENTRIES = 64

_ELF_64 = b"\x7fELF\x02\x01"
_MACHINES = {0x3E: "x86_64", 0xB7: "aarch64"}
_PT_NOTE = 4
_HEADER = struct.Struct("<16xHH12xQ14xHH")
"""Type, machine, where the program headers are, their size and number."""
_SEGMENT = struct.Struct("<I4xQ16xQ")
"""Of a program header: type, offset, size in the file."""
_NOTE = struct.Struct("<III")
_ENTRY = struct.Struct("<68sI16s8sB7x")
_COUNTS = struct.Struct("<II")


class Device(Value, frozen=True):
    """`kind`: `net` or `block`."""

    name: str
    kind: str


class Unikernel(Value, frozen=True):
    target: str
    """The tender it is for: `hvt`, `spt`, ..."""
    abi_version: int
    machine: str
    devices: tuple[Device, ...]


def parse_unikernel(data: bytes) -> Unikernel:
    """Raises `UsageError` when it is no solo5 unikernel, or what it says cannot be."""
    if not data.startswith(_ELF_64):
        raise UsageError("it is no 64-bit ELF file, so no solo5 unikernel")
    try:
        machine = _HEADER.unpack_from(data)[1]
        notes = {kind: content for segment in _segments(data) for kind, content in _notes(segment)}
    except (struct.error, OverflowError):
        raise UsageError("its ELF file is broken off: build it again") from None
    for kind, name in ((ABI, "ABI1"), (MANIFEST, "MFT1")):
        if kind not in notes:
            raise UsageError(f"it has no {name} note of solo5: build it with solo5 0.6 or newer")
    if len(notes[ABI]) < 8:
        raise UsageError("its ABI1 note is too short")
    target, version = _COUNTS.unpack_from(notes[ABI])
    devices = tuple(_devices(notes[MANIFEST]))
    name, known = TARGETS.get(target, str(target)), _MACHINES.get(machine, hex(machine))
    return Unikernel(name, version, known, devices)


def _segments(data: bytes) -> Iterator[bytes]:
    _, _, place, size, count = _HEADER.unpack_from(data)
    for number in range(count):
        kind, offset, length = _SEGMENT.unpack_from(data, place + number * size)
        if kind == _PT_NOTE:
            if offset + length > len(data):
                raise struct.error
            yield data[offset : offset + length]


def _notes(segment: bytes) -> Iterator[tuple[int, bytes]]:
    """Those of solo5, with their types."""
    at = 0
    while at + _NOTE.size <= len(segment):
        name_size, size, kind = _NOTE.unpack_from(segment, at)
        name = segment[at + _NOTE.size :][:name_size]
        begin = at + _NOTE.size + _padded(name_size)
        if begin + size > len(segment):
            raise struct.error
        if name == OWNER:
            yield kind, segment[begin : begin + size]
        at = begin + _padded(size)


def _padded(size: int) -> int:
    return (size + 3) & ~3


def _devices(note: bytes) -> Iterator[Device]:
    """Of a manifest, with its padding; the first entry is reserved, and says nothing."""
    content = note[4:]
    if len(content) < _COUNTS.size:
        raise UsageError("its manifest is too short")
    version, count = _COUNTS.unpack_from(content)
    if version != MANIFEST_VERSION:
        raise UsageError(f"its manifest is of version {version}, {MANIFEST_VERSION} is known here")
    if not 1 <= count <= MOST_ENTRIES or len(content) != _COUNTS.size + count * _ENTRY.size:
        raise UsageError(f"its manifest of {len(content)} bytes cannot have {count} entries")
    for number in range(count):
        entry = _ENTRY.unpack_from(content, _COUNTS.size + number * _ENTRY.size)
        device = _device(number, *entry)
        if device is not None:
            yield device


def _device(
    number: int, name: bytes, kind: int, settings: bytes, host: bytes, attached: int
) -> Device | None:
    text = name.partition(b"\0")[0].decode("latin-1")
    if any(settings) or any(host) or attached:
        raise UsageError(f"entry {number} of its manifest is filled in already")
    if kind == RESERVED and number == 0 and not text:
        return None
    if kind not in (BLOCK, NET) or number == 0:
        raise UsageError(f"entry {number} of its manifest is of an unknown type, {kind}")
    if not (text.isascii() and text.isalnum()):
        raise UsageError(f"entry {number} of its manifest has no proper name: {text!r}")
    return Device(text, "net" if kind == NET else "block")
