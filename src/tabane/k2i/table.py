"""The process table: all processes as compact records, each with the instance it belongs to.

What can be seen to change (times, memory, state) is read for every snapshot. What rarely changes
(command line, user, cgroup) is read again when the process has another name or another stack than
before, as after an exec, and at the latest after `REFRESH_S`: a snapshot is never staler than that.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from tabane.clock import SYSTEM, Clock
from tabane.k2i.names import Names, terminal
from tabane.k2i.procfs import (
    GONE,
    PAGE_BYTES,
    TICKS_PER_S,
    Procfs,
    Stat,
    parse_cgroup,
    parse_status,
    parse_words,
)
from tabane.k2i.v1 import Record, read_record
from tabane.model import Instance

REFRESH_S = 1.0
RECENT_S = 0.5
"""Over no less the recent use of a CPU is reckoned: it is counted in ticks of 10 ms."""
LONGEST_COMMAND = 1 << 15
"""Of a command line in a record; `/v1` has all of it."""

_INSTANCE = re.compile(r":/tabane/[^/]+/[^/]+/([^/]+)")


class Process(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """A process as `ps` shows it, and its place in the cluster. `stat` and percentages are as ps
    reckons them; `namespace`, `app`, `instance` and `class` are empty outside of instances.
    `inside` is empty for a process of the node's own table, else what looked inside and found it:
    `sandbox`, `guest` or `wasm`."""

    dc: str
    node: str
    incarnation: str
    namespace: str
    app: str
    """As `NAMESPACE/NAME`."""
    instance: str
    isolation: str = msgspec.field(name="class")
    inside: str = ""
    pid: int
    ppid: int
    pgrp: int
    session: int
    tpgid: int
    """The foreground process group of its terminal, -1 for none."""
    uid: int
    """The effective one, as `user`, `gid` and `group`."""
    user: str
    gid: int
    group: str
    ruid: int
    start_ticks: int
    """When it was started, in ticks since its machine was: with the pid, which process it is."""
    started_at: float
    """Seconds since the epoch, by its own node's clock."""
    name: str
    command: str
    tty: str
    state: str
    """One letter."""
    stat: str
    flags: int
    processor: int
    nice: int
    priority: int
    policy: int
    rt_priority: int
    threads: int
    cpu_percent: float
    """Of one CPU, over the process's whole life."""
    recent_cpu_percent: float | None
    """Of one CPU, since an earlier snapshot at least `RECENT_S` ago; None without one."""
    cpu_s: float
    memory_percent: float
    vsz_kib: int
    rss_kib: int
    minor_faults: int
    major_faults: int
    elapsed_s: float
    """Since it was started, by its own machine's clock."""


@dataclass(frozen=True, slots=True)
class _Facts:
    """What rarely changes. `instance` is the id that the cgroup's path names."""

    comm: str
    startstack: int
    read_at: float
    uid: int
    ruid: int
    gid: int
    locked: bool
    command: str
    instance: str


@dataclass(frozen=True, slots=True)
class _Use:
    """CPU ticks that a process had used at a moment, and what it then had used recently."""

    at: float
    start_ticks: int
    ticks: int
    percent: float | None


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """What a snapshot has in common. `booted_at` is in seconds since the epoch."""

    at: float
    uptime_s: float
    booted_at: float
    memory_kib: int
    names: Names
    instances: dict[str, Instance]


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
        self._facts: dict[int, _Facts] = {}
        self._uses: dict[int, _Use] = {}
        self._lock = threading.Lock()

    def processes(self, instances: Iterable[Instance] = ()) -> list[Process]:
        """All that are to be seen, by pid; `instances` say which app and class an instance has."""
        with self._lock:
            snapshot = self._begin(instances)
            found: list[Process] = []
            pids = self._procfs.pids()
            for pid in pids:
                with suppress(*GONE):
                    found.append(self._read(pid, snapshot))
            for known in (self._facts, self._uses):
                for pid in known.keys() - pids:
                    del known[pid]
            return found

    def render(self, instances: Iterable[Instance] = ()) -> bytes:
        """`processes` as a JSON array."""
        return msgspec.json.encode(self.processes(instances))

    def records(self) -> list[Record]:
        """Every process in full, as `/v1` has it."""
        with self._lock:
            names = Names()
            found: list[Record] = []
            for pid in self._procfs.pids():
                with suppress(*GONE):
                    found.append(read_record(self._procfs, pid, names))
            return found

    def record(self, pid: int) -> Record | None:
        """One process in full; None when there is no such process (a thread is none)."""
        with self._lock, suppress(*GONE):
            record = read_record(self._procfs, pid, Names())
            return record if record.tgid == pid else None
        return None

    def close(self) -> None:
        """Close all descriptors. Idempotent."""
        with self._lock:
            self._procfs.close()

    def _begin(self, instances: Iterable[Instance]) -> _Snapshot:
        uptime_s = self._procfs.uptime_s()
        return _Snapshot(
            self._clock.now(),
            uptime_s,
            self._clock.wall() - uptime_s,
            self._procfs.memory_kib(),
            Names(),
            {instance.id: instance for instance in instances},
        )

    def _read(self, pid: int, snapshot: _Snapshot) -> Process:
        stat = self._procfs.stat(pid)
        facts = self._facts.get(pid)
        if facts is None or not _holds(facts, stat, snapshot.at):
            facts = self._facts[pid] = self._read_facts(stat, snapshot.at)
        instance = snapshot.instances.get(facts.instance)
        elapsed_s = max(0.0, snapshot.uptime_s - stat.starttime / TICKS_PER_S)
        cpu_s = (stat.utime + stat.stime) / TICKS_PER_S
        rss_kib = stat.rss * PAGE_BYTES >> 10
        return Process(
            dc=self._dc,
            node=self._node,
            incarnation=self._incarnation,
            namespace=instance.app.partition("/")[0] if instance else "",
            app=instance.app if instance else "",
            instance=facts.instance,
            isolation=instance.isolation if instance else "",
            pid=pid,
            ppid=stat.ppid,
            pgrp=stat.pgrp,
            session=stat.session,
            tpgid=stat.tpgid,
            uid=facts.uid,
            user=snapshot.names.user(facts.uid),
            gid=facts.gid,
            group=snapshot.names.group(facts.gid),
            ruid=facts.ruid,
            start_ticks=stat.starttime,
            started_at=round(snapshot.booted_at + stat.starttime / TICKS_PER_S, 2),
            name=stat.comm,
            command=_describe_command(stat, facts.command),
            tty=terminal(stat.tty_nr),
            state=stat.state,
            stat=_describe_state(stat, facts.locked),
            flags=stat.flags,
            processor=stat.processor,
            nice=stat.nice,
            priority=stat.priority,
            policy=stat.policy,
            rt_priority=stat.rt_priority,
            threads=stat.num_threads,
            cpu_percent=round(100 * cpu_s / elapsed_s, 1) if elapsed_s else 0.0,
            recent_cpu_percent=self._recent_use(stat, snapshot.at),
            cpu_s=cpu_s,
            memory_percent=rss_kib * 1000 // (snapshot.memory_kib or 1) / 10,
            vsz_kib=stat.vsize >> 10,
            rss_kib=rss_kib,
            minor_faults=stat.minflt,
            major_faults=stat.majflt,
            elapsed_s=round(elapsed_s, 2),
        )

    def _recent_use(self, stat: Stat, now: float) -> float | None:
        ticks, percent = stat.utime + stat.stime, None
        use = self._uses.get(stat.pid)
        if use is not None and use.start_ticks == stat.starttime:
            passed_s = now - use.at
            if passed_s < RECENT_S:
                return use.percent
            percent = round(100 * max(0, ticks - use.ticks) / TICKS_PER_S / passed_s, 1)
        self._uses[stat.pid] = _Use(now, stat.starttime, ticks, percent)
        return percent

    def _read_facts(self, stat: Stat, now: float) -> _Facts:
        status = parse_status(self._procfs.read(stat.pid, "status"))
        words = parse_words(self._procfs.read(stat.pid, "cmdline"))
        cgroup = parse_cgroup(self._procfs.read(stat.pid, "cgroup"))
        self._procfs.stat_again(stat)
        uids = list(map(int, status[b"Uid"].split()))
        found = next(filter(None, map(_INSTANCE.search, cgroup)), None)
        return _Facts(
            comm=stat.comm,
            startstack=stat.startstack,
            read_at=now,
            uid=uids[1],
            ruid=uids[0],
            gid=int(status[b"Gid"].split()[1]),
            locked=status.get(b"VmLck", b"0 kB") != b"0 kB",
            command=" ".join(words)[:LONGEST_COMMAND],
            instance=found[1] if found else "",
        )


def _holds(facts: _Facts, stat: Stat, now: float) -> bool:
    same = facts.comm == stat.comm and facts.startstack == stat.startstack
    return same and now - facts.read_at < REFRESH_S


def _describe_state(stat: Stat, locked: bool) -> str:
    """ps's STAT: the state, and what else is to know in its letters."""
    return (
        stat.state
        + ("<" if stat.nice < 0 else "N" if stat.nice > 0 else "")
        + ("L" if locked else "")
        + ("s" if stat.session == stat.pid else "")
        + ("l" if stat.num_threads > 1 else "")
        + ("+" if stat.tpgid == stat.pgrp else "")
    )


def _describe_command(stat: Stat, command: str) -> str:
    """A process without a command line shows its name, as kernel threads and zombies do."""
    shown = command or f"[{stat.comm}]"
    return f"{shown} <defunct>" if stat.state == "Z" else shown
