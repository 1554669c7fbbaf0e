"""The files of a procfs as bytes, for who shows the processes of other machines as if they were in
/proc here.

msgpack, since the bytes are any: `{"host": {NAME: bytes}, "files": [NAME, ...], "processes":
[[pid, start_ticks, uid, gid, app, instance, class, [bytes or nil, ...]], ...]}`, the last in the
order of `files`; nil where a file cannot be read. Times in the files are ticks and seconds of their
own machine, which says how long both are, and sizes its pages: `ticks_per_s`, `page_bytes`.
`boot_id` tells its kernel from others; `users` and `groups` name the ids that have names there.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tabane.k2i.files import may_look_into
from tabane.k2i.host import read_files
from tabane.k2i.names import Names
from tabane.k2i.procfs import GONE, PAGE_BYTES, TICKS_PER_S
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
ADDRESSES = (*range(23, 28), 32, *range(42, 49))
"""Of `stat`'s words after the name: of code, stack, registers, wchan, data and arguments."""
MOST_BYTES = 1 << 17
"""Of one file: command lines may be longer."""


def read_raw(
    root: Path, processes: Collection[Process], files: Sequence[str], who: Principal
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
    answer = {"host": read_files(root, HOST_FILES), "files": files, "processes": found}
    return msgspec.msgpack.encode(answer | _describe_machine(root, processes))


def _describe_machine(root: Path, processes: Iterable[Process]) -> dict[str, Any]:
    """What the files do not say of how they are to be read."""
    names = Names()
    uids = {uid for process in processes for uid in (process.uid, process.ruid)}
    users = {uid: name for uid in uids if (name := names.user(uid)) != str(uid)}
    gids = {process.gid for process in processes}
    groups = {gid: name for gid in gids if (name := names.group(gid)) != str(gid)}
    return {
        "boot_id": (root / "sys/kernel/random/boot_id").read_text().strip(),
        "ticks_per_s": TICKS_PER_S,
        "page_bytes": PAGE_BYTES,
        "users": users,
        "groups": groups,
    }


def _read_process(
    root: Path, process: Process, files: Sequence[str], who: Principal
) -> list[bytes | None]:
    """Through a descriptor of its directory, so that all files are of one process: those of one
    that ended cannot be read through it any more, even if another has its pid."""
    directory = os.open(f"{root}/{process.pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not _is_of(process, _read(directory, "stat")):
            raise ProcessLookupError(f"process {process.pid} has ended")
        owner = os.stat("fd", dir_fd=directory).st_uid
        is_open = may_look_into(who, process, owner)
        return [_read_or_none(directory, name, process, who, is_open=is_open) for name in files]
    finally:
        os.close(directory)


def _is_of(process: Process, stat: bytes) -> bool:
    """Whether it started when that process did: the 22nd field, the 20th behind the name."""
    return int(stat[stat.rindex(b")") + 2 :].split(None, 20)[19]) == process.start_ticks


def _read_or_none(
    directory: int, name: str, process: Process, who: Principal, *, is_open: bool
) -> bytes | None:
    if name == "cmdline" and not (who.is_root or who.uid == process.uid):
        return f"[{process.name}]\0".encode()
    if name in ("io", "wchan") and not is_open:
        return None
    try:
        data = _read(directory, name)
    except (PermissionError, FileNotFoundError):
        return None
    return hide_addresses(data) if name == "stat" and not is_open else data


def hide_addresses(stat: bytes) -> bytes:
    """As the kernel shows `stat` to those who may not trace the process."""
    head, closing, rest = stat.rpartition(b")")
    words = rest.split()
    for index in ADDRESSES:
        if index < len(words):
            words[index] = b"0"
    return b"%b%b %b\n" % (head, closing, b" ".join(words))


def _read(directory: int, name: str) -> bytes:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        data = os.read(fd, MOST_BYTES)
        while len(data) < MOST_BYTES and (more := os.read(fd, MOST_BYTES - len(data))):
            data += more
        return data
    finally:
        os.close(fd)
