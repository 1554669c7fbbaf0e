"""Programs that are images by themselves: how one is recognised by its first bytes. Pure."""

from __future__ import annotations

from tabane.errors import UsageError
from tabane.images import oci

HEAD_BYTES = 20
"""As much of a file as is looked at."""
WASM_MODULE = b"\0asm\x01\0\0\0"
"""WebAssembly Core Specification, 5.5.16."""
WASM_COMPONENT = b"\0asm\x0d\0\x01\0"
"""The component model's binary format, as WASI 0.2 has it."""
ELF_64 = b"\x7fELF\x02\x01"
ELF_MACHINE = slice(18, 20)
X86_64 = b"\x3e\0"
"""System V ABI, chapter 4."""


def platform_of(kind: str, head: bytes, where: str) -> oci.Platform:
    """What a program of this kind, whose first bytes are `head`, is for. Raises `UsageError` when
    it is no such program."""
    if kind == oci.SOLO5:
        if not head.startswith(ELF_64) or head[ELF_MACHINE] != X86_64:
            raise UsageError(f"{where} is no solo5 unikernel: that is an ELF file for x86-64")
        return oci.Platform("amd64", "solo5")
    if head.startswith(WASM_MODULE):
        return oci.Platform("wasm", "wasip1")
    if head.startswith(WASM_COMPONENT):
        return oci.Platform("wasm", "wasip2")
    if head.startswith(WASM_MODULE[:4]):
        version = int.from_bytes(head[4:8], "little")
        raise UsageError(f"{where} is WebAssembly of version {version:#x}: want a module (1)")
    raise UsageError(f"{where} is no WebAssembly module or component: it does not begin as one")
