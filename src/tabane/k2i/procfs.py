"""/proc, read straight: files to bytes, bytes to values.

Descriptors of what is read again and again are kept open between reads (`pread` from the start
makes the kernel write the file anew), which halves the cost. A kept descriptor belongs to one
process for ever: when that process is gone it says so, even if its pid was given to another.

A process may end between any two reads; everything here that reads one raises one of `GONE` then,
and also when the kernel hides it (hidepid).
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import msgspec

GONE = (FileNotFoundError, ProcessLookupError, PermissionError, NotADirectoryError)

PAGE_BYTES = resource.getpagesize()
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
CHUNK_BYTES = 1 << 14


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


def parse_status(data: bytes) -> dict[bytes, bytes]:
    """What `stat` does not have of /proc/PID/status. The kernel escapes newlines in names there."""
    return dict(_STATUS_LINE.findall(data))


def parse_words(data: bytes) -> list[str]:
    """The words of a command line, without empty ones."""
    return [decode(word) for word in data.split(b"\0") if word]


def parse_cgroup(data: bytes) -> list[str]:
    """Lines as `4:pids:/user.slice`."""
    return decode(data).splitlines()


class Procfs:
    """A mounted procfs. Not for several threads at once."""

    def __init__(self, root: Path = Path("/proc"), *, keep: int | None = None) -> None:
        """Keeps at most `keep` descriptors open: unless told, half of what the process may have."""
        self._root = str(root)
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        self._room = limit if keep is None else keep
        self._kept: dict[int, dict[str, int]] = {}

    def pids(self) -> list[int]:
        """Of all processes to be seen, ascending. Descriptors of those that ended are closed."""
        pids = sorted(int(name) for name in os.listdir(self._root) if name.isdigit())  # noqa: PTH208
        self._close_all_but(set(pids))
        return pids

    def stat(self, pid: int) -> Stat:
        """Raises one of `GONE`."""
        try:
            return parse_stat(self.read_again(pid, "stat"))
        except ProcessLookupError:
            if not self.forget(pid):
                raise
        return parse_stat(self.read_again(pid, "stat"))

    def stat_again(self, before: Stat) -> Stat:
        """Of the same process, which shows that what was read of its pid since was its own and not
        that of another that got its number. Raises one of `GONE`."""
        stat = parse_stat(self.read_again(before.pid, "stat"))
        if stat.starttime != before.starttime:
            raise ProcessLookupError(f"process {before.pid} has ended, another has its pid")
        return stat

    def read(self, pid: int, name: str) -> bytes:
        """The whole file. Raises one of `GONE`."""
        fd = os.open(f"{self._root}/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _read_all(fd)
        finally:
            os.close(fd)

    def read_again(self, pid: int, name: str) -> bytes:
        """As `read`, of a file worth keeping open."""
        files = self._kept.get(pid)
        if files and name in files:
            return _read_all(files[name])
        fd = os.open(f"{self._root}/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        if self._room:
            self._room -= 1
            self._kept.setdefault(pid, {})[name] = fd
            return _read_all(fd)
        try:
            return _read_all(fd)
        finally:
            os.close(fd)

    def forget(self, pid: int) -> bool:
        """Close what is kept of `pid`; whether there was anything."""
        files = self._kept.pop(pid, {})
        for fd in files.values():
            os.close(fd)
        self._room += len(files)
        return bool(files)

    def uptime_s(self) -> float:
        """Seconds since the machine was started, sleep included, as in processes' start times."""
        return float((Path(self._root) / "uptime").read_text().split()[0])

    def memory_kib(self) -> int:
        for line in (Path(self._root) / "meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1])
        return 0

    def close(self) -> None:
        """Close all that is kept. Idempotent."""
        self._close_all_but(())

    def _close_all_but(self, pids: Collection[int]) -> None:
        for pid in [pid for pid in self._kept if pid not in pids]:
            self.forget(pid)


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
