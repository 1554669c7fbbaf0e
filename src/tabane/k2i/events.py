"""Births and deaths of processes as the kernel tells them: messages to values, without IO.

The kernel's process event connector (Documentation/driver-api/connector.rst, linux/cn_proc.h)
sends a datagram for each event to whoever listens: a netlink header, a connector header, and a
`proc_event`. It counts in the pids of the first pid namespace.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import msgspec

LISTEN, IGNORE = 1, 2
"""PROC_CN_MCAST_LISTEN and _IGNORE."""
CN_IDX_PROC = CN_VAL_PROC = 1
_NLMSG_DONE = 3

_NETLINK = struct.Struct("=IHHII")
_CONNECTOR = struct.Struct("=IIIIHH")
_EVENT = struct.Struct("=IIQ")
_EVENT_AT = _NETLINK.size + _CONNECTOR.size
_BODY_AT = _EVENT_AT + _EVENT.size

_ACK, _FORK, _EXEC, _UID, _GID = 0, 1, 2, 4, 0x40
_COMM, _EXIT = 0x200, 0x80000000
_BODIES = {
    _ACK: struct.Struct("=I"),
    _FORK: struct.Struct("=4i"),
    _EXEC: struct.Struct("=2i"),
    _UID: struct.Struct("=2i2I"),
    _GID: struct.Struct("=2i2I"),
    _COMM: struct.Struct("=2i16s"),
    _EXIT: struct.Struct("=2i2I2i"),
}


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a process of a node.

    `kind` is `fork`, `exec`, `comm` (another name), `uid`, `gid`, `exit`, or `gap`: events were
    missed here. `at` is by the node's monotonic clock. A pid that could not be learnt, because its
    process had ended before anybody could look, is None; so is what was not to be read in time.
    """

    kind: str
    at: float
    pid: int | None = None
    ppid: int | None = None
    """Of `fork` and `exit`: the parent."""
    start_ticks: int | None = None
    """With the pid, which process it is."""
    name: str = ""
    """After the event; empty when it was not to be read."""
    uid: int | None = None
    """Of `uid`: the effective one now; of `gid` the group."""
    code: int | None = None
    """Of `exit`: the exit code, None when a signal ended the process."""
    signal: int | None = None
    reason: str = ""
    """Of `gap`: why."""


class Told(NamedTuple):
    """A message of the kernel about the process `pid`, in its own words. `number` is the error of
    an `ack`, the id of `uid` and `gid`, and the wait status of `exit`."""

    kind: str
    at_ns: int = 0
    pid: int = 0
    parent: int = 0
    number: int = 0
    name: bytes = b""


def encode_listen(operation: int = LISTEN) -> bytes:
    """The request to begin telling, or to end it."""
    body = struct.pack("=I", operation)
    connector = _CONNECTOR.pack(CN_IDX_PROC, CN_VAL_PROC, 0, 0, len(body), 0)
    size = _NETLINK.size + len(connector) + len(body)
    return _NETLINK.pack(size, _NLMSG_DONE, 0, 0, 0) + connector + body


def parse_told(data: bytes) -> Told | None:
    """What a datagram says; None for what is no news of a process as a whole: a thread's events,
    kinds that nobody asks for. Raises `ValueError` for what is no such message."""
    if len(data) < _BODY_AT:
        raise ValueError(f"a process event has {_BODY_AT} bytes or more, not {len(data)}")
    idx, val, *_ = _CONNECTOR.unpack_from(data, _NETLINK.size)
    if (idx, val) != (CN_IDX_PROC, CN_VAL_PROC):
        raise ValueError(f"a connector message of {idx}.{val} is no process event")
    what, _, at_ns = _EVENT.unpack_from(data, _EVENT_AT)
    body = _BODIES.get(what)
    if body is None:
        return None
    if len(data) < _BODY_AT + body.size:
        raise ValueError(f"a process event of kind {what:#x} is cut off after {len(data)} bytes")
    return _read_body(what, at_ns, body.unpack_from(data, _BODY_AT))


def _read_body(what: int, at_ns: int, values: tuple[Any, ...]) -> Told | None:
    if what == _ACK:
        return Told("ack", at_ns, number=values[0])
    if what == _FORK:
        _, parent, pid, tgid = values
        return Told("fork", at_ns, tgid, parent) if pid == tgid else None
    pid, tgid, *rest = values
    if pid != tgid:
        return None
    if what == _EXIT:
        status, _, _, parent = rest
        return Told("exit", at_ns, tgid, parent, status)
    if what == _COMM:
        return Told("comm", at_ns, tgid, name=rest[0].split(b"\0")[0])
    if what == _EXEC:
        return Told("exec", at_ns, tgid)
    return Told("uid" if what == _UID else "gid", at_ns, tgid, number=rest[1])


def decode_name(name: bytes) -> str:
    """As in a process's record."""
    return name.decode("utf-8", "backslashreplace")


def exit_of(status: int) -> tuple[int | None, int | None]:
    """Exit code and signal of a wait status, one of them None."""
    ended_by = status & 0x7F
    return (None, ended_by) if ended_by else (status >> 8 & 0xFF, None)
