"""The record of a process, and how it is made of what /proc says: plain functions."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import msgspec

from tabane.k2i.host import Placed
from tabane.k2i.names import Names, terminal
from tabane.k2i.procfs import PAGE_BYTES, TICKS_PER_S, Stat
from tabane.model import Class


class Attributed(Placed, frozen=True, kw_only=True):
    """What belongs to a process: its node, and the instance it is one of. These are empty outside
    of instances."""

    namespace: str
    app: str
    """As `NAMESPACE/NAME`."""
    instance: str
    container: str = ""
    """Of an instance with several: in which it is; empty, too, for what runs all of them."""
    isolation: str = msgspec.field(name="class")


def attribution(row: Attributed) -> dict[str, Any]:
    """The same fields, for what belongs to that process."""
    return {name: getattr(row, name) for name in Attributed.__struct_fields__}


class Process(Attributed, frozen=True, gc=False, kw_only=True):
    """A process as `ps` shows it, and its place in the cluster. `stat` and percentages are as ps
    reckons them. `inside` is empty for a process of the node's own table, else what looked inside
    and found it: `sandbox`, `guest` or `wasm`."""

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
class Facts:
    """What rarely changes. `instance` is the id that the cgroup's path names, `container` what is
    below that."""

    uid: int
    ruid: int
    gid: int
    locked: bool
    command: str
    instance: str
    container: str


NO_FACTS = Facts(0, 0, 0, False, "", "", "")


@dataclass(frozen=True, slots=True)
class Moment:
    """What a snapshot has in common. `at` is monotonic, `booted_at` in seconds since the epoch;
    `places` has the app and the class of each instance."""

    dc: str
    node: str
    incarnation: str
    at: float
    uptime_s: float
    booted_at: float
    memory_kib: int
    names: Names
    places: dict[str, tuple[str, str]]


def describe(stat: Stat, facts: Facts, moment: Moment, recent: float | None) -> Process:
    """A process as it is at the moment; it used `recent` percent of a CPU of late."""
    app, isolation = moment.places.get(facts.instance, ("", ""))
    elapsed_s = max(0.0, moment.uptime_s - stat.starttime / TICKS_PER_S)
    cpu_s = (stat.utime + stat.stime) / TICKS_PER_S
    rss_kib = stat.rss * PAGE_BYTES >> 10
    return Process(
        dc=moment.dc,
        node=moment.node,
        incarnation=moment.incarnation,
        namespace=app.partition("/")[0],
        app=app,
        instance=facts.instance,
        container=facts.container if isolation == Class.CONTAINER else "",
        isolation=isolation,
        pid=stat.pid,
        ppid=stat.ppid,
        pgrp=stat.pgrp,
        session=stat.session,
        tpgid=stat.tpgid,
        uid=facts.uid,
        user=moment.names.user(facts.uid),
        gid=facts.gid,
        group=moment.names.group(facts.gid),
        ruid=facts.ruid,
        start_ticks=stat.starttime,
        started_at=round(moment.booted_at + stat.starttime / TICKS_PER_S, 2),
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
        cpu_percent=_percent(cpu_s, elapsed_s),
        recent_cpu_percent=recent,
        cpu_s=cpu_s,
        memory_percent=rss_kib * 1000 // (moment.memory_kib or 1) / 10,
        vsz_kib=stat.vsize >> 10,
        rss_kib=rss_kib,
        minor_faults=stat.minflt,
        major_faults=stat.majflt,
        elapsed_s=round(elapsed_s, 2),
    )


def renew(before: Process, moment: Moment, recent: float | None) -> Process:
    """The record of a process of which nothing changed but its age: a tenth of the work."""
    elapsed_s = max(0.0, moment.uptime_s - before.start_ticks / TICKS_PER_S)
    process = copy(before)
    _set(process, "elapsed_s", round(elapsed_s, 2))
    if before.cpu_s:
        _set(process, "cpu_percent", _percent(before.cpu_s, elapsed_s))
    if recent != before.recent_cpu_percent:
        _set(process, "recent_cpu_percent", recent)
    return process


_set = msgspec.structs.force_setattr
"""Of a copy that nobody else has yet."""


def _percent(cpu_s: float, elapsed_s: float) -> float:
    return round(100 * cpu_s / elapsed_s, 1) if elapsed_s else 0.0


def _describe_state(stat: Stat, locked: bool) -> str:
    """ps's STAT: the state, and what else is to know in its letters."""
    return (
        stat.state
        + nice_mark(stat.nice)
        + ("L" if locked else "")
        + ("s" if stat.session == stat.pid else "")
        + ("l" if stat.num_threads > 1 else "")
        + ("+" if stat.tpgid == stat.pgrp else "")
    )


def nice_mark(nice: int) -> str:
    return "<" if nice < 0 else "N" if nice > 0 else ""


def _describe_command(stat: Stat, command: str) -> str:
    """A process without a command line shows its name, as kernel threads and zombies do."""
    shown = command or f"[{stat.comm}]"
    return f"{shown} <defunct>" if stat.state == "Z" else shown
