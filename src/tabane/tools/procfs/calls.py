"""What a system call that names another node's process is answered with: decided, not done.

A call becomes an `Answer` at once when the view knows it; a `Fetch` when its argument is in the
caller's memory, which someone must read; or an `Order` to that node, whose outcome is the answer.
What a node cannot be asked to do is refused with a reason, never ignored.
"""

from __future__ import annotations

import errno
import resource
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from tabane.errors import (
    Conflict,
    Denied,
    NotFound,
    Stale,
    TabaneError,
    TimedOut,
    Unavailable,
    UsageError,
)
from tabane.tools.procfs.rewrite import Ids

PRIO_PROCESS, IOPRIO_WHO_PROCESS = 0, 1
LARGEST_SIGNAL = 64
MOST_MASK_BYTES = 1024
_UNLIMITED = (1 << 64) - 1
_RLIMIT = struct.Struct("<QQ")
_SCHED_ATTR = struct.Struct("<IIQiIQQQII")
_SMALLEST_ATTR = 48
_LIMITS = {
    number: name.removeprefix("RLIMIT_").lower()
    for name, number in vars(resource).items()
    if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE"
}


class Call(NamedTuple):
    """Registers are unsigned, as they come."""

    name: str
    arguments: tuple[int, ...]

    def signed(self, index: int) -> int:
        """An argument that is an int."""
        low = self.arguments[index] & 0xFFFFFFFF
        return low - (1 << 32) if low >= 1 << 31 else low


class Answer(NamedTuple):
    """`error` as in errno, with its reason; else the call returns `value`, after `data` was written
    into the caller's memory at `address`."""

    value: int = 0
    error: int = 0
    reason: str = ""
    address: int = 0
    data: bytes = b""


class Order(NamedTuple):
    """Ask the node: `POST /v2/processes/PID/VERB`; `finish` makes the outcome an answer."""

    verb: str
    body: dict[str, Any]
    finish: Callable[[dict[str, Any]], Answer] = lambda outcome: Answer()

    @property
    def changes(self) -> bool:
        """Whether the process is another afterwards."""
        return not self.body.get("dry_run") and self.body.get("signal") != 0


class Fetch(NamedTuple):
    """Read the caller's memory, then go on."""

    address: int
    size: int
    then: Callable[[bytes], Decision]


Decision = Answer | Order | Fetch


class Target(NamedTuple):
    """The process that is meant."""

    number: int
    ids: Ids
    cpus: bytes
    """A mask."""


NOBODY = Answer(error=errno.ESRCH, reason="no such process: it has ended, or its node is silent")


def decide(call: Call, target: Target | None) -> Decision:
    """`target` is None when nobody has the number."""
    if target is None:
        return NOBODY
    return _DECISIONS[call.name](call, target)


def refuse(error: TabaneError) -> Answer:
    """What a node refused, in the kernel's terms."""
    return Answer(error=errno_of(error), reason=error.message)


def errno_of(error: TabaneError) -> int:
    if isinstance(error, NotFound | Stale | Conflict):
        return errno.ESRCH
    if isinstance(error, Denied):
        return errno.EPERM
    if isinstance(error, UsageError):
        return errno.EINVAL
    if isinstance(error, TimedOut):
        return errno.ETIMEDOUT
    return errno.EHOSTUNREACH if isinstance(error, Unavailable) else errno.EIO


def _signal(call: Call, target: Target) -> Decision:
    """`kill`, `tkill` and `tgkill`. Of another node's threads only the first has a number."""
    if call.name == "tgkill" and call.signed(1) != target.number:
        return Answer(error=errno.ESRCH, reason="threads of other nodes' processes have no numbers")
    number = call.signed(2 if call.name == "tgkill" else 1)
    if not 0 <= number <= LARGEST_SIGNAL:
        return Answer(error=errno.EINVAL, reason=f"{number} is no signal")
    return Order("signal", {"signal": number})


def _get_priority(call: Call, target: Target) -> Decision:
    if call.signed(0) != PRIO_PROCESS:
        return _NO_GROUPS
    return Answer(20 - target.ids.nice)  # the kernel's form, which the C library undoes


def _set_priority(call: Call, target: Target) -> Decision:
    if call.signed(0) != PRIO_PROCESS:
        return _NO_GROUPS
    return Order("nice", {"nice": max(-20, min(19, call.signed(2)))})


def _get_affinity(call: Call, target: Target) -> Decision:
    size = call.arguments[1]
    if size < len(target.cpus) or size % 8:
        return Answer(error=errno.EINVAL, reason=f"{len(target.cpus)} bytes are needed")
    return Answer(len(target.cpus), address=call.arguments[2], data=target.cpus)


def _set_affinity(call: Call, target: Target) -> Decision:
    def then(mask: bytes) -> Decision:
        bits = int.from_bytes(mask, "little")
        cpus = [cpu for cpu in range(bits.bit_length()) if bits >> cpu & 1]
        if not cpus:
            return Answer(error=errno.EINVAL, reason="no CPU is named")
        return Order("affinity", {"cpus": cpus})

    return Fetch(call.arguments[2], min(call.arguments[1], MOST_MASK_BYTES), then)


def _get_attributes(call: Call, target: Target) -> Decision:
    size, ids = call.arguments[2], target.ids
    if size < _SMALLEST_ATTR or call.arguments[3]:
        return Answer(error=errno.EINVAL, reason="not as sched_getattr(2) is to be called")
    told = min(size, _SCHED_ATTR.size)
    data = _SCHED_ATTR.pack(told, ids.policy, 0, ids.nice, ids.rt_priority, 0, 0, 0, 0, 0)
    return Answer(address=call.arguments[1], data=data[:told])


def _get_param(call: Call, target: Target) -> Decision:
    return Answer(address=call.arguments[1], data=struct.pack("<i", target.ids.rt_priority))


def _limit(call: Call, target: Target) -> Decision:
    name = _LIMITS.get(call.signed(1))
    if name is None:
        return Answer(error=errno.EINVAL, reason=f"{call.signed(1)} is no limit")
    new, old = call.arguments[2:4]

    def finish(outcome: dict[str, Any]) -> Answer:
        before = (outcome.get("before") or {}).get(name) or {}
        soft, hard = (_from_limit(before.get(kind)) for kind in ("soft", "hard"))
        return Answer(address=old, data=_RLIMIT.pack(soft, hard) if old else b"")

    def then(data: bytes) -> Decision:
        soft, hard = map(_to_limit, _RLIMIT.unpack(data))
        return Order("limits", {"limits": {name: {"soft": soft, "hard": hard}}}, finish)

    if new:
        return Fetch(new, _RLIMIT.size, then)
    return Order("limits", {"limits": {name: {}}, "dry_run": True}, finish)


def _from_limit(value: int | None) -> int:
    return _UNLIMITED if value is None or value < 0 else value


def _to_limit(value: int) -> int:
    return -1 if value == _UNLIMITED else value


def _impossible(why: str) -> Callable[[Call, Target], Decision]:
    return lambda call, target: Answer(error=errno.ENOSYS, reason=f"{call.name}: {why}")


_NO_GROUPS = Answer(error=errno.ESRCH, reason="groups and users of other nodes are not reached")
_NO_POLICY = _impossible("a scheduling policy cannot be set on another node")
_NO_IO = _impossible("I/O priorities of other nodes are neither known nor set")
_NO_VALUE = _impossible("a signal's value cannot be carried to another node")
_DECISIONS: dict[str, Callable[[Call, Target], Decision]] = {
    "kill": _signal,
    "tkill": _signal,
    "tgkill": _signal,
    "rt_sigqueueinfo": _NO_VALUE,
    "rt_tgsigqueueinfo": _NO_VALUE,
    "pidfd_open": _impossible("a process of another node has no descriptor here; use its number"),
    "getpriority": _get_priority,
    "setpriority": _set_priority,
    "ioprio_get": _NO_IO,
    "ioprio_set": _NO_IO,
    "getpgid": lambda call, target: Answer(target.ids.pgrp),
    "getsid": lambda call, target: Answer(target.ids.session),
    "sched_getscheduler": lambda call, target: Answer(target.ids.policy),
    "sched_getparam": _get_param,
    "sched_getattr": _get_attributes,
    "sched_getaffinity": _get_affinity,
    "sched_setaffinity": _set_affinity,
    "sched_setscheduler": _NO_POLICY,
    "sched_setparam": _NO_POLICY,
    "sched_setattr": _NO_POLICY,
    "sched_rr_get_interval": _impossible("it is not known of other nodes"),
    "prlimit64": _limit,
}
