"""The system calls a container may make: the usual allow list of containers, kept as data.

`seccomp.json` has what every container may call (`allow`), what it may call with certain arguments
(`allow_when`) and what a capability opens (`allow_with`). Everything else fails with ENOSYS, which
programs and C libraries take as "this kernel is older" and work around.

Only the machine's own architecture is listed, so 32-bit programs do not run: engines compile the
list with libseccomp for every container, and each further architecture adds about 8 ms to a wake.
For crun the list is compiled here, once, as a binary tree (0.1 ms instead of 4 for each start).
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from tabane.errors import Unsupported

ENOSYS = 38
ACT_ALLOW = 0x7FFF0000
ACT_ERRNO = 0x00050000
ACT_KILL_PROCESS = 0x80000000
ATTRIBUTE_OPTIMIZE = 8
BINARY_TREE = 2
COMPARE = {"SCMP_CMP_LT": 2, "SCMP_CMP_EQ": 4, "SCMP_CMP_MASKED_EQ": 7}
"""`enum scmp_compare` of seccomp.h, as far as the profile uses it."""
ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}


class _Argument(ctypes.Structure):
    """`struct scmp_arg_cmp` of seccomp.h."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


@cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text())
    return data


@cache
def profile(capabilities: frozenset[str]) -> dict[str, Any]:
    """The OCI `linux.seccomp` object for a container that holds these capabilities."""
    data = _data()
    opened = {name for cap in capabilities for name in data["allow_with"].get(cap, ())}
    rules = [rule for rule in data["allow_when"] if not opened.intersection(rule["names"])]
    allow = [{"names": sorted({*data["allow"], *opened})}, *rules]
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": ENOSYS,
        "architectures": [ARCHITECTURES[platform.machine()]],
        "syscalls": [rule | {"action": "SCMP_ACT_ALLOW"} for rule in allow],
    }


@cache
def compile_filter(capabilities: frozenset[str]) -> bytes:
    """`profile(capabilities)` as a BPF program. Raises `Unsupported` without libseccomp."""
    return compile_rules(profile(capabilities)["syscalls"], ACT_ERRNO | ENOSYS)


def compile_rules(rules: Iterable[dict[str, Any]], otherwise: int) -> bytes:
    """An allow list, as the `syscalls` of an OCI profile, as a BPF program, by libseccomp; all
    else has the action `otherwise`. Raises `Unsupported` without the library."""
    try:
        lib = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        raise Unsupported("libseccomp.so.2 is missing: install libseccomp2") from error
    lib.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(lib.seccomp_init(ctypes.c_uint32(otherwise)))
    try:
        _check(lib.seccomp_attr_set(context, ATTRIBUTE_OPTIMIZE, ctypes.c_uint32(BINARY_TREE)))
        for rule in rules:
            _add_rule(lib, context, rule)
        return _export(lib, context)
    finally:
        lib.seccomp_release(context)


def _add_rule(lib: ctypes.CDLL, context: ctypes.c_void_p, rule: dict[str, Any]) -> None:
    arguments = rule.get("args", [])
    array = (_Argument * len(arguments))(
        *(
            _Argument(a["index"], COMPARE[a["op"]], a["value"], a.get("valueTwo", 0))
            for a in arguments
        )
    )
    for name in rule["names"]:
        number = lib.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:
            action = ctypes.c_uint32(ACT_ALLOW)
            _check(lib.seccomp_rule_add_array(context, action, number, len(arguments), array))


def _export(lib: ctypes.CDLL, context: ctypes.c_void_p) -> bytes:
    with os.fdopen(os.memfd_create("seccomp"), "w+b", buffering=0) as file:
        _check(lib.seccomp_export_bpf(context, file.fileno()))
        file.seek(0)
        return file.read()


def _check(result: int) -> None:
    if result < 0:
        raise Unsupported(f"libseccomp refuses the profile: {os.strerror(-result)}")
