"""The files of a procfs as bytes, for who shows the processes of other machines as if they were in
/proc here.

msgpack, since the bytes are any: `{"host": {NAME: bytes}, "files": [NAME, ...], "processes":
[[pid, start_ticks, uid, gid, namespace/app, instance, class, [bytes or nil, ...]], ...]}`, the last
in the order of `files`; nil where a file cannot be read. Times in the files are ticks and seconds of
their own machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from tabane.k2i.host import read_files
from tabane.k2i.procfs import GONE
from tabane.k2i.table import Process
from tabane.security.identity import Principal

HOST_FILES = (
    *("stat", "meminfo", "loadavg", "uptime", "vmstat", "version", "cpuinfo"),
    *("diskstats", "pressure/cpu", "pressure/memory", "pressure/io"),
)
FILES = (
    *("stat", "status", "statm", "cmdline", "comm", "cgroup"),
    *("loginuid", "wchan", "oom_score", "oom_score_adj"),
)
MORE_FILES = ("io", "limits", "sessionid", "schedstat")
"""Read only when they are asked for."""
MOST_BYTES = 1 << 17
"""Of one file: command lines may be longer."""


def read_raw(
    root: Path, processes: Iterable[Process], files: Sequence[str], who: Principal
) -> bytes:
    """See the module's text. `processes`: those to tell of, if they are still there."""
    found = []
    for process in processes:
        try:
            contents = _read_process(root, process, files, who)
        except GONE:
            continue
        place = (process.app, process.instance, process.isolation)
        ids = (process.pid, process.start_ticks, process.uid, process.gid)
        found.append((*ids, *place, contents))
    host = read_files(root, HOST_FILES)
    return msgspec.msgpack.encode({"host": host, "files": files, "processes": found})


def _read_process(
    root: Path, process: Process, files: Sequence[str], who: Principal
) -> list[bytes | None]:
    """Through a descriptor of its directory, so that all files are of one process: those of one
    that ended cannot be read through it any more, even if another has its pid."""
    is_open = who.is_root or who.uid == process.uid
    directory = os.open(f"{root}/{process.pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not _is_of(process, _read(directory, "stat")):
            raise ProcessLookupError(f"process {process.pid} has ended")
        return [_read_or_none(directory, name, process, is_open=is_open) for name in files]
    finally:
        os.close(directory)


def _is_of(process: Process, stat: bytes) -> bool:
    """Whether it started when that process did: the 22nd field, the 20th behind the name."""
    return int(stat[stat.rindex(b")") + 2 :].split(None, 20)[19]) == process.start_ticks


def _read_or_none(directory: int, name: str, process: Process, *, is_open: bool) -> bytes | None:
    if name == "cmdline" and not is_open:
        return f"[{process.name}]\0".encode()
    if name in ("io", "wchan") and not is_open:
        return None
    try:
        return _read(directory, name)
    except (PermissionError, FileNotFoundError):
        return None


def _read(directory: int, name: str) -> bytes:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        data = os.read(fd, MOST_BYTES)
        while len(data) < MOST_BYTES and (more := os.read(fd, MOST_BYTES - len(data))):
            data += more
        return data
    finally:
        os.close(fd)
