"""The threads of processes, as `ps -L` and `top -H` show them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from tabane.k2i.host import Placed, read_file
from tabane.k2i.procfs import GONE, TICKS_PER_S, Stat, parse_stat
from tabane.k2i.table import Process


class Thread(Placed, frozen=True, kw_only=True):
    """A thread, and the process it belongs to."""

    namespace: str
    app: str
    instance: str
    isolation: str = msgspec.field(name="class")
    pid: int
    tid: int
    uid: int
    user: str
    start_ticks: int
    """When the thread was started, in ticks since its machine was."""
    name: str
    """The thread's own, which programs may give it."""
    state: str
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


def read_threads(root: Path, processes: Iterable[Process], uptime_s: float) -> list[Thread]:
    """Of these processes, those that there still are. `uptime_s` is the machine's."""
    found: list[Thread] = []
    for process in processes:
        if process.inside:
            continue
        try:
            found += _read(root, process, uptime_s)
        except GONE:
            continue
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
        dc=process.dc,
        node=process.node,
        incarnation=process.incarnation,
        namespace=process.namespace,
        app=process.app,
        instance=process.instance,
        isolation=process.isolation,
        pid=process.pid,
        tid=stat.pid,
        uid=process.uid,
        user=process.user,
        start_ticks=stat.starttime,
        name=stat.comm,
        state=stat.state,
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
