"""The record of `/v1`: 84 keys in the terms and the order of procps' `proc_t`, as the k2i of 2018
has them, so that scripts written for it go on.

Times are clock ticks, `rss` is pages, `vsize` bytes, `vm_*` kB, `size` to `dt` pages. A signal set
is 18 character codes: 16 hex digits and two NULs, as procps keeps it. `environ`, the counters that
procps fills between two readings, and `ns` stay empty, as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import msgspec

from tabane.k2i.names import Names
from tabane.k2i.procfs import (
    Procfs,
    parse_cgroup,
    parse_stat,
    parse_status,
    parse_words,
)

NO_SIGNALS = b"0" * 16

_encode = msgspec.json.Encoder().encode


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


MOST_ROWS = 5000
"""So many are kept encoded: about 5 KB each."""


class Files(NamedTuple):
    """The contents of what a record is made of."""

    stat: bytes
    status: bytes
    statm: bytes
    cmdline: bytes
    cgroup: bytes


def read_record(procfs: Procfs, pid: int, names: Names) -> Record:
    """All of one process. Raises one of `procfs.GONE`, also for a thread."""
    files = Files._make([procfs.read_again(pid, name) for name in Files._fields])
    procfs.stat_again(parse_stat(files.stat))
    record = build_record(files, names)
    if record.tgid != pid:
        raise ProcessLookupError(f"{pid} is a thread")
    return record


class Rows:
    """Records as JSON. Keeps a process's row, to be sent again while its files say the same."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._rows: dict[int, tuple[Files, bytes]] = {}

    def clear(self) -> None:
        """Forget all rows: names have changed."""
        self._rows.clear()

    def render(self, found: Iterable[tuple[int, Files]]) -> bytes:
        """A JSON array of all processes that are to be seen, given with their pids."""
        before, self._rows = self._rows, {}
        rows: list[bytes] = []
        for pid, files in found:
            row = before.get(pid)
            if row is None or row[0] != files:
                row = files, _encode(build_record(files, self._names))
            if len(rows) < MOST_ROWS:
                self._rows[pid] = row
            rows.append(row[1])
        return b"[%b]" % b",".join(rows)


def build_record(files: Files, names: Names) -> Record:
    """A record from what its process's files say."""
    stat = parse_stat(files.stat)
    status = parse_status(files.status)
    values: dict[str, Any] = {
        **_EMPTY,
        **{key: getattr(stat, name) for key, name in _FROM_STAT.items()},
        **{key: _signals(status, name) for key, name in _SIGNAL_SETS.items()},
        **{key: _kib(status, name) for key, name in _MEMORY.items()},
        **dict(zip(_STATM, map(int, files.statm.split()), strict=True)),
        **_owners(status, names),
    }
    return Record(
        tid=stat.pid,
        tgid=int(status[b"Tgid"]),
        state=ord(stat.state),
        cmdline=parse_words(files.cmdline),
        cgroup=parse_cgroup(files.cgroup),
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
