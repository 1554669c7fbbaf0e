"""The seccomp program, run by a small interpreter of what it consists of."""

from __future__ import annotations

import struct

import pytest

from tabane.tools.procfs.filter import (
    NUMBERINGS,
    PIDFD_SEND_SIGNAL,
    Numbering,
    build_filter,
)
from tabane.tools.procfs.numbers import FIRST, LAST

ALLOW, NOTIFY = 0x7FFF0000, 0x7FC00000


def run(program: bytes, call: int, arguments: list[int], arch: int) -> int:
    """What the kernel would do."""
    words = [argument & (1 << 64) - 1 for argument in arguments]
    data = struct.pack("<IIQ6Q", call & 0xFFFFFFFF, arch, 0, *words, *(0,) * (6 - len(words)))
    held = at = 0
    while True:
        code, true, false, value = struct.unpack_from("<HBBI", program, 8 * at)
        at += 1
        if code == 0x20:
            (held,) = struct.unpack_from("<I", data, value)
        elif code == 0x06:
            return value
        else:
            at += true if (held == value if code == 0x15 else held >= value) else false


@pytest.fixture(params=NUMBERINGS)
def calls(request: pytest.FixtureRequest) -> Numbering:
    return NUMBERINGS[request.param]


def test_only_calls_about_other_nodes_are_taken(calls: Numbering) -> None:
    program = build_filter(calls)
    for number, (_, place) in calls.calls.items():
        for pid, taken in (
            *((FIRST, True), (LAST, True), (FIRST - 1, False), (1, False), (0, False)),
            *((-1, False), (-FIRST, False), (LAST + 1, False)),
        ):
            arguments = [FIRST] * 6
            arguments[place] = pid
            found = run(program, number, arguments, calls.arch)
            assert found == (NOTIFY if taken else ALLOW), (number, pid)


def test_all_else_is_left_alone(calls: Numbering) -> None:
    program = build_filter(calls)
    others = set(range(600)) - set(calls.calls) - {PIDFD_SEND_SIGNAL}
    assert {run(program, number, [FIRST] * 6, calls.arch) for number in others} == {ALLOW}
    for number in calls.calls:
        assert run(program, number, [FIRST] * 6, 0x40000003) == ALLOW, "of 32 bits"
        assert run(program, number | 1 << 30, [FIRST] * 6, calls.arch) == ALLOW, "x32"


def test_what_names_a_descriptor_is_looked_at(calls: Numbering) -> None:
    program = build_filter(calls)
    assert run(program, PIDFD_SEND_SIGNAL, [3, 9], calls.arch) == NOTIFY
    assert run(program, PIDFD_SEND_SIGNAL, [3, 9], 0x40000003) == ALLOW


def test_both_machines_have_the_same_calls() -> None:
    found = [{name: place for name, place in n.calls.values()} for n in NUMBERINGS.values()]  # noqa: C416
    assert found[0] == found[1]
    assert len(found[0]) == 22
