"""The process table: all processes as compact records, each with the instance it belongs to.

`stat` is read for every snapshot. While its bytes are those of the last time, so is the record,
but for its age. What rarely changes (command line, users, cgroup) is read again

- at once after an exec, which gives the process another stack, and when `touch` says so;
- after `REFRESH_S` when the process may have changed it itself, for which it has to run: the
  kernel counts that in `schedstat` (of the first thread, so others count as having run);
- after `MOVED_S` in any case: others may have moved it to another cgroup. That happens to young
  processes most, which are read anew every `REFRESH_S`.

So a command line or an owner in a snapshot is never staler than `REFRESH_S`, an instance than
`MOVED_S`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from tabane.clock import SYSTEM, Clock
from tabane.k2i.names import Names
from tabane.k2i.process import Facts, Moment, Process, belongs, describe, renew
from tabane.k2i.procfs import (
    GONE,
    TICKS_PER_S,
    Procfs,
    Stat,
    parse_cgroup,
    parse_owners,
    parse_stat,
    parse_words,
)
from tabane.k2i.v1 import Record, Records
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
KERNEL_THREAD = 0x00200000
"""PF_KTHREAD of the flags in stat."""

_INSTANCE = re.compile(r":/tabane/[^/]+/[^/]+/([^/]+)")


@dataclass(slots=True)
class _Known:
    """What is known of a process. Its facts were read at `read_at`, when its `schedstat` was
    `ran`; nothing of it can have changed them before `due`."""

    data: bytes
    stat: Stat
    facts: Facts
    ran: bytes
    read_at: float
    due: float
    counted_at: float
    counted_ticks: int
    recent: float | None = None
    process: Process | None = None


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
        self._names = Names()
        self._names_at = clock.now()
        self._booted_at = 0.0
        self._records = Records(self._procfs, self._names)
        self._lock = threading.Lock()

    def processes(self, instances: Iterable[Instance] = ()) -> list[Process]:
        """All that are to be seen, by pid; `instances` say which app and class an instance has."""
        with self._lock:
            moment = self._begin(instances)
            found: list[Process] = []
            pids = self._procfs.pids()
            self._take_touched(moment.at)
            for pid in pids:
                try:
                    found.append(self._read(pid, moment))
                except GONE:
                    self._known.pop(pid, None)
            for pid in self._known.keys() - pids:
                del self._known[pid]
            return found

    def render(self, instances: Iterable[Instance] = ()) -> bytes:
        """`processes` as a JSON array."""
        return msgspec.json.encode(self.processes(instances))

    def touch(self, pid: int) -> None:
        """Tell that a process has changed (an exec, another user), so that nothing that is
        remembered of it is taken for the next snapshot. From any thread; does not block."""
        self._touched.add(pid)

    def records(self) -> list[Record]:
        """Every process in full, as `/v1` has it."""
        with self._lock:
            self._refresh_names()
            return list(self._records.read_all())

    def render_records(self, name: str = "", *, redacted: bool = False) -> bytes:
        """Every process whose name has `name` in it, in full, as a JSON array; without its
        arguments where `redacted`."""
        with self._lock:
            self._refresh_names()
            return self._records.render_all(name, redacted=redacted)

    def record(self, pid: int) -> Record | None:
        """One process in full; None when there is no such process (a thread is none)."""
        with self._lock, suppress(*GONE):
            self._refresh_names()
            return self._records.read(pid)
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
        if self._refresh_names() or abs(booted_at - self._booted_at) > CLOCK_STEP_S:
            self._booted_at = booted_at
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
            {instance.id: instance for instance in instances},
        )

    def _refresh_names(self) -> bool:
        """Whether names have changed."""
        now = self._clock.now()
        if now - self._names_at < MOVED_S:
            return False
        self._names_at = now
        changed = self._names.refresh()
        if changed:
            self._records.clear()
        return changed

    def _take_touched(self, now: float) -> None:
        while self._touched:
            known = self._known.get(self._touched.pop())
            if known is not None:
                known.read_at = known.due = now - MOVED_S

    def _read(self, pid: int, moment: Moment) -> Process:
        data = self._procfs.read_again(pid, "stat")
        known = self._known.get(pid)
        if known is None or known.data != data:
            known = self._learn(parse_stat(data), data, known, moment)
        elif moment.at >= known.due and not self._still_holds(known, moment):
            self._read_facts(known, moment)
        recent = _recent_use(known, moment.at)
        process = known.process
        if process is None or not belongs(process, moment):
            process = describe(known.stat, known.facts, moment, recent)
        else:
            process = renew(process, moment, recent)
        known.process = process
        return process

    def _learn(self, stat: Stat, data: bytes, known: _Known | None, moment: Moment) -> _Known:
        """A process with another `stat` than before."""
        if known is None or known.stat.starttime != stat.starttime:
            ticks = stat.utime + stat.stime
            nothing = Facts(0, 0, 0, False, "", "")
            known = _Known(data, stat, nothing, b"", 0.0, 0.0, moment.at, ticks)
            self._read_facts(known, moment)
            self._known[stat.pid] = known
            return known
        before, known.data, known.stat, known.process = known.stat, data, stat, None
        same = before.comm == stat.comm and before.startstack == stat.startstack
        if not same or (moment.at >= known.due and not self._still_holds(known, moment)):
            self._read_facts(known, moment)
        return known

    def _still_holds(self, known: _Known, moment: Moment) -> bool:
        """Whether a process cannot have changed its facts since they were read, nor others."""
        stat = known.stat
        if stat.flags & KERNEL_THREAD:
            return True
        young = moment.uptime_s - stat.starttime / TICKS_PER_S < MOVED_S
        if young or moment.at - known.read_at >= MOVED_S or stat.num_threads > 1:
            return False
        if known.ran == b"" or self._time_run(stat.pid) != known.ran:
            return False
        known.due = moment.at + REFRESH_S
        return True

    def _time_run(self, pid: int) -> bytes:
        """How long and how often it has run; empty where the kernel does not say."""
        with suppress(FileNotFoundError):
            data = self._procfs.read_again(pid, "schedstat")
            return b"" if data.startswith(b"0 ") else data
        return b""

    def _read_facts(self, known: _Known, moment: Moment) -> None:
        stat = known.stat
        known.ran = self._time_run(stat.pid)
        uid, ruid, gid, locked = parse_owners(self._procfs.read_again(stat.pid, "status"))
        words = parse_words(self._procfs.read_again(stat.pid, "cmdline"))
        cgroup = parse_cgroup(self._procfs.read_again(stat.pid, "cgroup"))
        self._procfs.stat_again(stat)
        command = " ".join(words)[:LONGEST_COMMAND]
        facts = Facts(uid, ruid, gid, locked, command, instance_of(cgroup))
        if facts != known.facts:
            known.facts, known.process = facts, None
        known.read_at, known.due = moment.at, moment.at + REFRESH_S


def _recent_use(known: _Known, now: float) -> float | None:
    """Percent of a CPU since the last moment at which it was reckoned, or of then."""
    passed_s = now - known.counted_at
    if passed_s >= RECENT_S:
        ticks = known.stat.utime + known.stat.stime
        used = max(0, ticks - known.counted_ticks)
        known.recent = round(100 * used / TICKS_PER_S / passed_s, 1)
        known.counted_at, known.counted_ticks = now, ticks
    return known.recent


def instance_of(cgroup: Iterable[str]) -> str:
    """The instance that the lines of a process's cgroup file name; empty outside of instances."""
    found = next(filter(None, map(_INSTANCE.search, cgroup)), None)
    return found[1] if found else ""
