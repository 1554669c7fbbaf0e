"""The last ten minutes of a machine, its apps and its processes, in little memory.

A sample is made about once a second. Of each it keeps the machine's figures, the sums of each app,
and a block with those processes whose use has changed since the sample before: most are idle. Once
a minute a block has all of them, so that any stretch of time can be told from the full block before
it. When all blocks together grow over `MOST_BYTES`, the oldest samples are dropped early.

Pure: who adds says what time it is, in monotonic seconds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

import msgspec

from tabane.k2i.host import Host, Place, Placed, use_between
from tabane.k2i.table import Process

KEEP_S = 600.0
FULL_S = 60.0
MOST_BYTES = 8 << 20
NAME_BYTES = 200
"""What a process's names are reckoned with."""
SECTOR_KIB = 0.5
MANY = (1 << 32) - 1

_ENTRY = Struct("<IQfI")
"""pid, start_ticks, percent of a CPU, KiB resident; `MANY` of these: it has ended."""

Key = tuple[int, int]


class HostPoint(Placed, frozen=True, kw_only=True):
    """A machine during `over_s` seconds, which ended `age_s` ago. Rates are means over that time;
    the rest is as it was at its end. Percentages of CPU are of all CPUs together."""

    age_s: float
    over_s: float
    cpu_user: float
    cpu_system: float
    cpu_iowait: float
    cpu_steal: float
    cpu_idle: float
    load_1: float
    runnable: int
    blocked: int
    processes: int
    memory_used_kib: int
    memory_available_kib: int
    cache_kib: int
    swap_used_kib: int
    pressure_cpu: float | None
    """Percent of the last ten seconds in which some task waited; null where PSI is off."""
    pressure_memory: float | None
    pressure_io: float | None
    read_kib_per_s: float
    written_kib_per_s: float
    received_kib_per_s: float
    sent_kib_per_s: float
    forks_per_s: float
    context_switches_per_s: float


class AppPoint(Placed, frozen=True, kw_only=True):
    """The processes of an app on one node during `over_s` seconds, which ended `age_s` ago. An
    empty `app` stands for all processes outside of instances."""

    age_s: float
    over_s: float
    app: str
    processes: int
    cpu_percent: float
    """Of one CPU."""
    rss_kib: int


class ProcessPoint(Placed, frozen=True, kw_only=True):
    """A process during `over_s` seconds, which ended `age_s` ago."""

    age_s: float
    over_s: float
    pid: int
    start_ticks: int
    name: str
    app: str
    instance: str
    cpu_percent: float
    """Of one CPU."""
    rss_kib: int


class Names(NamedTuple):
    name: str
    app: str
    instance: str


class Sum(NamedTuple):
    processes: int
    cpu_percent: float
    rss_kib: int


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float
    over_s: float
    host: HostPoint
    apps: dict[str, Sum]
    is_full: bool
    block: bytes
    names: dict[Key, Names]
    """Of the processes that came, or of all in a full one."""

    @property
    def size_bytes(self) -> int:
        return len(self.block) + NAME_BYTES * (len(self.names) + len(self.apps))


class History:
    """See the module's text."""

    def __init__(self, place: Place, *, most_bytes: int = MOST_BYTES) -> None:
        self._place = place
        self._most_bytes = most_bytes
        self._samples: deque[_Sample] = deque()
        self.size_bytes = 0
        self._before: tuple[float, Host] | None = None
        self._cpu_s: dict[Key, float] = {}
        self._told: dict[Key, tuple[float, int]] = {}
        """CPU and memory of each process, as the newest block leaves it."""
        self._full_at = -math.inf

    def add(self, at: float, host: Host, processes: Sequence[Process]) -> None:
        """What is so at this moment. The first sample begins the time that the next one is over."""
        before, self._before = self._before, (at, host)
        over_s = at - before[0] if before else 0.0
        uses = self._use(processes, over_s)
        if before is None or over_s <= 0:
            return
        is_full = at - self._full_at >= FULL_S
        if is_full:
            self._full_at = at
            self._told = {}
        changed = {key: use for key, use in uses.items() if self._told.get(key) != use}
        gone = [] if is_full else [key for key in self._told if key not in uses]
        sample = _Sample(
            at,
            over_s,
            _point(self._place, before[1], host, over_s, len(processes)),
            _sums(processes, uses),
            is_full,
            b"".join(
                [_ENTRY.pack(*key, *use) for key, use in changed.items()]
                + [_ENTRY.pack(*key, 0.0, MANY) for key in gone]
            ),
            {
                (p.pid, p.start_ticks): Names(p.name, p.app, p.instance)
                for p in processes
                if (p.pid, p.start_ticks) not in self._told
            },
        )
        self._told = uses
        self._keep(sample)

    def host(self, now: float, since_s: float = KEEP_S) -> list[HostPoint]:
        """Oldest first."""
        found = self._since(now, since_s)
        return [msgspec.structs.replace(s.host, age_s=round(now - s.at, 2)) for s in found]

    def apps(
        self, now: float, since_s: float = KEEP_S, apps: Collection[str] | None = None
    ) -> list[AppPoint]:
        """Of these apps, or of all."""
        return [
            AppPoint(
                **self._place._asdict(),
                age_s=round(now - sample.at, 2),
                over_s=round(sample.over_s, 2),
                app=app,
                processes=total.processes,
                cpu_percent=round(total.cpu_percent, 1),
                rss_kib=total.rss_kib,
            )
            for sample in self._since(now, since_s)
            for app, total in sample.apps.items()
            if apps is None or app in apps
        ]

    def processes(
        self, now: float, pids: Collection[int], since_s: float = KEEP_S
    ) -> list[ProcessPoint]:
        """Of all that had these pids meanwhile, from the first full block on."""
        found = []
        for sample, names, uses in self._replay(pids):
            if now - sample.at > since_s:
                continue
            for (pid, start_ticks), (cpu_percent, rss_kib) in uses.items():
                found.append(
                    ProcessPoint(
                        **self._place._asdict(),
                        age_s=round(now - sample.at, 2),
                        over_s=round(sample.over_s, 2),
                        pid=pid,
                        start_ticks=start_ticks,
                        **names[pid, start_ticks]._asdict(),
                        cpu_percent=round(cpu_percent, 1),
                        rss_kib=rss_kib,
                    )
                )
        return found

    def _since(self, now: float, since_s: float) -> list[_Sample]:
        return [sample for sample in tuple(self._samples) if now - sample.at <= since_s]

    def _replay(
        self, pids: Collection[int]
    ) -> Iterator[tuple[_Sample, dict[Key, Names], dict[Key, tuple[float, int]]]]:
        """Each sample from the first full one on, with what these pids' processes used in it."""
        names: dict[Key, Names] = {}
        uses: dict[Key, tuple[float, int]] = {}
        begun = False
        for sample in tuple(self._samples):
            begun = begun or sample.is_full
            if not begun:
                continue
            if sample.is_full:
                names, uses = {}, {}
            names |= {key: value for key, value in sample.names.items() if key[0] in pids}
            for pid, start_ticks, cpu_percent, rss_kib in _ENTRY.iter_unpack(sample.block):
                if pid in pids and rss_kib == MANY:
                    uses.pop((pid, start_ticks), None)
                elif pid in pids:
                    uses[pid, start_ticks] = cpu_percent, rss_kib
            yield sample, names, uses

    def _use(self, processes: Sequence[Process], over_s: float) -> dict[Key, tuple[float, int]]:
        """Of one that came meanwhile all that it ever used."""
        now = {(process.pid, process.start_ticks): process for process in processes}
        before, self._cpu_s = self._cpu_s, {key: process.cpu_s for key, process in now.items()}
        if over_s <= 0:
            return {}
        return {
            key: (
                100 * max(0.0, process.cpu_s - before.get(key, 0.0)) / over_s,
                min(process.rss_kib, MANY - 1),
            )
            for key, process in now.items()
        }

    def _keep(self, sample: _Sample) -> None:
        self._samples.append(sample)
        self.size_bytes += sample.size_bytes
        while len(self._samples) > 1 and (
            sample.at - self._samples[0].at > KEEP_S or self.size_bytes > self._most_bytes
        ):
            self.size_bytes -= self._samples.popleft().size_bytes


def _sums(processes: Sequence[Process], uses: dict[Key, tuple[float, int]]) -> dict[str, Sum]:
    sums: dict[str, Sum] = {}
    for process in processes:
        cpu_percent, rss_kib = uses[process.pid, process.start_ticks]
        count, cpu, rss = sums.get(process.app, Sum(0, 0.0, 0))
        sums[process.app] = Sum(count + 1, cpu + cpu_percent, rss + rss_kib)
    return sums


def _point(place: Place, before: Host, after: Host, over_s: float, processes: int) -> HostPoint:
    use = use_between(before.cpu, after.cpu, over_s)

    def per_s(old: float, new: float) -> float:
        return round(max(0.0, new - old) / over_s, 1)

    def waited(resource: str) -> float | None:
        found = after.pressure.get(resource)
        return found.some.avg10 if found else None

    return HostPoint(
        **place._asdict(),
        age_s=0.0,
        over_s=round(over_s, 2),
        cpu_user=round(use.user + use.nice, 1),
        cpu_system=round(use.system + use.irq + use.softirq, 1),
        cpu_iowait=use.iowait,
        cpu_steal=use.steal,
        cpu_idle=use.idle,
        load_1=after.load_1,
        runnable=after.procs_running,
        blocked=after.procs_blocked,
        processes=processes,
        memory_used_kib=after.memory.used_kib,
        memory_available_kib=after.memory.available_kib,
        cache_kib=after.memory.cache_kib,
        swap_used_kib=after.memory.swap_used_kib,
        pressure_cpu=waited("cpu"),
        pressure_memory=waited("memory"),
        pressure_io=waited("io"),
        read_kib_per_s=per_s(_read_kib(before), _read_kib(after)),
        written_kib_per_s=per_s(_written_kib(before), _written_kib(after)),
        received_kib_per_s=per_s(_received_kib(before), _received_kib(after)),
        sent_kib_per_s=per_s(_sent_kib(before), _sent_kib(after)),
        forks_per_s=per_s(before.forks, after.forks),
        context_switches_per_s=per_s(before.context_switches, after.context_switches),
    )


def _read_kib(host: Host) -> float:
    return sum(disk.read_sectors for disk in host.disks) * SECTOR_KIB


def _written_kib(host: Host) -> float:
    return sum(disk.written_sectors for disk in host.disks) * SECTOR_KIB


def _received_kib(host: Host) -> float:
    """Without loopback, whose bytes never left the machine."""
    return sum(i.rx_bytes for i in host.interfaces if i.name != "lo") / 1024


def _sent_kib(host: Host) -> float:
    return sum(i.tx_bytes for i in host.interfaces if i.name != "lo") / 1024
