"""The figures of a machine: CPUs, memory, load, pressure, disks, network, as the kernel has them.

Counters count from the machine's start and only grow: who wants a rate takes two answers and their
`uptime_s`. `cpu_use` is such a rate already.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from tabane.clock import SYSTEM, Clock
from tabane.k2i.procfs import TICKS_PER_S

RECENT_S = 0.5
"""Over no less the recent use of the CPUs is reckoned: it is counted in ticks of 10 ms."""
COUNTERS = (
    *("pgpgin", "pgpgout", "pswpin", "pswpout", "pgfault", "pgmajfault"),
    *("pgfree", "pgactivate", "pgdeactivate", "oom_kill"),
)
"""Of /proc/vmstat."""
PRESSURES = ("cpu", "memory", "io")


class Place(NamedTuple):
    """Where rows come from; empty texts outside of a cluster."""

    dc: str = ""
    node: str = ""
    incarnation: str = ""


NOWHERE = Place()


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that every row begins with."""

    dc: str
    node: str
    incarnation: str


class Cpu(msgspec.Struct, frozen=True):
    """Seconds of CPU time since the machine's start, by what they went to, proc_stat(5)."""

    user_s: float
    nice_s: float
    system_s: float
    idle_s: float
    iowait_s: float
    irq_s: float
    softirq_s: float
    steal_s: float
    guest_s: float
    guest_nice_s: float


class CpuUse(msgspec.Struct, frozen=True):
    """Shares of all CPUs' time in the last `over_s` seconds, in percent of the whole."""

    over_s: float
    user: float
    nice: float
    system: float
    idle: float
    iowait: float
    irq: float
    softirq: float
    steal: float


class Memory(msgspec.Struct, frozen=True):
    """In KiB, as free(1) and vmstat(8) reckon it: `used` is what is not available, `cache` is the
    page cache with the reclaimable slabs."""

    total_kib: int
    used_kib: int
    free_kib: int
    shared_kib: int
    buffers_kib: int
    cache_kib: int
    available_kib: int
    active_kib: int
    inactive_kib: int
    swap_total_kib: int
    swap_used_kib: int
    swap_free_kib: int
    swap_cached_kib: int
    low_total_kib: int
    low_free_kib: int
    high_total_kib: int
    high_free_kib: int
    commit_limit_kib: int
    committed_kib: int


class Stalls(msgspec.Struct, frozen=True):
    """Shares of time, in percent, in which tasks waited, and in all how long since the start."""

    total_us: int
    avg10: float
    avg60: float
    avg300: float


class Pressure(msgspec.Struct, frozen=True):
    """Of one resource: `some` tasks waited for it, or `full`: all that there were."""

    some: Stalls
    full: Stalls | None


class Disk(msgspec.Struct, frozen=True):
    """A block device that was used since the machine's start. A sector is 512 bytes."""

    name: str
    reads: int
    reads_merged: int
    read_sectors: int
    read_ms: int
    writes: int
    writes_merged: int
    written_sectors: int
    write_ms: int
    in_flight: int
    io_ms: int
    weighted_io_ms: int


class Interface(msgspec.Struct, frozen=True):
    """A network interface of the node's own network namespace."""

    name: str
    rx_bytes: int
    rx_packets: int
    rx_errors: int
    rx_dropped: int
    tx_bytes: int
    tx_packets: int
    tx_errors: int
    tx_dropped: int


class Host(Placed, frozen=True, kw_only=True):
    """A machine. `booted_at` and `wall` (now) are seconds since the epoch by its own clock, which
    may be wrong: differences of these two are right, others' clocks are not to be compared."""

    hostname: str
    kernel: str
    machine: str
    boot_id: str
    booted_at: float
    wall: float
    uptime_s: float
    idle_s: float
    load_1: float
    load_5: float
    load_15: float
    runnable: int
    threads: int
    last_pid: int
    cpus: int
    cpu: Cpu
    each_cpu: list[Cpu]
    cpu_use: CpuUse | None
    """None until there are two readings half a second apart."""
    interrupts: int
    context_switches: int
    forks: int
    procs_running: int
    procs_blocked: int
    users: int = 0
    """Who are logged in: a user counts once for each time."""
    memory: Memory
    meminfo: dict[str, int]
    """All of /proc/meminfo: KiB, or plain numbers."""
    vmstat: dict[str, int]
    """`COUNTERS` of /proc/vmstat, in pages or events; pgpgin and pgpgout in KiB."""
    pressure: dict[str, Pressure]
    """By resource; empty where the kernel does not tell (PSI is off)."""
    disks: list[Disk]
    interfaces: list[Interface]


class Stat(NamedTuple):
    """What /proc/stat says."""

    cpu: Cpu
    each_cpu: list[Cpu]
    numbers: dict[str, int]
    """The first number of each other line."""


def parse_stat(text: str) -> Stat:
    cpus: dict[str, Cpu] = {}
    numbers: dict[str, int] = {}
    for line in text.splitlines():
        name, _, rest = line.partition(" ")
        if name.startswith("cpu"):
            ticks = [int(word) / TICKS_PER_S for word in rest.split()]
            cpus[name] = Cpu(*(ticks + [0.0] * 10)[:10])
        elif rest:
            numbers[name] = int(rest.split(" ", 1)[0])
    return Stat(cpus.pop("cpu"), list(cpus.values()), numbers)


def parse_numbers(text: str) -> dict[str, int]:
    """`Name: 12 kB` or `name 12`, as in /proc/meminfo and /proc/vmstat."""
    lines = (line.split() for line in text.splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}


def make_memory(info: dict[str, int]) -> Memory:
    """As free(1) of procps 4 reckons."""

    def get(name: str) -> int:
        return info.get(name, 0)

    total = get("MemTotal")
    available = min(get("MemAvailable") or get("MemFree"), total)
    return Memory(
        total_kib=total,
        used_kib=total - available,
        free_kib=get("MemFree"),
        shared_kib=get("Shmem"),
        buffers_kib=get("Buffers"),
        cache_kib=get("Cached") + get("SReclaimable"),
        available_kib=available,
        active_kib=get("Active"),
        inactive_kib=get("Inactive"),
        swap_total_kib=get("SwapTotal"),
        swap_used_kib=get("SwapTotal") - get("SwapFree"),
        swap_free_kib=get("SwapFree"),
        swap_cached_kib=get("SwapCached"),
        low_total_kib=get("LowTotal") or total,
        low_free_kib=get("LowFree") or get("MemFree"),
        high_total_kib=get("HighTotal"),
        high_free_kib=get("HighFree"),
        commit_limit_kib=get("CommitLimit"),
        committed_kib=get("Committed_AS"),
    )


def parse_pressure(text: str) -> Pressure | None:
    """`some avg10=0.55 avg60=1.75 avg300=5.44 total=2699384327`, and perhaps `full` the same."""
    found: dict[str, Stalls] = {}
    for line in text.splitlines():
        kind, *pairs = line.split()
        values = dict(pair.split("=", 1) for pair in pairs)
        average = {name: float(values[name]) for name in ("avg10", "avg60", "avg300")}
        found[kind] = Stalls(**average, total_us=int(values["total"]))
    return Pressure(found["some"], found.get("full")) if "some" in found else None


def parse_disks(text: str) -> list[Disk]:
    """Those that were used, of /proc/diskstats."""
    lines = (line.split() for line in text.splitlines())
    disks = (Disk(words[2], *map(int, words[3:14])) for words in lines if len(words) >= 14)
    return [disk for disk in disks if disk.reads or disk.writes]


def parse_interfaces(text: str) -> list[Interface]:
    """Of /proc/net/dev, whose first two lines are headings."""
    found = []
    for line in text.splitlines()[2:]:
        name, _, rest = line.rpartition(":")
        numbers = list(map(int, rest.split()))
        found.append(Interface(name.strip(), *numbers[:4], *numbers[8:12]))
    return found


def use_between(before: Cpu, after: Cpu, over_s: float) -> CpuUse:
    """Guest time is part of user and nice time already. Counters of idle and waiting CPUs may go
    back a little (proc_stat(5)): that counts as nothing."""
    names = [name for name in CpuUse.__struct_fields__ if name != "over_s"]
    spent = [max(0.0, getattr(after, f"{n}_s") - getattr(before, f"{n}_s")) for n in names]
    whole = sum(spent) or 1.0
    return CpuUse(round(over_s, 2), *(round(100 * part / whole, 1) for part in spent))


class HostReader:
    """Reads a machine's figures below a mounted procfs. For any thread."""

    def __init__(
        self, place: Place = NOWHERE, *, root: Path = Path("/proc"), clock: Clock = SYSTEM
    ) -> None:
        self._place = place
        self._root = root
        self._clock = clock
        self._lock = threading.Lock()
        self._before: tuple[float, Cpu] | None = None
        self._use: CpuUse | None = None

    def read(self) -> Host:
        """Raises `OSError` where there is no procfs."""
        now = self._clock.now()
        uptime_s, idle_s = map(float, self._text("uptime").split())
        load = self._text("loadavg").replace("/", " ").split()
        stat = parse_stat(self._text("stat"))
        info = parse_numbers(self._text("meminfo"))
        vmstat = parse_numbers(self._text("vmstat"))
        system = os.uname()
        return Host(
            **self._place._asdict(),
            hostname=system.nodename,
            kernel=system.release,
            machine=system.machine,
            boot_id=self._text("sys/kernel/random/boot_id").strip(),
            booted_at=float(stat.numbers["btime"]),
            wall=self._clock.wall(),
            uptime_s=uptime_s,
            idle_s=idle_s,
            load_1=float(load[0]),
            load_5=float(load[1]),
            load_15=float(load[2]),
            runnable=int(load[3]),
            threads=int(load[4]),
            last_pid=int(load[5]),
            cpus=len(stat.each_cpu),
            cpu=stat.cpu,
            each_cpu=stat.each_cpu,
            cpu_use=self._recent(now, stat.cpu),
            interrupts=stat.numbers["intr"],
            context_switches=stat.numbers["ctxt"],
            forks=stat.numbers["processes"],
            procs_running=stat.numbers["procs_running"],
            procs_blocked=stat.numbers["procs_blocked"],
            memory=make_memory(info),
            meminfo=info,
            vmstat={name: vmstat[name] for name in COUNTERS if name in vmstat},
            pressure=dict(self._pressures()),
            disks=parse_disks(self._text("diskstats")),
            interfaces=parse_interfaces(self._text("net/dev")),
        )

    def memory(self) -> Memory:
        """Alone, for who asks often."""
        return make_memory(parse_numbers(self._text("meminfo")))

    def uptime_s(self) -> float:
        """Seconds since the machine was started, sleep included, as in processes' start times."""
        return float(self._text("uptime").split()[0])

    def _text(self, name: str) -> str:
        return (self._root / name).read_text()

    def pressure(self, name: str) -> Pressure | None:
        """On one of `PRESSURES`, if the kernel tells: a container's procfs may lack the files, or
        refuse them."""
        try:
            return parse_pressure(self._text(f"pressure/{name}"))
        except OSError:
            return None

    def _pressures(self) -> Iterable[tuple[str, Pressure]]:
        for name in PRESSURES:
            if (pressure := self.pressure(name)) is not None:
                yield name, pressure

    def _recent(self, now: float, cpu: Cpu) -> CpuUse | None:
        with self._lock:
            if self._before is None:
                self._before = now, cpu
            elif now - self._before[0] >= RECENT_S:
                self._use = use_between(self._before[1], cpu, now - self._before[0])
                self._before = now, cpu
            return self._use


def read_files(root: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The bytes of files of a procfs, by name; those that cannot be read are left out."""
    found = {}
    for name in names:
        try:
            found[name] = (root / name).read_bytes()
        except OSError:
            continue
    return found


def read_file(path: str) -> bytes:
    """The whole file, as quickly as can be: for those read by the thousand. Raises `OSError`."""
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        return file.readall()
