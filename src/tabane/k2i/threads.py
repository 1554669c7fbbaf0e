"""The threads of processes, as `ps -L` and `top -H` show them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from msgspec.structs import asdict

from tabane.k2i.host import read_file
from tabane.k2i.process import Attributed, attribution, nice_mark
from tabane.k2i.procfs import GONE, TICKS_PER_S, Stat, parse_stat
from tabane.k2i.table import Process


class Thread(Attributed, frozen=True, kw_only=True):
    """A thread, and the process it belongs to."""

    pid: int
    tid: int
    uid: int
    user: str
    start_ticks: int
    """When the thread was started, in ticks since its machine was."""
    name: str
    """The thread's own, which programs may give it."""
    state: str
    stat: str
    """As ps shows it with `-L`."""
    flags: int
    processor: int
    nice: int
    priority: int
    policy: int
    rt_priority: int
    cpu_s: float
    cpu_percent: float
    """Of one CPU, over the thread's whole life."""
    minor_faults: int
    major_faults: int
    elapsed_s: float


class ProcessWithTasks(Process, frozen=True, gc=False, kw_only=True):
    """`tasks` are its threads; none for one inside of something, where nobody tells of them."""

    tasks: list[Thread]


def read_threads(root: Path, processes: Iterable[Process], uptime_s: float) -> list[Thread]:
    """Of these processes, those that there still are. `uptime_s` is the machine's."""
    return [task for row in add_tasks(root, processes, uptime_s) for task in row.tasks]


def add_tasks(root: Path, processes: Iterable[Process], uptime_s: float) -> list[ProcessWithTasks]:
    """The same processes, but for those that have ended meanwhile, with their threads."""
    found = []
    for process in processes:
        try:
            tasks = [] if process.inside else _read(root, process, uptime_s)
        except GONE:
            continue
        found.append(ProcessWithTasks(**asdict(process), tasks=tasks))
    return found


def _read(root: Path, process: Process, uptime_s: float) -> list[Thread]:
    """Raises one of `GONE`, also when another process has its pid now."""
    directory = f"{root}/{process.pid}"
    threads = []
    for tid in sorted(os.listdir(f"{directory}/task"), key=int):  # noqa: PTH208
        try:
            stat = parse_stat(read_file(f"{directory}/task/{tid}/stat"))
        except GONE:
            continue
        threads.append(_make(process, stat, uptime_s))
    if parse_stat(read_file(f"{directory}/stat")).starttime != process.start_ticks:
        raise ProcessLookupError(f"process {process.pid} has ended, another has its pid")
    return threads


def _make(process: Process, stat: Stat, uptime_s: float) -> Thread:
    elapsed_s = max(0.0, uptime_s - stat.starttime / TICKS_PER_S)
    cpu_s = (stat.utime + stat.stime) / TICKS_PER_S
    return Thread(
        **attribution(process),
        pid=process.pid,
        tid=stat.pid,
        uid=process.uid,
        user=process.user,
        start_ticks=stat.starttime,
        name=stat.comm,
        state=stat.state,
        stat=stat.state + nice_mark(stat.nice) + process.stat[1:].lstrip("<N"),
        flags=stat.flags,
        processor=stat.processor,
        nice=stat.nice,
        priority=stat.priority,
        policy=stat.policy,
        rt_priority=stat.rt_priority,
        cpu_s=cpu_s,
        cpu_percent=round(100 * cpu_s / elapsed_s, 1) if elapsed_s else 0.0,
        minor_faults=stat.minflt,
        major_faults=stat.majflt,
        elapsed_s=round(elapsed_s, 2),
    )
