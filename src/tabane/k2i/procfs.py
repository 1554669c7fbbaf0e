"""/proc, read straight: files to bytes, bytes to values.

Descriptors of what is read again and again are kept open between reads (`pread` from the start
makes the kernel write the file anew), which halves the cost. A kept descriptor belongs to one
process for ever: when that process is gone it says so, even if its pid was given to another.
When there is no room for more, those that were not used for a whole round (from one listing of
pids to the next) are closed, the least recently used first. Those of the present round are not:
where more is read in turn than can be kept, that would close each just before it is used again.

A process may end between any two reads; everything here that reads one raises one of `GONE` then,
and also when the kernel hides it (hidepid).
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

GONE = (FileNotFoundError, ProcessLookupError, PermissionError, NotADirectoryError)

PAGE_BYTES = resource.getpagesize()
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
CHUNK_BYTES = 1 << 14
MOST_FILES = 1 << 20
"""Where there is no limit: fs.nr_open, unless somebody changed it."""
KERNEL_THREAD = 0x00200000
"""PF_KTHREAD of the flags in stat (include/linux/sched.h)."""


class Stat(NamedTuple):
    """/proc/PID/stat, proc_pid_stat(5). Times in clock ticks, `rss` in pages, `vsize` in bytes."""

    pid: int
    comm: str
    state: str
    ppid: int
    pgrp: int
    session: int
    tty_nr: int
    tpgid: int
    flags: int
    minflt: int
    cminflt: int
    majflt: int
    cmajflt: int
    utime: int
    stime: int
    cutime: int
    cstime: int
    priority: int
    nice: int
    num_threads: int
    itrealvalue: int
    starttime: int
    vsize: int
    rss: int
    rsslim: int
    startcode: int
    endcode: int
    startstack: int
    kstkesp: int
    kstkeip: int
    signal: int
    blocked: int
    sigignore: int
    sigcatch: int
    wchan: int
    nswap: int
    cnswap: int
    exit_signal: int
    processor: int
    rt_priority: int
    policy: int


_NUMBERS = len(Stat._fields) - 3
_parse_numbers = msgspec.json.Decoder(list[int]).decode
"""Three times as fast as `map(int, ...)`."""
_STATUS_LINE = re.compile(
    rb"^(Tgid|[UG]id|Groups|Vm(?:Lck|Data|Exe|Lib|RSS|Size|Stk|Swap)"
    rb"|S(?:ig|hd)\w\w\w):[\t ]*(.*)$",
    re.MULTILINE,
)


def decode(raw: bytes) -> str:
    """Text as programs name themselves; what is not UTF-8 shows as `\\xff`."""
    return raw.decode("utf-8", "backslashreplace")


def parse_stat(data: bytes) -> Stat:
    """A name may hold anything, blanks, newlines and parentheses too: it ends at the last one."""
    opening, closing = data.index(b"("), data.rindex(b")")
    state = chr(data[closing + 2])
    numbers = _parse_numbers(b"[%b]" % data[closing + 4 :].strip().replace(b" ", b","))
    comm = decode(data[opening + 1 : closing])
    return Stat(int(data[:opening]), comm, state, *numbers[:_NUMBERS])


def stat_of(pid: int, root: Path = Path("/proc")) -> Stat | None:
    """Of whoever has the pid now; None when nobody has it."""
    try:
        return parse_stat((root / str(pid) / "stat").read_bytes())
    except GONE:
        return None


def start_ticks(pid: int, root: Path = Path("/proc")) -> int:
    """When the process started, in clock ticks since boot; 0 when it has ended. A zombie has: it
    only waits to be reaped."""
    stat = stat_of(pid, root)
    return 0 if stat is None or stat.state in "ZX" else stat.starttime


def parse_status(data: bytes) -> dict[bytes, bytes]:
    """What `stat` does not have of /proc/PID/status. The kernel escapes newlines in names there."""
    return dict(_STATUS_LINE.findall(data))


def parse_owners(data: bytes) -> tuple[int, int, int, bool]:
    """Of /proc/PID/status: effective and real user, effective group, and whether it keeps memory
    from being swapped out."""
    start = data.index(b"\nUid:\t")
    uids = data[start + 6 : data.index(b"\n", start + 6)].split()
    start = data.index(b"\nGid:\t", start)
    gids = data[start + 6 : data.index(b"\n", start + 6)].split()
    start = data.find(b"\nVmLck:", start)
    locked = start >= 0 and data[start + 7 : data.index(b"\n", start + 7)].strip() != b"0 kB"
    return int(uids[1]), int(uids[0]), int(gids[1]), locked


def parse_words(data: bytes) -> list[str]:
    """The words of a command line, without empty ones."""
    return [decode(word) for word in data.split(b"\0") if word]


def parse_cgroup(data: bytes) -> list[str]:
    """Lines as `4:pids:/user.slice`."""
    return decode(data).splitlines()


def parse_hides(mountinfo: bytes, root: bytes) -> bool:
    """Whether the last procfs mounted on `root` hides processes: of /proc/PID/mountinfo."""
    options = b""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(b" - ")
        if before.split()[4] == root and after.startswith(b"proc "):
            options = after.split()[2]
    found = re.search(rb"hidepid=(\w+)", options)
    return found is not None and found[1] not in (b"0", b"off")


class Procfs:
    """A mounted procfs. Not for several threads at once."""

    def __init__(self, root: Path = Path("/proc"), *, keep: int | None = None) -> None:
        """Keeps at most `keep` descriptors open: unless told, half of what the process may have at
        most; for that it raises its limit once it has kept half of what it may have now."""
        self._root = str(root)
        soft, hard = _limits()
        self._room = soft // 2 if keep is None else keep
        self._most = hard // 2 if keep is None else keep
        self._count = 0
        self._kept: dict[str, _Files] = {}
        self._round = self._swept = 0
        self.opened: set[int] = set()
        """Processes of which files were opened in this round: perhaps of two with the same pid."""

    def pids(self) -> list[int]:
        """Of all processes to be seen, ascending. Descriptors of those that ended are closed."""
        pids = sorted(map(int, filter(str.isdigit, os.listdir(self._root))))  # noqa: PTH208
        self._close_all_but(set(pids))
        self._round += 1
        self.opened.clear()
        return pids

    def stat(self, pid: int) -> Stat:
        """Raises one of `GONE`."""
        return parse_stat(self.read_again(pid, "stat"))

    def stat_again(self, before: Stat) -> Stat:
        """Of the same process, which shows that what was read of its pid since was its own and not
        that of another that got its number. Raises one of `GONE`."""
        fd = self._files("stat").fds.get(before.pid)
        stat = parse_stat(self.read(before.pid, "stat") if fd is None else _read_all(fd))
        if stat.starttime != before.starttime:
            raise ProcessLookupError(f"process {before.pid} has ended, another has its pid")
        return stat

    def read(self, pid: int, name: str) -> bytes:
        """The whole file. Raises one of `GONE`."""
        fd = self._open(pid, name)
        try:
            return _read_all(fd)
        finally:
            os.close(fd)

    def read_again(self, pid: int, name: str) -> bytes:
        """As `read`, of a file worth keeping open. When the process whose file was kept is gone,
        it is that of the one that has its pid now."""
        files = self._files(name)
        if pid in files.fds:
            files.used[pid] = self._round
            try:
                return _read_all(files.fds[pid])
            except ProcessLookupError:
                self.forget(pid)
        fd = self._open(pid, name)
        try:
            data = _read_all(fd)
        except BaseException:
            os.close(fd)
            raise
        if self._has_room():
            self._count += 1
            files.fds[pid], files.used[pid] = fd, self._round
        else:
            os.close(fd)
        return data

    def read_each(self, pids: Iterable[int], name: str) -> list[bytes | None]:
        """As `read_again` of one after another; None for what is gone."""
        files, found = self._files(name), []
        kept, used, now = files.fds.get, files.used, self._round
        for pid in pids:
            fd = kept(pid)
            data = None
            if fd is not None:
                used[pid] = now
                try:
                    data = os.pread(fd, CHUNK_BYTES, 0)
                except ProcessLookupError:
                    self.forget(pid)
            if data is None or len(data) == CHUNK_BYTES:
                try:
                    data = self.read_again(pid, name)
                except GONE:
                    data = None
            found.append(data)
        return found

    def forget(self, pid: int) -> None:
        """Close what is kept of `pid`."""
        for files in self._kept.values():
            self._count -= files.close(pid)

    def uptime_s(self) -> float:
        """Seconds since the machine was started, sleep included, as in processes' start times."""
        return float((Path(self._root) / "uptime").read_text().split()[0])

    def memory_kib(self) -> int:
        for line in (Path(self._root) / "meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1])
        return 0

    def hides(self) -> bool:
        """Whether it is mounted so that processes are shown only to who owns them (hidepid)."""
        mounted = Path(f"{self._root}/self/mountinfo").read_bytes()
        return parse_hides(mounted, self._root.encode())

    def close(self) -> None:
        """Close all that is kept. Idempotent."""
        self._close_all_but(())

    def _open(self, pid: int, name: str) -> int:
        self.opened.add(pid)
        return os.open(f"{self._root}/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)

    def _files(self, name: str) -> _Files:
        return self._kept.setdefault(name, _Files())

    def _has_room(self) -> bool:
        if self._count >= self._room < self._most:
            self._room = max(self._room, min(self._most, _raise_limit() // 2))
        if self._count >= self._room and self._swept != self._round:
            self._swept = self._round
            self._close_unused()
        return self._count < self._room

    def _close_unused(self) -> None:
        """An eighth of all, of what was not used in this round nor in the one before."""
        unused = sorted(
            (used, name, pid)
            for name, files in self._kept.items()
            for pid, used in files.used.items()
            if used < self._round - 1
        )
        for _, name, pid in unused[: max(1, self._room // 8)]:
            self._count -= self._kept[name].close(pid)

    def _close_all_but(self, pids: Collection[int]) -> None:
        for files in self._kept.values():
            for pid in files.fds.keys() - pids:
                self._count -= files.close(pid)


class _Files:
    """Kept descriptors of one kind of file by pid, and the round in which each was used last."""

    __slots__ = ("fds", "used")

    def __init__(self) -> None:
        self.fds: dict[int, int] = {}
        self.used: dict[int, int] = {}

    def close(self, pid: int) -> int:
        """How many it closed: 1, or 0 when none was kept."""
        fd = self.fds.pop(pid, None)
        if fd is None:
            return 0
        del self.used[pid]
        os.close(fd)
        return 1


def _read_all(fd: int) -> bytes:
    data = os.pread(fd, CHUNK_BYTES, 0)
    if len(data) < CHUNK_BYTES:
        return data
    chunks = [data]
    offset = len(data)
    while chunk := os.pread(fd, CHUNK_BYTES, offset):
        chunks.append(chunk)
        offset += len(chunk)
    return b"".join(chunks)


def _limits() -> tuple[int, int]:
    """How many files may be open, and how many the process may allow itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else hard
    return (most if soft == resource.RLIM_INFINITY else soft), most


def _raise_limit() -> int:
    """Allow as many open files as may be; returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return _limits()[0]
