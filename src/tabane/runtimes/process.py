"""Naming one process for sure: a pid is reused, a pid with its start time is not.

Read from /proc at the moment of the question, where k2i's table would be some moments old.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tabane.k2i.procfs import start_ticks, stat_of

__all__ = [
    "descendants",
    "handles",
    "ignores",
    "is_running",
    "is_same",
    "running",
    "start_ticks",
    "state",
]

_EXITING = 0x4
"""PF_EXITING of the kernel's sched.h, which a zombie has, too."""


def ignores(pid: int, name: str, number: int) -> bool:
    """Whether the process is called `name` by now and ignores that signal."""
    status = _status(pid)
    return status.get("Name") == name and _has(status, "SigIgn", number)


def handles(pid: int, number: int) -> bool:
    """Whether the process has a handler for that signal."""
    return _has(_status(pid), "SigCgt", number)


def _status(pid: int) -> dict[str, str]:
    """Its /proc/PID/status; empty when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def _has(status: dict[str, str], signals: str, number: int) -> bool:
    return bool(int(status.get(signals, "0"), 16) >> (number - 1) & 1)


def is_same(pid: int, ticks: int) -> bool:
    """Whether the process that had `pid` and started at `ticks` still runs."""
    return ticks > 0 and start_ticks(pid) == ticks


def is_running(pid: int, ticks: int) -> bool:
    """As `is_same`, of one that has not begun to end: the first process of a pid namespace that is
    killed only ends after all others, and those that are frozen do not."""
    stat = stat_of(pid)
    if stat is None or stat.flags & _EXITING:
        return False
    return ticks > 0 and stat.starttime == ticks


def descendants(pid: int) -> list[int]:
    """The processes below `pid` that have not ended, whoever their session's leader is; what
    is started meanwhile may be missing."""
    found: list[int] = []
    level = [pid]
    while level:
        level = [child for parent in level for child in _children(parent)]
        found += level
    return [pid for pid in found if state(pid) not in "ZX"]


def running(program: str, word: str) -> list[int]:
    """The processes that were started as `program` with `word` among their arguments, and what
    they forked that is no other program yet."""
    found = []
    for directory in Path("/proc").glob("[1-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            first, *words = (directory / "cmdline").read_bytes().split(b"\0")
            if first == os.fsencode(program) and os.fsencode(word) in words:
                found.append(int(directory.name))
    return found


def _children(pid: int) -> list[int]:
    children: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                children += map(int, (task / "children").read_text().split())
    return children


def state(pid: int) -> str:
    """The letter of proc(5), as `R`; `X` when it is gone."""
    stat = stat_of(pid)
    return "X" if stat is None else stat.state
