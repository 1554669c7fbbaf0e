"""Which of the kernel's system calls a process can make: its seccomp filters, followed.

Each filter is a small program of classic BPF over the number of the call, the architecture and the
arguments (seccomp(2)). Here it is followed for each call there is, on both ways wherever it asks
for an argument, so a call counts that is allowed with some arguments.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from tabane.testing.tracing import read_filters

X86_64 = 0xC000003E
NUMBERS = range(512)
ALLOWED = (0x7FFF0000, 0x7FFC0000, 0x7FC00000, 0x7FF00000)
"""SECCOMP_RET_ALLOW, LOG, USER_NOTIF, TRACE."""
NUMBER_AT, ARCHITECTURE_AT = 0, 4
"""In `struct seccomp_data`."""
LOAD, RETURN, JUMP = 0x20, 0x06, 0x05
COMPARE: dict[int, Callable[[int, int], bool]] = {
    0x15: lambda a, k: a == k,
    0x25: lambda a, k: a > k,
    0x35: lambda a, k: a >= k,
    0x45: lambda a, k: bool(a & k),
}
_INSTRUCTION = struct.Struct("=HBBI")


@cache
def calls() -> dict[int, str]:
    """Of this architecture: number -> name."""
    lib = ctypes.CDLL("libseccomp.so.2")
    lib.seccomp_syscall_resolve_num_arch.restype = ctypes.c_char_p
    named = {number: lib.seccomp_syscall_resolve_num_arch(X86_64, number) for number in NUMBERS}
    return {number: name.decode() for number, name in named.items() if name}


def reachable(pid: int) -> frozenset[str]:
    """Of a process's first thread; all there are when it has no filter."""
    status = Path(f"/proc/{pid}/status").read_text()
    if "Seccomp:\t2" not in status:
        return frozenset(calls().values())
    filters = [list(_INSTRUCTION.iter_unpack(program)) for program in read_filters(pid)]
    return frozenset(
        name
        for number, name in calls().items()
        if all(_allows(program, number) for program in filters)
    )


def _allows(program: list[tuple[int, int, int, int]], number: int) -> bool:
    return any(action in ALLOWED for action in _ends(program, number))


def _ends(program: list[tuple[int, int, int, int]], number: int) -> Iterator[int]:
    """The actions that it can end with. The accumulator is None where it is not known."""
    known = {NUMBER_AT: number, ARCHITECTURE_AT: X86_64}
    todo: list[tuple[int, int | None]] = [(0, None)]
    seen = set(todo)
    while todo:
        place, value = todo.pop()
        code, if_true, if_false, operand = program[place]
        following: list[tuple[int, int | None]]
        if code == RETURN:
            yield operand & 0xFFFF0000
            continue
        if code == LOAD:
            following = [(place + 1, known.get(operand))]
        elif code == JUMP:
            following = [(place + 1 + operand, value)]
        elif (compare := COMPARE.get(code)) is None:
            following = [(place + 1, None)]
        elif value is None:
            following = [(place + 1 + if_true, None), (place + 1 + if_false, None)]
        else:
            jump = if_true if compare(value, operand) else if_false
            following = [(place + 1 + jump, value)]
        todo += [one for one in following if one not in seen]
        seen.update(following)
