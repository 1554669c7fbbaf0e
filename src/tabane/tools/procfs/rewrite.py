"""The files of one process of another node, as they are to be read here.

Only numbers that mean something else here are changed: ids of processes, users and groups, start
times (which count from that machine's start), ticks and pages where that machine's differ. All
other bytes pass as they are, names with newlines, parentheses and bytes that are no text too.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import NamedTuple

_STATE, _PPID, _PGRP, _SESSION, _TTY, _TPGID = range(6)
"""Of `stat`, after the name: proc_pid_stat(5) counts them from 3."""
_TICKS = (11, 12, 13, 14, 39, 40, 41)
_START, _RSS = 19, 21
_TTY_STEP = 1 << 12
"""Terminals of a node, in minor numbers."""


class Ratio(NamedTuple):
    """What a number is multiplied with and divided by."""

    times: int
    by: int

    def of(self, number: int) -> int:
        return number * self.times // self.by

    @property
    def is_one(self) -> bool:
        return self.times == self.by


class Terms(NamedTuple):
    """How a node's numbers are to be read here."""

    pid: Callable[[int], int]
    """Of one of its processes; 0 and less as they are."""
    parent: Callable[[int], int]
    """The same, but of a parent: one that is not there has a substitute."""
    uid: Callable[[int], int]
    gid: Callable[[int], int]
    start_shift: int
    """Added to start times, in ticks here."""
    ticks: Ratio = Ratio(1, 1)
    """How many a second: here, and there."""
    page_bytes: Ratio = Ratio(1, 1)
    """There, and here."""
    terminals: int = 0
    """Which of the nodes it is, from 1: its terminals are none of this machine's."""


_MAPPED = {
    b"TracerPid": attrgetter("pid"),
    b"Uid": attrgetter("uid"),
    b"Gid": attrgetter("gid"),
    b"Groups": attrgetter("gid"),
}


class Ids(NamedTuple):
    """What is asked of a process by number, apart from its files. Mapped."""

    start: int
    """As its node counts it."""
    pgrp: int
    session: int
    nice: int
    policy: int
    rt_priority: int
    state: str


def split_stat(stat: bytes) -> tuple[bytes, list[bytes]]:
    """The name, which ends at the last parenthesis, and the words after it. Raises `ValueError`."""
    opening, closing = stat.index(b"("), stat.rindex(b")")
    return stat[opening + 1 : closing], stat[closing + 1 :].split()


def read_ids(stat: bytes, terms: Terms) -> Ids:
    _, words = split_stat(stat)
    return Ids(
        start=int(words[_START]),
        pgrp=terms.pid(int(words[_PGRP])),
        session=terms.pid(int(words[_SESSION])),
        nice=int(words[16]),
        policy=int(words[38]),
        rt_priority=int(words[37]),
        state=words[_STATE].decode("ascii", "replace"),
    )


def rewrite_stat(stat: bytes, number: int, terms: Terms) -> bytes:
    name, words = split_stat(stat)
    words[_PPID] = b"%d" % terms.parent(int(words[_PPID]))
    for index in (_PGRP, _SESSION, _TPGID):
        words[index] = b"%d" % terms.pid(int(words[index]))
    words[_TTY] = b"%d" % shift_terminal(int(words[_TTY]), terms.terminals)
    if not terms.ticks.is_one:
        for index in _TICKS:
            words[index] = b"%d" % terms.ticks.of(int(words[index]))
    words[_RSS] = b"%d" % terms.page_bytes.of(int(words[_RSS]))
    start = terms.ticks.of(int(words[_START])) + terms.start_shift
    words[_START] = b"%d" % max(0, start)
    return b"%d (%b) %b\n" % (number, name, b" ".join(words))


def shift_start(stat: bytes, shift: int) -> bytes:
    """A process of this machine, in a view that counts from before this machine's start."""
    head, closing, rest = stat.rpartition(b")")
    words = rest.split()
    words[_START] = b"%d" % (int(words[_START]) + shift)
    return b"%b%b %b\n" % (head, closing, b" ".join(words))


def rewrite_status(status: bytes, number: int, stat: bytes, terms: Terms) -> bytes:
    """Its ids are in the lines before those about memory."""
    _, words = split_stat(stat)
    own = b"\t%d" % number
    ids = {
        b"Tgid": own,
        b"Pid": own,
        b"PPid": b"\t%d" % terms.parent(int(words[_PPID])),
        b"NStgid": own,
        b"NSpid": own,
        b"NSpgid": b"\t%d" % terms.pid(int(words[_PGRP])),
        b"NSsid": b"\t%d" % terms.pid(int(words[_SESSION])),
    }
    head, memory, rest = status.partition(b"\nVm")
    lines = head.split(b"\n")
    for place, line in enumerate(lines):
        name, _, value = line.partition(b":")
        if name in ids:
            lines[place] = name + b":" + ids[name]
        elif name in _MAPPED:
            lines[place] = name + b":\t" + _map_ids(name, value, terms)
    return b"\n".join(lines) + memory + rest


def _map_ids(name: bytes, value: bytes, terms: Terms) -> bytes:
    of, words = _MAPPED[name](terms), value.split()
    mapped = {word: b"%d" % of(int(word)) for word in set(words)}
    if name == b"Groups":
        return b"".join(mapped[word] + b" " for word in words)
    return b"\t".join(mapped[word] for word in words)


def rewrite_statm(statm: bytes, terms: Terms) -> bytes:
    if terms.page_bytes.is_one:
        return statm
    return b"%b\n" % b" ".join(b"%d" % terms.page_bytes.of(int(w)) for w in statm.split())


def comm_of(stat: bytes) -> bytes:
    """The file `comm`."""
    return split_stat(stat)[0] + b"\n"


def effective(status: bytes, name: bytes) -> int:
    """The effective id in a line of `status`; 0 when it has none."""
    words = status.partition(b"\n%b:" % name)[2].split(None, 2)
    return int(words[1]) if len(words) > 1 else 0


def parse_cpus(status: bytes) -> bytes:
    """The CPUs a process may run on, as a mask that begins with the lowest."""
    text = status.partition(b"\nCpus_allowed:")[2].partition(b"\n")[0].strip()
    digits = text.replace(b",", b"")
    size = -(-len(digits) // 16) * 8
    return int(digits or b"0", 16).to_bytes(size, "little")


def shift_terminal(device: int, node: int) -> int:
    """The device number of a terminal, moved to where no machine has any: pts/3 of another node is
    not pts/3 here, and whoever selects by terminal means his own. 0 stays: it is none."""
    if not device:
        return 0
    minor = (device & 0xFF | device >> 12 & 0xFFF00) + node * _TTY_STEP
    moved = minor & 0xFF | device & 0xFFF00 | (minor & 0xFFF00) << 12
    return moved - (1 << 32) if moved >= 1 << 31 else moved
