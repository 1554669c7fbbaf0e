"""The columns of ps, in one literal table: how each shows a process, and how it sorts.

A row is a process as nodes tell it (`tabane.k2i.table.Process`). Moments are reckoned from ages by
the reader's own clock, since a node's clock may be wrong; `now` is in seconds since the epoch.
What nodes do not tell, as `environ`, has no column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tabane.tools.cli.common import Row
from tabane.tools.cli.places import short

Show = Callable[[Row, float], str]

DAY_S = 86400
PAGE_KIB = 4
POLICIES = {0: "TS", 1: "FF", 2: "RR", 3: "B", 4: "ISO", 5: "IDL", 6: "DLN"}
NICE_POLICIES = (0, 3)


class Column(NamedTuple):
    """`show` makes the text of a row, given the present moment; `key` is what it sorts by. `width`
    is in cells, 0 for as many as are needed."""

    heading: str
    show: Show
    key: Callable[[Row], Any]
    right: bool = False
    width: int = 0


def gpid(row: Row) -> str:
    """The process's id in the whole cluster. Of one inside of an instance, whose pid is not its
    node's, the instance is a part of it."""
    inside = f"{row['instance']}:" if row.get("inside") else ""
    return f"{row['dc']}/{row['node']}:{inside}{row['pid']}"


def short_app(row: Row) -> str:
    return short(row["app"])


def tid(row: Row) -> int:
    """Of a thread its own, of a process that of its first thread."""
    found: int = row["tid"] if "tid" in row else row["pid"]
    return found


def command_of(row: Row) -> str:
    command: str = row["command"]
    return command


def name_of(row: Row) -> str:
    """Its short name, marked when only its exit status is left of it."""
    return f"{row['name']} <defunct>" if row["state"] == "Z" else row["name"]


def format_minutes(seconds: float) -> str:
    """CPU time as in `ps aux`: `62:05`."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02}"


def format_hours(seconds: float) -> str:
    """CPU time as in `ps -ef`: `2-03:01:01`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{hours:02}:{minutes:02}:{rest:02}"


def format_elapsed(seconds: float) -> str:
    """Age as in `ps -o etime`: `02:05`, `01:02:05`, `2-03:01:01`."""
    return format_hours(seconds) if seconds >= 3600 else f"{format_minutes(seconds):>05}"


def _percent(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _started(row: Row, now: float, pattern: str) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(now - row["elapsed_s"]).strftime(pattern)


def _start(row: Row, now: float) -> str:
    """`10:03` of today, `Nov25` of this year, else `2025`."""
    from datetime import datetime

    started, present = datetime.fromtimestamp(now - row["elapsed_s"]), datetime.fromtimestamp(now)
    if started.year != present.year:
        return f"{started:%Y}"
    return f"{started:%H:%M}" if started.date() == present.date() else f"{started:%b%d}"


def _dash(row: Row, now: float) -> str:
    """What ps has a column for and no kernel tells any more."""
    return "-"


def _text(heading: str, field: str) -> Column:
    return Column(heading, lambda row, now: str(row[field]) or "-", lambda row: row[field])


def _number(heading: str, field: str) -> Column:
    return Column(heading, lambda row, now: str(row[field]), lambda row: row[field], True)


def _made(heading: str, make: Callable[[Row], str], key: Any = None, right: bool = False) -> Column:
    """`key` is a field's name or a function; else the text is."""
    found = (lambda row: row[key]) if isinstance(key, str) else key or make
    return Column(heading, lambda row, now: make(row), found, right)


def _moment(heading: str, show: Show) -> Column:
    return Column(heading, show, lambda row: -row["elapsed_s"], True)


def _time(heading: str, make: Callable[[float], str], field: str) -> Column:
    return _made(heading, lambda row: make(row[field]), field, right=True)


def _nice(row: Row) -> str:
    return str(row["nice"]) if row["policy"] in NICE_POLICIES else "-"


def _recent(row: Row) -> str:
    value = row["recent_cpu_percent"]
    return "-" if value is None else _percent(value)


COLUMNS: dict[str, Column] = {
    # where
    "dc": _text("DC", "dc"),
    "node": _text("NODE", "node"),
    "namespace": _text("NAMESPACE", "namespace"),
    "app": _made("APP", short_app, "app"),
    "instance": _text("INSTANCE", "instance"),
    "container": _text("CONTAINER", "container"),
    "class": _text("CLASS", "class"),
    "inside": _text("INSIDE", "inside"),
    "gpid": _made("GPID", gpid, lambda row: (row["dc"], row["node"], row["inside"], row["pid"])),
    "incarnation": _text("INCARNATION", "incarnation"),
    # who
    "pid": _number("PID", "pid"),
    "ppid": _number("PPID", "ppid"),
    "pgid": _number("PGID", "pgrp"),
    "sid": _number("SID", "session"),
    "tpgid": _number("TPGID", "tpgid"),
    "uid": _number("UID", "uid"),
    "user": _text("USER", "user"),
    "gid": _number("GID", "gid"),
    "group": _text("GROUP", "group"),
    "ruid": _number("RUID", "ruid"),
    "lwp": _made("LWP", lambda row: str(tid(row)), tid, right=True),
    # what
    "args": _made("COMMAND", command_of),
    "comm": _made("COMMAND", name_of),
    "fname": _made("COMMAND", lambda row: row["name"][:8]),
    "tty": _text("TT", "tty"),
    "s": _text("S", "state"),
    "stat": _text("STAT", "stat"),
    "f": _made("F", lambda row: f"{row['flags'] >> 6 & 7:o}", "flags", right=True),
    "psr": _number("PSR", "processor"),
    "wchan": Column("WCHAN", _dash, lambda row: 0),
    "addr": Column("ADDR", _dash, lambda row: 0),
    # scheduling
    "ni": _made("NI", _nice, "nice", right=True),
    "pri": _made("PRI", lambda row: str(39 - row["priority"]), "priority", right=True),
    "opri": _made("PRI", lambda row: str(60 + row["priority"]), "priority", right=True),
    "priority": _number("PRI", "priority"),
    "cls": _made("CLS", lambda row: POLICIES.get(row["policy"], "?"), "policy"),
    "sched": _number("SCH", "policy"),
    "rtprio": _made(
        "RTPRIO",
        lambda row: str(row["rt_priority"]) if row["policy"] else "-",
        "rt_priority",
        right=True,
    ),
    "nlwp": _number("NLWP", "threads"),
    # use
    "pcpu": _made("%CPU", lambda row: _percent(row["cpu_percent"]), "cpu_percent", right=True),
    "recent": _made("%NOW", _recent, lambda row: row["recent_cpu_percent"] or 0.0, right=True),
    "c": _made("C", lambda row: str(int(min(99, row["cpu_percent"]))), "cpu_percent", right=True),
    "cp": _made(
        "CP", lambda row: str(min(999, int(row["cpu_percent"] * 10))), "cpu_percent", right=True
    ),
    "time": _time("TIME", format_hours, "cpu_s"),
    "times": _time("TIME", lambda seconds: str(int(seconds)), "cpu_s"),
    "bsdtime": _time("TIME", format_minutes, "cpu_s"),
    "pmem": _made("%MEM", lambda row: f"{row['memory_percent']:.1f}", "memory_percent", right=True),
    "vsz": _number("VSZ", "vsz_kib"),
    "rss": _number("RSS", "rss_kib"),
    "sz": _made("SZ", lambda row: str(row["vsz_kib"] // PAGE_KIB), "vsz_kib", right=True),
    "min_flt": _number("MINFL", "minor_faults"),
    "maj_flt": _number("MAJFL", "major_faults"),
    # when
    "etime": _time("ELAPSED", format_elapsed, "elapsed_s"),
    "etimes": _time("ELAPSED", lambda seconds: str(int(seconds)), "elapsed_s"),
    "start_time": _moment("START", _start),
    "bsdstart": _moment(
        "START",
        lambda row, now: _started(row, now, "%H:%M" if row["elapsed_s"] < DAY_S else "%b %d"),
    ),
    "start": _moment(
        "STARTED",
        lambda row, now: _started(row, now, "%H:%M:%S" if row["elapsed_s"] < DAY_S else "%b %d"),
    ),
    "lstart": _moment("STARTED", lambda row, now: _started(row, now, "%a %b %e %H:%M:%S %Y")),
}

ALIASES: dict[str, tuple[str, str]] = {
    "%cpu": ("pcpu", "%CPU"),
    "%mem": ("pmem", "%MEM"),
    "cmd": ("args", "CMD"),
    "command": ("args", "COMMAND"),
    "ucmd": ("comm", "CMD"),
    "ucomm": ("comm", "COMMAND"),
    "cputime": ("time", "TIME"),
    "atime": ("time", "TIME"),
    "cputimes": ("times", "TIME"),
    "egid": ("gid", "EGID"),
    "egroup": ("group", "EGROUP"),
    "euid": ("uid", "EUID"),
    "euser": ("user", "EUSER"),
    "uname": ("user", "USER"),
    "flag": ("f", "F"),
    "flags": ("f", "F"),
    "intpri": ("opri", "PRI"),
    "majflt": ("maj_flt", "MAJFLT"),
    "minflt": ("min_flt", "MINFLT"),
    "nice": ("ni", "NI"),
    "pgrp": ("pgid", "PGRP"),
    "policy": ("cls", "POL"),
    "rssize": ("rss", "RSS"),
    "rsz": ("rss", "RSZ"),
    "sess": ("sid", "SESS"),
    "session": ("sid", "SESS"),
    "state": ("s", "S"),
    "spid": ("lwp", "SPID"),
    "stime": ("start_time", "STIME"),
    "tgid": ("pid", "TGID"),
    "tid": ("lwp", "TID"),
    "thcount": ("nlwp", "THCNT"),
    "tname": ("tty", "TTY"),
    "tt": ("tty", "TT"),
    "vsize": ("vsz", "VSZ"),
    "wname": ("wchan", "WCHAN"),
}
"""Other names of columns: which one, and the heading it has then."""


def find_column(name: str) -> Column | None:
    """By any of its names."""
    if name in ALIASES:
        base, heading = ALIASES[name]
        return COLUMNS[base]._replace(heading=heading)
    return COLUMNS.get(name)
