"""The record of `/v1`: 84 keys in the terms and the order of procps' `proc_t`, as the k2i of 2018
has them, so that scripts written for it go on.

Times are clock ticks, `rss` is pages, `vsize` bytes, `vm_*` kB, `size` to `dt` pages. A signal set
is 18 character codes: 16 hex digits and two NULs, as procps keeps it. `environ`, the counters that
procps fills between two readings, and `ns` stay empty, as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from tabane.k2i.names import Names
from tabane.k2i.procfs import Procfs, parse_cgroup, parse_status, parse_words

NO_SIGNALS = b"0" * 16


class Record(msgspec.Struct, frozen=True, gc=False):
    """One process. `tid` and `tgid` are its pid, `state` the code of its letter."""

    tid: int
    ppid: int
    maj_delta: int
    min_delta: int
    pcpu: int
    state: int
    pad_1: int
    pad_2: int
    pad_3: int
    utime: int
    stime: int
    cutime: int
    cstime: int
    start_time: int
    signal: list[int]
    blocked: list[int]
    sigignore: list[int]
    sigcatch: list[int]
    _sigpnd: list[int]
    start_code: int
    end_code: int
    start_stack: int
    kstk_esp: int
    kstk_eip: int
    wchan: int
    priority: int
    nice: int
    rss: int
    alarm: int
    size: int
    resident: int
    share: int
    trs: int
    lrs: int
    drs: int
    dt: int
    vm_size: int
    vm_lock: int
    vm_rss: int
    vm_data: int
    vm_stack: int
    vm_swap: int
    vm_exe: int
    vm_lib: int
    rtprio: int
    sched: int
    vsize: int
    rss_rlim: int
    flags: int
    min_flt: int
    maj_flt: int
    cmin_flt: int
    cmaj_flt: int
    environ: str
    cmdline: list[str]
    cgroup: list[str]
    supgid: str
    supgrp: str
    euser: str
    ruser: str
    suser: str
    fuser: str
    rgroup: str
    egroup: str
    sgroup: str
    fgroup: str
    cmd: str
    pgrp: int
    session: int
    nlwp: int
    tgid: int
    tty: int
    euid: int
    egid: int
    ruid: int
    rgid: int
    suid: int
    sgid: int
    fuid: int
    fgid: int
    tpgid: int
    exit_signal: int
    processor: int
    ns: list[int]


def read_record(procfs: Procfs, pid: int, names: Names) -> Record:
    """All of one process. Raises one of `procfs.GONE`."""
    before = procfs.stat(pid)
    status = parse_status(procfs.read_again(pid, "status"))
    statm = procfs.read_again(pid, "statm").split()
    cmdline = parse_words(procfs.read(pid, "cmdline"))
    cgroup = parse_cgroup(procfs.read(pid, "cgroup"))
    stat = procfs.stat_again(before)
    values: dict[str, Any] = {
        **_EMPTY,
        **{key: getattr(stat, name) for key, name in _FROM_STAT.items()},
        **{key: _signals(status, name) for key, name in _SIGNAL_SETS.items()},
        **{key: _kib(status, name) for key, name in _MEMORY.items()},
        **dict(zip(_STATM, map(int, statm), strict=True)),
        **_owners(status, names),
    }
    return Record(
        tid=pid,
        tgid=int(status[b"Tgid"]),
        state=ord(stat.state),
        cmdline=cmdline,
        cgroup=cgroup,
        **values,
    )


_EMPTY: dict[str, Any] = {
    **dict.fromkeys(("maj_delta", "min_delta", "pcpu", "pad_1", "pad_2", "pad_3"), 0),
    "environ": "",
    "ns": [0] * 6,
}
_FROM_STAT = {
    "cmd": "comm",
    "start_time": "starttime",
    "start_code": "startcode",
    "end_code": "endcode",
    "start_stack": "startstack",
    "kstk_esp": "kstkesp",
    "kstk_eip": "kstkeip",
    "alarm": "itrealvalue",
    "rtprio": "rt_priority",
    "sched": "policy",
    "rss_rlim": "rsslim",
    "min_flt": "minflt",
    "maj_flt": "majflt",
    "cmin_flt": "cminflt",
    "cmaj_flt": "cmajflt",
    "nlwp": "num_threads",
    "tty": "tty_nr",
    **{
        name: name
        for name in (
            *("ppid", "pgrp", "session", "tpgid", "flags", "utime", "stime", "cutime", "cstime"),
            *("priority", "nice", "vsize", "rss", "wchan", "exit_signal", "processor"),
        )
    },
}
_STATM = ("size", "resident", "share", "trs", "lrs", "drs", "dt")
_SIGNAL_SETS = {
    "signal": b"ShdPnd",
    "blocked": b"SigBlk",
    "sigignore": b"SigIgn",
    "sigcatch": b"SigCgt",
    "_sigpnd": b"SigPnd",
}
_MEMORY = {
    "vm_size": b"VmSize",
    "vm_lock": b"VmLck",
    "vm_rss": b"VmRSS",
    "vm_data": b"VmData",
    "vm_stack": b"VmStk",
    "vm_swap": b"VmSwap",
    "vm_exe": b"VmExe",
    "vm_lib": b"VmLib",
}


def _owners(status: dict[bytes, bytes], names: Names) -> dict[str, Any]:
    """Ids and names of the real, effective, saved and file system user and group."""
    owners: dict[str, Any] = {}
    uids, gids = status[b"Uid"].split(), status[b"Gid"].split()
    for which, uid, gid in zip("resf", map(int, uids), map(int, gids), strict=True):
        owners[f"{which}uid"] = uid
        owners[f"{which}user"] = names.user(uid)
        owners[f"{which}gid"] = gid
        owners[f"{which}group"] = names.group(gid)
    groups = list(map(int, status.get(b"Groups", b"").split()))
    return owners | {"supgid": _join(groups, str), "supgrp": _join(groups, names.group)}


def _signals(status: dict[bytes, bytes], key: bytes) -> list[int]:
    return [*status.get(key, NO_SIGNALS), 0, 0]


def _kib(status: dict[bytes, bytes], key: bytes) -> int:
    """0 for those without memory of their own: zombies, kernel threads."""
    return int(status.get(key, b"0 kB")[:-3])


def _join(groups: list[int], show: Callable[[int], str]) -> str:
    """As `ps -o supgid,supgrp`: `-` for none."""
    return ",".join(map(show, groups)) or "-"
