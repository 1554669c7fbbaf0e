"""What becomes of a system call that names another node's process."""

from __future__ import annotations

import errno
import signal
import struct

import pytest

from tabane.errors import Busy, Corrupt, Denied, NotFound, Stale, TabaneError, TimedOut, Unreachable
from tabane.errors import UsageError as Wrong
from tabane.tools.procfs.calls import Answer, Call, Fetch, Order, Target, decide, refuse
from tabane.tools.procfs.filter import NUMBERINGS
from tabane.tools.procfs.numbers import FIRST
from tabane.tools.procfs.rewrite import Ids

TARGET = Target(FIRST, Ids(100, FIRST + 1, FIRST + 2, 5, 1, 9, "S"), (5).to_bytes(8, "little"))


def asked(name: str, *arguments: int) -> Answer | Order | Fetch:
    padded = (*arguments, *(0,) * (6 - len(arguments)))
    return decide(Call(name, padded), TARGET)


def ordered(name: str, *arguments: int) -> Order:
    found = asked(name, *arguments)
    assert isinstance(found, Order)
    return found


def answered(name: str, *arguments: int) -> Answer:
    found = asked(name, *arguments)
    assert isinstance(found, Answer)
    return found


def test_signals_are_carried() -> None:
    for found in (
        ordered("kill", FIRST, signal.SIGTERM),
        ordered("tkill", FIRST, signal.SIGTERM),
        ordered("tgkill", FIRST, FIRST, signal.SIGTERM),
    ):
        assert (found.verb, found.body, found.changes) == ("signal", {"signal": 15}, True)
    assert not ordered("kill", FIRST, 0).changes
    assert answered("kill", FIRST, 65).error == errno.EINVAL
    assert answered("kill", FIRST, -1 & 0xFFFFFFFF).error == errno.EINVAL
    assert answered("tgkill", FIRST, FIRST + 1, 15).error == errno.ESRCH


def test_nice_values() -> None:
    assert answered("getpriority", 0, FIRST).value == 15
    assert ordered("setpriority", 0, FIRST, 7).body == {"nice": 7}
    assert ordered("setpriority", 0, FIRST, -99 & (1 << 64) - 1).body == {"nice": -20}
    for which in (1, 2):
        assert answered("getpriority", which, FIRST).error == errno.ESRCH
        assert answered("setpriority", which, FIRST, 1).error == errno.ESRCH


def test_affinity_travels_through_the_callers_memory() -> None:
    assert answered("sched_getaffinity", FIRST, 128, 0x1000) == Answer(
        8, address=0x1000, data=TARGET.cpus
    )
    assert answered("sched_getaffinity", FIRST, 4, 0x1000).error == errno.EINVAL
    fetch = asked("sched_setaffinity", FIRST, 8, 0x2000)
    assert isinstance(fetch, Fetch) and (fetch.address, fetch.size) == (0x2000, 8)
    order = fetch.then(b"\x05" + bytes(7))
    assert isinstance(order, Order) and order.body == {"cpus": [0, 2]}
    none = fetch.then(bytes(8))
    assert isinstance(none, Answer) and none.error == errno.EINVAL
    huge = asked("sched_setaffinity", FIRST, 1 << 40, 0x2000)
    assert isinstance(huge, Fetch) and huge.size == 1024


def test_what_the_view_knows_of_scheduling() -> None:
    assert answered("sched_getscheduler", FIRST).value == 1
    assert answered("sched_getparam", FIRST, 0x10) == Answer(address=0x10, data=b"\x09\0\0\0")
    found = answered("sched_getattr", FIRST, 0x10, 48, 0)
    assert struct.unpack("<IIQiI", found.data[:24]) == (48, 1, 0, 5, 9)
    assert len(answered("sched_getattr", FIRST, 0x10, 4096, 0).data) == 56
    assert answered("sched_getattr", FIRST, 0x10, 8, 0).error == errno.EINVAL
    assert (answered("getpgid", FIRST).value, answered("getsid", FIRST).value) == (
        FIRST + 1,
        FIRST + 2,
    )


def test_limits() -> None:
    look = ordered("prlimit64", FIRST, 7, 0, 0x10)
    assert (look.body, look.changes) == ({"limits": {"nofile": {}}, "dry_run": True}, False)
    outcome = {"before": {"nofile": {"soft": 10, "hard": -1}}}
    assert look.finish(outcome) == Answer(address=0x10, data=struct.pack("<QQ", 10, 2**64 - 1))
    fetch = asked("prlimit64", FIRST, 7, 0x20, 0)
    assert isinstance(fetch, Fetch)
    order = fetch.then(struct.pack("<QQ", 10, 2**64 - 1))
    assert isinstance(order, Order)
    assert order.body == {"limits": {"nofile": {"soft": 10, "hard": -1}}}
    assert order.finish(outcome) == Answer()
    assert answered("prlimit64", FIRST, 99).error == errno.EINVAL


@pytest.mark.parametrize(
    "name",
    [
        *("rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_open", "ioprio_get", "ioprio_set"),
        *("sched_setscheduler", "sched_setparam", "sched_setattr", "sched_rr_get_interval"),
    ],
)
def test_what_cannot_be_carried_is_refused_with_a_reason(name: str) -> None:
    found = answered(name, FIRST, FIRST)
    assert found.error == errno.ENOSYS
    assert found.reason.startswith(f"{name}: ")


def test_every_call_that_is_taken_has_an_answer() -> None:
    for name, _ in NUMBERINGS["x86_64"].calls.values():
        assert asked(name, FIRST, FIRST)
        assert decide(Call(name, (FIRST,) * 6), None).error == errno.ESRCH  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("error", "number"),
    [
        *((NotFound("x"), errno.ESRCH), (Stale("x"), errno.ESRCH), (Denied("x"), errno.EPERM)),
        *((Wrong("x"), errno.EINVAL), (TimedOut("x"), errno.ETIMEDOUT), (Corrupt("x"), errno.EIO)),
        *((Unreachable("x"), errno.EHOSTUNREACH), (Busy("x"), errno.EHOSTUNREACH)),
    ],
)
def test_a_nodes_refusal_in_the_kernels_terms(error: TabaneError, number: int) -> None:
    assert refuse(error) == Answer(error=number, reason="x")
