"""The process table: all processes as compact records, each with the instance it belongs to.

A process has to run to change, and the kernel counts that in `schedstat` (of the first thread, so
one with others counts as having run), which costs it a third of what `stat` does. `schedstat` is
read for every snapshot, `stat` only of processes that do not rest. One that sleeps rests until it
runs, unless others can change more of it meanwhile than may be told late:

- it is in a cgroup of the first version's freezer, which changes the state of some without waking
  them (whoever is stopped, traced, killed, or frozen by the second version, runs for it);
- it is at a terminal, whose foreground the shell sets;
- its parent is not known: the children of one that ends are read at once, as they get another;
- it is young, and may be put into a cgroup or a process group yet.

Every `MOVED_S`, and for `records`, which has all of the moment, every `stat` is read.

While the bytes of `stat` are those of the last time, so is the record, but for its age. What rarely
changes (command line, users, cgroup) is read again

- at once after an exec, which gives the process another stack, and when `touch` says so;
- after `REFRESH_S` when the process may have changed it itself;
- after `MOVED_S` when it is in another cgroup, which others may have moved it to; while it is
  young, when that happens most, after `REFRESH_S`.

So a snapshot has the states, parents and CPU times of its moment, but who is woken sleeps on until
it gets a CPU, for `MOVED_S` at most. A command line or an owner is never staler than `REFRESH_S`,
an instance than `MOVED_S`, nor is what others change of one that rests: its memory, nice value and
scheduling, and process group.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from tabane.clock import SYSTEM, Clock
from tabane.k2i.names import Names
from tabane.k2i.process import NO_FACTS, Facts, Moment, Process, describe, renew
from tabane.k2i.procfs import (
    GONE,
    KERNEL_THREAD,
    TICKS_PER_S,
    Procfs,
    Stat,
    parse_cgroup,
    parse_owners,
    parse_stat,
    parse_words,
)
from tabane.k2i.v1 import Files, Record, Rows, build_record, read_record
from tabane.model import Instance

__all__ = ["Process", "ProcessTable", "instance_of"]

REFRESH_S = 1.0
MOVED_S = 5.0
RECENT_S = 0.5
"""Over no less the recent use of a CPU is reckoned: it is counted in ticks of 10 ms."""
CLOCK_STEP_S = 0.1
"""By so much the machine's wall clock must have been set for start times to follow."""
LONGEST_COMMAND = 1 << 15
"""Of a command line in a record; `/v1` has all of it."""
BLOCKS_NOTHING = b"\nSigBlk:\t0000000000000000\n"
"""Of a process's status."""

_FREEZER = re.compile(rb"^\d+:(?:[^:\n]*,)?freezer(?:,[^:\n]*)?:/.", re.MULTILINE)
_INSTANCE = re.compile(r":/tabane/[^/]+/[^/]+/([^/]+)(?:/([^/]+))?")


@dataclass(slots=True)
class _Known:
    """What is known of a process. `data` is its `stat`, and it rests while its `schedstat` is
    `rests`. Its facts are `stale` when they may have changed since they were
    read, which was when its `schedstat` was `ran`, and its other files as they are here. `files`
    is what a record is made of, for as long as its `schedstat` is `files_ran`."""

    data: bytes
    stat: Stat
    counted_at: float
    counted_ticks: int
    rests: bytes | None = None
    facts: Facts = NO_FACTS
    ran: bytes | None = None
    cmdline: bytes = b""
    cgroup: bytes = b""
    files: Files | None = None
    files_ran: bytes | None = None
    stale: bool = True
    recent: float | None = None
    process: Process | None = None

    def mark(self) -> None:
        """Nothing of it holds until it is read again."""
        self.stale, self.rests = True, None

    def still_rests(self, ran: bytes | None) -> bool:
        """Whether it has not run since it rested, when its `schedstat` is `ran` now."""
        return self.rests is not None and self.rests == ran


class _Look(NamedTuple):
    """A look at all processes, and the `schedstat` that each had at its beginning."""

    at: float
    uptime_s: float
    ran: dict[int, bytes | None]

    def is_young(self, stat: Stat) -> bool:
        return stat.starttime > (self.uptime_s - MOVED_S) * TICKS_PER_S


class ProcessTable:
    """The processes of one node. For any thread, one at a time."""

    def __init__(
        self,
        node: str = "",
        incarnation: str = "",
        *,
        procfs: Procfs | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        """`node` is `DATACENTER/NODE`, or empty outside of a cluster, as its incarnation is."""
        self._dc, _, self._node = node.rpartition("/")
        self._incarnation = incarnation
        self._procfs = procfs or Procfs()
        self._clock = clock
        self._known: dict[int, _Known] = {}
        self._touched: set[int] = set()
        self._looked_at = self._looked_for_moved_at = -MOVED_S
        self._names = Names()
        self._names_at = clock.now()
        self._booted_at = 0.0
        self._places: dict[str, tuple[str, str]] = {}
        self._rows = Rows(self._names)
        self._lock = threading.Lock()

    def processes(self, instances: Iterable[Instance] = ()) -> list[Process]:
        """All that are to be seen, by pid; `instances` say which app and class an instance has."""
        with self._lock:
            moment = self._begin(instances)
            found, _ = self._look(moment.at, moment.uptime_s)
            return [_show(known, moment) for known in found]

    def render(self, instances: Iterable[Instance] = ()) -> bytes:
        """`processes` as a JSON array."""
        return msgspec.json.encode(self.processes(instances))

    def touch(self, pid: int) -> None:
        """Tell that a process has changed (an exec, another user or nice value), so that nothing
        that is remembered of it is taken for the next snapshot. From any thread; does not block."""
        self._touched.add(pid)

    def records(self) -> list[Record]:
        """Every process in full, as `/v1` has it."""
        with self._lock:
            self._refresh_names()
            return [build_record(files, self._names) for _, files in self._read_files()]

    def render_records(self) -> bytes:
        """`records` as a JSON array."""
        with self._lock:
            self._refresh_names()
            return self._rows.render(self._read_files())

    def record(self, pid: int) -> Record | None:
        """One process in full; None when there is no such process (a thread is none)."""
        with self._lock, suppress(*GONE):
            self._refresh_names()
            return read_record(self._procfs, pid, self._names)
        return None

    def hides(self) -> bool:
        """Whether the kernel shows processes only to who owns them (hidepid)."""
        with self._lock:
            return self._procfs.hides()

    def close(self) -> None:
        """Close all descriptors. Idempotent."""
        with self._lock:
            self._procfs.close()

    def _begin(self, instances: Iterable[Instance]) -> Moment:
        uptime_s = self._procfs.uptime_s()
        booted_at = self._clock.wall() - uptime_s
        places = {str(one.id): (str(one.app), str(one.isolation)) for one in instances}
        same_clock = abs(booted_at - self._booted_at) <= CLOCK_STEP_S
        if self._refresh_names() or not same_clock or places != self._places:
            self._places = places
            self._booted_at = self._booted_at if same_clock else booted_at
            for known in self._known.values():
                known.process = None
        return Moment(
            self._dc,
            self._node,
            self._incarnation,
            self._clock.now(),
            uptime_s,
            self._booted_at,
            self._procfs.memory_kib(),
            self._names,
            self._places,
        )

    def _refresh_names(self) -> bool:
        """Whether names have changed."""
        now = self._clock.now()
        if now - self._names_at < MOVED_S:
            return False
        self._names_at = now
        changed = self._names.refresh(now)
        if changed:
            self._rows.clear()
        return changed

    def _look(
        self, now: float, uptime_s: float, *, closely: bool = False
    ) -> tuple[list[_Known], dict[int, bytes | None]]:
        """What is known of each process that is to be seen, by pid, and its `schedstat`. `closely`:
        `stat` is read also of those that rest."""
        procfs, known = self._procfs, self._known
        pids = procfs.pids()
        ended = known.keys() - pids
        for pid in ended:
            del known[pid]
        ran = dict(zip(pids, procfs.read_each(pids, "schedstat"), strict=True))
        look = _Look(now, uptime_s, ran)
        while self._touched:
            self._mark(self._touched.pop())
        moved_due = now - self._looked_for_moved_at >= MOVED_S
        if moved_due or now - self._looked_at >= REFRESH_S:
            self._looked_at = now
            self._find_stale(look, everywhere=moved_due)
            self._looked_for_moved_at = now if moved_due else self._looked_for_moved_at
        ended |= self._read_stats(pids if closely or moved_due else self._find_awake(look), look)
        if ended:
            orphans = [pid for pid, one in known.items() if one.stat.ppid in ended]
            self._read_stats(orphans, look)
        return [known[pid] for pid in pids if pid in known], ran

    def _find_awake(self, look: _Look) -> list[int]:
        """Those that do not rest. Whose `schedstat` was opened just now may be another than before
        with the same pid."""
        known, opened = self._known.get, self._procfs.opened
        return [
            pid
            for pid, ran in look.ran.items()
            if (one := known(pid)) is None or not one.still_rests(ran) or pid in opened
        ]

    def _read_stats(self, pids: Iterable[int], look: _Look) -> set[int]:
        """Read these processes; those that were known and have ended, as zombies have."""
        ended = set()
        for pid, data in zip(pids, self._procfs.read_each(pids, "stat"), strict=True):
            before = self._known.get(pid)
            if before and before.data == data and before.still_rests(look.ran[pid]):
                continue
            known = self._learn(pid, data, look)
            if (before and known is not before) or (known and known.stat.state in "ZX"):
                ended.add(pid)
        return ended

    def _read_files(self) -> Iterator[tuple[int, Files]]:
        """What the records of all processes are made of."""
        found, all_ran = self._look(self._clock.now(), self._procfs.uptime_s(), closely=True)
        for known in found:
            ran = all_ran[known.stat.pid]
            if known.files is None or known.files_ran != ran or not _counts(ran):
                try:
                    self._read_rest(known, ran)
                except GONE:
                    continue
            assert known.files is not None
            yield known.stat.pid, known.files

    def _read_rest(self, known: _Known, ran: bytes | None) -> None:
        """What only records have. What a sleeping process does not run for, others cannot change
        without its `stat` showing it, but for signals that wait because it blocks them."""
        procfs, stat = self._procfs, known.stat
        status, statm = (procfs.read_again(stat.pid, name) for name in ("status", "statm"))
        if stat.pid in procfs.opened:
            procfs.stat_again(stat)
        known.files = Files(known.data, status, statm, known.cmdline, known.cgroup)
        sleeps = stat.state in "SI" and stat.num_threads == 1 and BLOCKS_NOTHING in status
        known.files_ran = ran if sleeps else None

    def _find_stale(self, look: _Look, *, everywhere: bool) -> None:
        """Mark the processes whose facts may have changed. Whether others moved them is looked for
        `everywhere`, or only among the young."""
        users = {pid: it for pid, it in self._known.items() if not it.stat.flags & KERNEL_THREAD}
        for pid, known in users.items():
            ran = look.ran[pid]
            if ran != known.ran or (known.rests is None and not _tells(ran, known.stat)):
                known.mark()
        young = [pid for pid, it in users.items() if it.rests is None and look.is_young(it.stat)]
        pids = users if everywhere else young
        for pid, cgroup in zip(pids, self._procfs.read_each(pids, "cgroup"), strict=True):
            if cgroup != users[pid].cgroup:
                users[pid].mark()

    def _mark(self, pid: int) -> None:
        if pid in self._known:
            self._known[pid].mark()

    def _learn(self, pid: int, data: bytes | None, look: _Look) -> _Known | None:
        """What is known of a process with this `stat`; None when it is gone."""
        known = self._known.pop(pid, None)
        if data is None:
            return None
        if known is None or known.data != data:
            known = _follow(known, parse_stat(data), data, look.at)
        try:
            if known.stale:
                self._read_facts(known, look.ran[pid])
        except GONE:
            return None
        known.rests = look.ran[pid] if self._rests(known, look) else None
        self._known[pid] = known
        return known

    def _rests(self, known: _Known, look: _Look) -> bool:
        """Whether nothing in its `stat` that is to be of the moment changes before it runs."""
        stat = known.stat
        return (
            stat.state in "SI"
            and stat.tty_nr == 0
            and _tells(look.ran[stat.pid], stat)
            and not look.is_young(stat)
            and (stat.ppid == 0 or stat.ppid in self._known)
            and not _FREEZER.search(known.cgroup)
        )

    def _read_facts(self, known: _Known, ran: bytes | None) -> None:
        procfs, pid = self._procfs, known.stat.pid
        known.ran = ran
        status = procfs.read_again(pid, "status")
        known.cmdline = procfs.read_again(pid, "cmdline")
        known.cgroup = procfs.read_again(pid, "cgroup")
        if pid in procfs.opened:
            procfs.stat_again(known.stat)
        command = " ".join(parse_words(known.cmdline))[:LONGEST_COMMAND]
        place = place_of(parse_cgroup(known.cgroup))
        facts = Facts(*parse_owners(status), command, *place)
        if facts != known.facts:
            known.facts, known.process = facts, None
        known.stale, known.files = False, None


def _counts(ran: bytes | None) -> bool:
    """Whether the kernel counts how long a process has run."""
    return ran is not None and not ran.startswith(b"0 ")


def _tells(ran: bytes | None, stat: Stat) -> bool:
    """Whether its `schedstat` tells whether a process has run."""
    return stat.num_threads <= 1 and _counts(ran)


def _follow(known: _Known | None, stat: Stat, data: bytes, now: float) -> _Known:
    """What is known of a process whose `stat` is another now."""
    if known is None or known.stat.starttime != stat.starttime:
        return _Known(data, stat, now, stat.utime + stat.stime)
    if (known.stat.comm, known.stat.startstack) != (stat.comm, stat.startstack):
        known.stale = True
    known.data, known.stat, known.process, known.files = data, stat, None, None
    return known


def _show(known: _Known, moment: Moment) -> Process:
    passed_s = moment.at - known.counted_at
    if passed_s >= RECENT_S:
        ticks = known.stat.utime + known.stat.stime
        used = max(0, ticks - known.counted_ticks)
        known.recent = round(100 * used / TICKS_PER_S / passed_s, 1) if used else 0.0
        known.counted_at, known.counted_ticks = moment.at, ticks
    if known.process is None:
        known.process = describe(known.stat, known.facts, moment, known.recent)
    else:
        known.process = renew(known.process, moment, known.recent)
    return known.process


def instance_of(cgroup: Iterable[str]) -> str:
    """The instance that the lines of a process's cgroup file name; empty outside of instances."""
    return place_of(cgroup)[0]


def place_of(cgroup: Iterable[str]) -> tuple[str, str]:
    """The same, and the container of it, which instances that have several have cgroups for."""
    found = next(filter(None, map(_INSTANCE.search, cgroup)), None)
    return (found[1], found[2] or "") if found else ("", "")
