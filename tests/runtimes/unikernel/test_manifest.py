"""What is read of solo5 unikernels, whole, broken off and arbitrary."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.errors import UsageError
from tabane.runtimes.unikernel.manifest import Device, Unikernel, parse_unikernel
from tabane.testing.solo5 import (
    ABI,
    MANIFEST,
    RESERVED,
    make_elf,
    make_entry,
    make_manifest,
    make_note,
    make_unikernel,
)

WHOLE = make_unikernel(("service", "net"), ("data", "block"))
FIRST = make_entry("", RESERVED)
SPT = make_note(ABI, struct.pack("<IIII", 2, 2, 0, 0))


def test_a_unikernel() -> None:
    devices = (Device("service", "net"), Device("data", "block"))
    assert parse_unikernel(WHOLE) == Unikernel("spt", 2, "x86_64", devices)
    other = make_unikernel(target=1, machine=0xB7)
    assert parse_unikernel(other) == Unikernel("hvt", 2, "aarch64", ())


def test_broken_off_anywhere() -> None:
    for size in range(len(WHOLE)):
        with pytest.raises(UsageError):
            parse_unikernel(WHOLE[:size])


def test_headers_beyond_all_files() -> None:
    with pytest.raises(UsageError, match="broken off"):
        parse_unikernel(WHOLE[:32] + b"\xff" * 8 + WHOLE[40:])


@given(st.binary(max_size=300))
def test_arbitrary_bytes(rest: bytes) -> None:
    for begin in (b"", WHOLE[:16], WHOLE[:64]):
        try:
            parse_unikernel(begin + rest)
        except UsageError:
            pass


def elf_with(manifest: bytes) -> bytes:
    return make_elf(SPT, make_note(MANIFEST, manifest))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (make_elf(SPT), "no MFT1 note"),
        (make_elf(make_note(MANIFEST, make_manifest(FIRST))), "no ABI1 note"),
        (make_elf(make_note(ABI, b""), make_note(MANIFEST, b"")), "ABI1 note is too short"),
        (elf_with(b""), "manifest is too short"),
        (elf_with(make_manifest(FIRST, version=2)), "of version 2"),
        (elf_with(make_manifest()), "cannot have 0 entries"),
        (elf_with(make_manifest(*[FIRST] * 65)), "cannot have 65 entries"),
        (elf_with(make_manifest(FIRST)[:-8]), "cannot have 1 entries"),
        (elf_with(make_manifest(make_entry("x", 1))), "entry 0 .* unknown type, 1"),
        (elf_with(make_manifest(FIRST, make_entry("x", 9))), "entry 1 .* unknown type, 9"),
        (elf_with(make_manifest(FIRST, make_entry("a b", 1))), "no proper name: 'a b'"),
        (elf_with(make_manifest(FIRST, make_entry("", 2))), "no proper name"),
        (elf_with(make_manifest(FIRST, make_entry("x", 2, b"m" * 16))), "filled in already"),
        (b"\x7fELF\x01" + WHOLE[5:], "no 64-bit ELF file"),
    ],
)
def test_what_cannot_be(content: bytes, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parse_unikernel(content)
