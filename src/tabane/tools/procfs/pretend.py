"""A cluster that is not there: what its nodes would say, for tests and measurements.

source = Pretend(nodes={"tokyo/a": 600})
source["tokyo/a"].processes[7].cmdline = b"other\\0"
source.silent.add("tokyo/a")
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tabane.errors import Unreachable
from tabane.k2i.procfs import PAGE_BYTES, TICKS_PER_S
from tabane.tools.procfs.source import FILES, Answer, Raw, RawProcess, Told

MEMINFO = b"""\
MemTotal:        8388608 kB
MemFree:         4194304 kB
MemAvailable:    6291456 kB
Buffers:           10240 kB
Cached:           102400 kB
Active:           204800 kB
Inactive:          51200 kB
SReclaimable:       1024 kB
Shmem:              2048 kB
SwapTotal:             0 kB
SwapFree:              0 kB
"""
STATUS = """\
Name:\t{name}
Umask:\t0022
State:\t{state} (sleeping)
Tgid:\t{pid}
Ngid:\t0
Pid:\t{pid}
PPid:\t{ppid}
TracerPid:\t0
Uid:\t{uid}\t{uid}\t{uid}\t{uid}
Gid:\t{gid}\t{gid}\t{gid}\t{gid}
FDSize:\t64
Groups:\t{gid}
NStgid:\t{pid}
NSpid:\t{pid}
NSpgid:\t{pgrp}
NSsid:\t{session}
VmPeak:\t   10000 kB
VmSize:\t   10000 kB
VmLck:\t       0 kB
VmHWM:\t    4000 kB
VmRSS:\t    4000 kB
RssAnon:\t    1000 kB
VmSwap:\t       0 kB
Threads:\t1
SigQ:\t0/1000
SigPnd:\t0000000000000000
ShdPnd:\t0000000000000000
SigBlk:\t0000000000000000
SigIgn:\t0000000000000000
SigCgt:\t0000000000000000
CapEff:\t0000000000000000
Cpus_allowed:\t3
Cpus_allowed_list:\t0-1
voluntary_ctxt_switches:\t10
nonvoluntary_ctxt_switches:\t1
"""


@dataclass
class Proc:
    """One process, as its own machine counts."""

    pid: int
    ppid: int = 1
    name: bytes = b"sleep"
    cmdline: bytes = b"sleep\0001000\0"
    uid: int = 0
    gid: int = 0
    pgrp: int = 0
    session: int = 0
    tty: int = 0
    tpgid: int = -1
    state: str = "S"
    start: int = 100
    utime: int = 0
    nice: int = 0
    vsize: int = 10_240_000
    rss_pages: int = 1000

    def raw(self) -> RawProcess:
        files = {
            "stat": self.stat(),
            "status": self.status(),
            "statm": b"2500 %d 500 10 0 200 0\n" % self.rss_pages,
            "cmdline": self.cmdline,
            "cgroup": b"0::/\n",
        }
        content = tuple(files[name] for name in FILES)
        return RawProcess(self.pid, self.start, self.uid, self.gid, "", "", "", content)

    def stat(self) -> bytes:
        ids = (self.ppid, self.pgrp or self.pid, self.session or self.pid, self.tty, self.tpgid)
        flags, faults, times = 4194304, (100, 0, 1, 0), (self.utime, 0, 0, 0)
        rest = (20 + self.nice, self.nice, 1, 0, self.start, self.vsize, self.rss_pages, 2**64 - 1)
        zeros = (0,) * 12
        last = (17, 1, 0, 0, 0, 0, 0, *(0,) * 8)
        words = (*ids, flags, *faults, *times, *rest, *zeros, *last)
        numbers = " ".join(map(str, words)).encode()
        return b"%d (%b) %b %b\n" % (self.pid, self.name, self.state.encode(), numbers)

    def status(self) -> bytes:
        text = STATUS.format(
            name="@NAME@",
            state=self.state,
            pid=self.pid,
            ppid=self.ppid,
            uid=self.uid,
            gid=self.gid,
            pgrp=self.pgrp or self.pid,
            session=self.session or self.pid,
        )
        escaped = self.name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n")
        return text.encode().replace(b"@NAME@", escaped)


@dataclass
class Machine:
    """One node. Its boot id is its name, unless told."""

    name: str
    processes: dict[int, Proc] = field(default_factory=dict)
    uptime_s: float = 10_000.0
    incarnation: str = "first"
    boot_id: str = ""
    users: dict[int, str] = field(default_factory=lambda: {0: "root"})
    groups: dict[int, str] = field(default_factory=lambda: {0: "root"})
    ticks_per_s: int = TICKS_PER_S
    page_bytes: int = PAGE_BYTES

    def add(self, proc: Proc) -> Proc:
        self.processes[proc.pid] = proc
        return proc

    def tell(self) -> Told:
        host = {
            "stat": b"cpu  400 0 200 1400 0 0 0 0 0 0\ncpu0 200 0 100 700 0 0 0 0 0 0\n"
            b"cpu1 200 0 100 700 0 0 0 0 0 0\nintr 5\nctxt 1000\nbtime 1000\nprocesses 500\n"
            b"procs_running 1\nprocs_blocked 0\n",
            "meminfo": MEMINFO,
            "vmstat": b"pgpgin 10\npgpgout 20\npswpin 0\npswpout 0\npgfault 1000\n",
            "loadavg": b"0.50 0.25 0.10 1/600 4242\n",
            "uptime": b"%.2f %.2f\n" % (self.uptime_s, self.uptime_s),
        }
        raw = Raw(
            host=host,
            files=FILES,
            processes=[proc.raw() for proc in self.processes.values()],
            boot_id=self.boot_id or self.name,
            ticks_per_s=self.ticks_per_s,
            page_bytes=self.page_bytes,
            users=self.users,
            groups=self.groups,
        )
        return Told(self.name, self.incarnation, 0.0, raw)


class Pretend:
    """A `ProcSource`. `silent` nodes do not answer; when all are, nobody does."""

    def __init__(self, nodes: dict[str, int] | None = None) -> None:
        """`nodes`: how many processes each has."""
        self.machines: dict[str, Machine] = {}
        self.silent: set[str] = set()
        self.fetches = 0
        for name, processes in (nodes or {}).items():
            machine = self.machines[name] = Machine(name)
            machine.add(Proc(1, ppid=0, name=b"init", cmdline=b"init\0"))
            for pid in range(2, processes + 1):
                machine.add(Proc(pid, start=100 + pid))

    def __getitem__(self, name: str) -> Machine:
        return self.machines[name]

    def fetch(self) -> Answer:
        self.fetches += 1
        told = [m.tell() for name, m in self.machines.items() if name not in self.silent]
        if not told:
            raise Unreachable("no node of the pretended cluster answers")
        return Answer(told, sorted(self.silent))
