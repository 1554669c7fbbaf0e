"""What only a debugger sees or does: the seccomp filter of a process, and system calls it never
meant to make. x86-64, and root's.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

ATTACH, DETACH, CONTINUE, GET_REGISTERS, SET_REGISTERS = 16, 17, 7, 12, 13
GET_FILTER = 0x420C
"""PTRACE_SECCOMP_GET_FILTER."""
WAIT_ALL = 0x40000000
"""__WALL: also for threads."""
INSTRUCTION_BYTES = 8
NUMBERS = {"getpid": 39}
RAX, ORIG_RAX, RIP, REGISTERS = 10, 15, 16, 27
"""Places in `struct user_regs_struct`."""
SYSCALL_BYTES = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int, address: int = 0, data: object = None) -> int:
    result: int = _libc.ptrace(request, pid, address, data)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"ptrace request {request:#x}")
    return result


def _attach(pid: int) -> None:
    _ptrace(ATTACH, pid)
    os.waitpid(pid, WAIT_ALL)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    _attach(pid)
    try:
        yield
    finally:
        _ptrace(DETACH, pid)


def read_filters(pid: int) -> list[bytes]:
    """The filters of its first thread, as the kernel has them, the newest first."""
    found: list[bytes] = []
    with stopped(pid):
        while True:
            try:
                size = _ptrace(GET_FILTER, pid, len(found))
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                return found
            room = ctypes.create_string_buffer(size * INSTRUCTION_BYTES)
            _ptrace(GET_FILTER, pid, len(found), room)
            found.append(room.raw)


def read_filter(pid: int) -> bytes:
    """The newest of `read_filters`."""
    return read_filters(pid)[0]


def make_call(pid: int, name: str) -> None:
    """Have a process that waits in a system call make another one instead, which must kill it.

    It waits behind the instruction that brought it into the kernel, so that is used once more.
    """
    _attach(pid)
    registers = (ctypes.c_ulonglong * REGISTERS)()
    _ptrace(GET_REGISTERS, pid, 0, registers)
    registers[RAX] = NUMBERS[name]
    registers[ORIG_RAX] = 2**64 - 1
    registers[RIP] -= SYSCALL_BYTES
    _ptrace(SET_REGISTERS, pid, 0, registers)
    _ptrace(CONTINUE, pid)
