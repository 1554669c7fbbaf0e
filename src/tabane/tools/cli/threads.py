"""The threads of processes as rows of their own, for ps and pstree.

A thread's row is its process's with what it has for itself in place of it: `tid`, name, state,
times. Of what runs inside of an instance no threads are told: such a process stands for itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from tabane.tools.cli.columns import COLUMNS, Column, Show
from tabane.tools.cli.common import Row

IDS = ("PID", "PPID", "PGID", "SID")


def _shows(names: str) -> frozenset[Show]:
    return frozenset(COLUMNS[name].show for name in names.split())


PROCESS_ONLY = _shows(
    "gpid pid ppid pgid sid tpgid tty nlwp args comm fname recent pmem vsz rss sz"
)
THREAD_ONLY = _shows("lwp s stat psr ni pri opri priority cls sched rtprio")


def threads_of(row: Row) -> list[Row]:
    """A process as its threads, or as itself when none are told."""
    own = {name: value for name, value in row.items() if name != "tasks"}
    return [{**own, "recent_cpu_percent": None, **task} for task in row.get("tasks", ())] or [own]


def with_ids(columns: Sequence[Column], heading: str, *, counts: bool) -> list[Column]:
    """A format with the threads' ids: as `LWP` after all ids of the process, or as `SPID` after
    its pid; with `LWP` also how many there are, after the use of CPUs, if the format `counts`."""
    found = list(columns)
    after = IDS if heading == "LWP" else ("PID",)
    at = max(n for n, column in enumerate(found) if column.heading in after)
    found.insert(at + 1, COLUMNS["lwp"]._replace(heading=heading))
    used = [n for n, column in enumerate(found) if column.heading in ("C", "%CPU")]
    if heading == "LWP" and counts and used:
        found.insert(used[0] + 1, COLUMNS["nlwp"])
    return found


def blank(show: Show, *, in_thread: bool) -> bool:
    """Whether a column has nothing to say in the line of a thread below its process, or in that of
    the process."""
    return show in (PROCESS_ONLY if in_thread else THREAD_ONLY)
