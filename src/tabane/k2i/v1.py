"""The record of `/v1`: 84 keys in the terms and the order of procps' `proc_t`, as the k2i of 2018
has them, so that scripts written for it go on.

Times are clock ticks, `rss` is pages, `vsize` bytes, `vm_*` kB, `size` to `dt` pages. A signal set
is 18 character codes: 16 hex digits and two NULs, as procps keeps it. `environ`, the counters that
procps fills between two readings, and `ns` stay empty, as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec

from tabane.k2i.names import Names
from tabane.k2i.procfs import (
    GONE,
    Procfs,
    decode,
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


class Records:
    """Reads records. Keeps a process's row as JSON, to be sent again while its files say the
    same. Not for several threads at once."""

    def __init__(self, procfs: Procfs, names: Names) -> None:
        self._procfs = procfs
        self._names = names
        self._rows: dict[int, tuple[Files, bytes]] = {}

    def clear(self) -> None:
        """Forget all rows: names have changed."""
        self._rows.clear()

    def read(self, pid: int) -> Record:
        """All of one process. Raises one of `procfs.GONE`, also for a thread."""
        record = build_record(self._read_files(pid), self._names)
        if record.tgid != pid:
            raise ProcessLookupError(f"{pid} is a thread")
        return record

    def read_all(self) -> Iterator[Record]:
        """Of all processes to be seen, by pid."""
        for _, files in self._read_all_files():
            yield build_record(files, self._names)

    def render_all(self, name: str = "", *, redacted: bool = False) -> bytes:
        """As a JSON array, those with `name` in their names; without arguments if `redacted`."""
        rows = [
            self._render(pid, files, redacted)
            for pid, files in self._read_all_files()
            if not name or name in comm_of(files.stat)
        ]
        return b"[%b]" % b",".join(rows)

    def _render(self, pid: int, files: Files, redacted: bool) -> bytes:
        if redacted:
            return _encode(build_record(files._replace(cmdline=b""), self._names))
        known = self._rows.get(pid)
        if known is not None and known[0] == files:
            return known[1]
        row = _encode(build_record(files, self._names))
        if known is not None or len(self._rows) < MOST_ROWS:
            self._rows[pid] = files, row
        return row

    def _read_all_files(self) -> Iterator[tuple[int, Files]]:
        """Of each process that is to be seen."""
        pids = self._procfs.pids()
        for pid in self._rows.keys() - pids:
            del self._rows[pid]
        contents = [self._procfs.read_each(pids, name) for name in Files._fields]
        opened = frozenset(self._procfs.opened)
        for pid, *files in zip(pids, *contents, strict=True):
            if pid in opened:
                with suppress(*GONE):
                    yield pid, self._read_files(pid)
            elif None not in files:
                yield pid, Files._make(files)

    def _read_files(self, pid: int) -> Files:
        """Of one and the same process: if any had to be opened, the pid may have been given to
        another meanwhile. Raises one of `procfs.GONE`."""
        files = Files._make([self._procfs.read_again(pid, name) for name in Files._fields])
        if pid in self._procfs.opened:
            self._procfs.stat_again(parse_stat(files.stat))
        return files


def comm_of(stat: bytes) -> str:
    """The name in /proc/PID/stat."""
    return decode(stat[stat.index(b"(") + 1 : stat.rindex(b")")])


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
