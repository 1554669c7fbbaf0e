"""Solo5 unikernels for tests: ELF files with the notes that a real one has, and no code."""

from __future__ import annotations

import struct

ABI, MANIFEST = 0x31494241, 0x3154464D
RESERVED = 1 << 30
KINDS = {"block": 1, "net": 2}


def make_entry(name: str, kind: int, settings: bytes = bytes(16)) -> bytes:
    return struct.pack("<68sI16s8sB7x", name.encode(), kind, settings, bytes(8), 0)


def make_manifest(*entries: bytes, version: int = 1) -> bytes:
    return bytes(4) + struct.pack("<II", version, len(entries)) + b"".join(entries)


def make_note(kind: int, content: bytes) -> bytes:
    padding = bytes(-len(content) % 4)
    return struct.pack("<III8s", 6, len(content), kind, b"Solo5") + content + padding


def make_elf(*notes: bytes, machine: int = 0x3E) -> bytes:
    """With a segment of notes for each."""
    place = 64 + 56 * len(notes)
    headers, offset = b"", place
    for note in notes:
        headers += struct.pack("<IIQQQQQQ", 4, 4, offset, 0, 0, len(note), len(note), 4)
        offset += len(note)
    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    numbers = (2, machine, 1, 0x100000, 64, 0, 0, 64, 56, len(notes), 0, 0, 0)
    return identity + struct.pack("<HHIQQQIHHHHHH", *numbers) + headers + b"".join(notes)


def make_unikernel(*devices: tuple[str, str], target: int = 2, machine: int = 0x3E) -> bytes:
    """For `spt`, unless told, with devices of (name, kind)."""
    entries = (make_entry(name, KINDS[kind]) for name, kind in devices)
    manifest = make_manifest(make_entry("", RESERVED), *entries)
    abi = struct.pack("<IIII", target, 2, 0, 0)
    return make_elf(make_note(ABI, abi), make_note(MANIFEST, manifest), machine=machine)
