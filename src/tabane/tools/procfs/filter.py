"""Which system calls leave the kernel for the supervisor: those that name another node's process.

The seccomp filter looks at the number of the process in the call's own registers. Numbers of other
nodes' processes are above the kernel's largest pid, so a call that names a process of this machine
never leaves the kernel, whatever becomes of the supervisor; and one that does can hit nobody here.
Process groups (`kill` of 0, -1 or -PGRP) are negative or 0, and stay in the kernel too: there they
reach the shell's own pid namespace at most.

One call names its process by a descriptor, which no filter can look into, and killall makes it with
that of a process's directory. So all of these leave the kernel, and go on there if they are about
none of the view's. Nothing is won by another descriptor then: the kernel judges whatever it finds.

Only calls of the machine's own architecture are looked at. One made otherwise (a 32-bit program's)
goes to the kernel, which knows no such process: ESRCH.
"""

from __future__ import annotations

import platform
import struct
from typing import NamedTuple

from tabane.errors import Unsupported
from tabane.tools.procfs.numbers import FIRST, LAST

_NAMES_X86 = """
kill 62 0|tkill 200 0|tgkill 234 0|rt_sigqueueinfo 129 0|rt_tgsigqueueinfo 297 0|pidfd_open 434 0
getpriority 140 1|setpriority 141 1|ioprio_set 251 1|ioprio_get 252 1|getpgid 121 0|getsid 124 0
sched_setparam 142 0|sched_getparam 143 0|sched_setscheduler 144 0|sched_getscheduler 145 0
sched_rr_get_interval 148 0|sched_setaffinity 203 0|sched_getaffinity 204 0|sched_setattr 314 0
sched_getattr 315 0|prlimit64 302 0
"""
_NAMES_ARM = """
kill 129 0|tkill 130 0|tgkill 131 0|rt_sigqueueinfo 138 0|rt_tgsigqueueinfo 240 0|pidfd_open 434 0
getpriority 141 1|setpriority 140 1|ioprio_set 30 1|ioprio_get 31 1|getpgid 155 0|getsid 156 0
sched_setparam 118 0|sched_getparam 121 0|sched_setscheduler 119 0|sched_getscheduler 120 0
sched_rr_get_interval 127 0|sched_setaffinity 122 0|sched_getaffinity 123 0|sched_setattr 274 0
sched_getattr 275 0|prlimit64 261 0
"""
"""Name, number, and which argument is the process."""

PIDFD_SEND_SIGNAL = 424
"""On every architecture."""
_LOAD, _EQUAL, _GREATER_EQUAL, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16
_INSTRUCTION = struct.Struct("<HBBI")


class Numbering(NamedTuple):
    """The calls of one architecture."""

    arch: int
    """AUDIT_ARCH_..."""
    calls: dict[int, tuple[str, int]]
    """By number: name, and which argument is the process."""
    seccomp: int
    setresuid: int
    setresgid: int
    setfsuid: int


def _parse(text: str) -> dict[int, tuple[str, int]]:
    words = [entry.split() for line in text.split("\n") for entry in line.split("|") if entry]
    return {int(number): (name, int(argument)) for name, number, argument in words}


NUMBERINGS = {
    "x86_64": Numbering(0xC000003E, _parse(_NAMES_X86), 317, 117, 119, 122),
    "aarch64": Numbering(0xC00000B7, _parse(_NAMES_ARM), 277, 147, 149, 151),
}


def numbering() -> Numbering:
    """Of this machine. Raises `Unsupported`."""
    machine = platform.machine()
    if machine not in NUMBERINGS:
        known = ", ".join(NUMBERINGS)
        raise Unsupported(f"tabane shell knows the system calls of {known}, not of {machine}")
    return NUMBERINGS[machine]


def build_filter(calls: Numbering) -> bytes:
    """The program, as instructions for the kernel."""
    groups = sorted({argument for _, argument in calls.calls.values()})
    program = [(_LOAD, 0, 0, _ARCH_AT), (_EQUAL, 1, 0, calls.arch), (_RETURN, 0, 0, _ALLOW)]
    program.append((_LOAD, 0, 0, _NUMBER_AT))
    program += [(_EQUAL, 0, 1, PIDFD_SEND_SIGNAL), (_RETURN, 0, 0, _NOTIFY)]
    body = len(program) + len(calls.calls) + 1
    for place, (number, (_, argument)) in enumerate(sorted(calls.calls.items()), len(program) + 1):
        program.append((_EQUAL, body + 5 * groups.index(argument) - place, 0, number))
    program.append((_RETURN, 0, 0, _ALLOW))
    for argument in groups:
        program += [
            (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * argument),
            (_GREATER_EQUAL, 0, 2, FIRST),
            (_GREATER_EQUAL, 1, 0, LAST + 1),
            (_RETURN, 0, 0, _NOTIFY),
            (_RETURN, 0, 0, _ALLOW),
        ]
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in program)
