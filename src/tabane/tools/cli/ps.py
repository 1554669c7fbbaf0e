"""`tabane ps`: the processes of all data centers, in the columns of ps.

`render` is a plain function from the nodes' rows to lines, with nothing in them that could move a
terminal's cursor. It imports little, for the command must be there at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from tabane.errors import NotFound, UsageError
from tabane.tools.cli.common import (
    Parser,
    app_key,
    cells_of,
    cells_of_char,
    pad,
    printable,
    say_silent,
)

Row = dict[str, Any]
DAY_S = 86400
LETTERS = frozenset("aAefluwx")
VALUED = ("--root", "--dc", "--node", "--app")
"""Options whose value is the next word."""
MOST_NAMED = 20


class Column(NamedTuple):
    """`show` makes the text of a row, given the present moment (seconds since the epoch)."""

    heading: str
    show: Callable[[Row, float], str]
    right: bool = False


def ps(argv: list[str]) -> int:
    args = _parse(argv)
    from tabane.tools.client import Cluster

    cluster = Cluster(args.root)
    answer = cluster.get("/api/v1/ps")
    rows = select(answer["processes"], dc=args.dc, node=args.node, app=args.app)
    if not rows:
        check_place(cluster.nodes, args.dc, args.node)
    if args.app is not None and not rows:
        check_app(app_key(args.app), cluster.get("/api/v1/apps")["apps"])
    code = say_silent(answer["silent"])
    if args.json:
        import json

        print(json.dumps({"processes": rows, "silent": answer["silent"]}, indent=2))
    else:
        from tabane.clock import SYSTEM

        print("\n".join(render(rows, style_of(args), SYSTEM.wall(), terminal_width())))
    return code or (0 if rows else 1)


def _parse(argv: list[str]) -> Any:
    parser = Parser("ps", "Processes of all nodes, with the app and class each belongs to.")
    parser.add_argument("-e", "-A", dest="every", action="store_true", help="all, as always here")
    parser.add_argument("-f", dest="full", action="store_true", help="parent and start too")
    parser.add_argument("-l", dest="full", action="store_true", help="the same")
    parser.add_argument("--dc", help="only of this data center")
    parser.add_argument("--node", help="only of this node")
    parser.add_argument("--app", help="only of this app's instances")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("letters", nargs="*", default=[], metavar="aux", help="as in `ps aux`")
    letters, rest = take_letters(argv)
    args = parser.parse_args(rest)
    if args.letters:
        raise UsageError(f"ps: {args.letters[0]!r} is not understood: write aux, -ef, or nothing")
    args.user_style = "u" in letters
    args.full = args.full or "-f" in letters or "l" in letters
    return args


def take_letters(argv: list[str]) -> tuple[set[str], list[str]]:
    """The letters of ps as people type them (`aux`, `-aux`, `fax`, `-ef`, `-l`, `auxww`), and the
    rest. `-f`, which means all columns, is told from `f`, which means a forest (not drawn here)."""
    letters: set[str] = set()
    rest = []
    for before, word in zip(["", *argv], argv, strict=False):
        plain = word.removeprefix("-")
        if before in VALUED or not plain or not set(plain) <= LETTERS:
            rest.append(word)
        elif "f" in plain and plain != word and "u" not in plain:
            letters |= {*plain, "-f"}
        else:
            letters |= {*plain}
    return letters, rest


def check_place(nodes: Sequence[str], dc: str | None, node: str | None) -> None:
    """Raises `NotFound` for a data center or a node that the cluster does not have."""
    datacenters = list(dict.fromkeys(key.partition("/")[0] for key in nodes))
    if dc is not None and dc not in datacenters:
        raise NotFound(f"there is no data center {dc}, only {', '.join(datacenters)}")
    if node is not None and not any(node in (key, key.partition("/")[2]) for key in nodes):
        raise NotFound(f"there is no node {node!r}, only {', '.join(nodes)}")


def check_app(key: str, apps: Iterable[dict[str, Any]]) -> None:
    """Raises `NotFound` for an app that is not there, rather than at rest."""
    known = [f"{app['namespace']}/{app['name']}" for app in apps]
    if key not in known:
        more = ", ..." if len(known) > MOST_NAMED else ""
        shown = ", ".join(known[:MOST_NAMED]) + more or "none at all"
        raise NotFound(f"there is no app {key}, only {shown}")


def style_of(args: Any) -> Sequence[Column]:
    if args.full:
        return FULL
    return USER if args.user_style else SHORT


def select(
    rows: Iterable[Row], *, dc: str | None = None, node: str | None = None, app: str | None = None
) -> list[Row]:
    """Rows of this data center, node (with its data center or without) and app, in order."""
    key = None if app is None else app_key(app)
    chosen = [
        row
        for row in rows
        if dc in (None, row["dc"])
        and node in (None, row["node"], f"{row['dc']}/{row['node']}")
        and key in (None, row["app"])
    ]
    return sorted(chosen, key=lambda row: (row["dc"], row["node"], row["pid"]))


def render(
    rows: Iterable[Row], columns: Sequence[Column], now: float, width: int | None
) -> list[str]:
    """A heading and a line for each row, cut to `width` if given. The last column is not padded."""
    table = [[column.heading for column in columns]]
    table += [[printable(column.show(row, now)) for column in columns] for row in rows]
    widths = [max(map(cells_of, texts)) for texts in zip(*table, strict=True)]
    lines = (
        " ".join(
            pad(text, 0 if column is columns[-1] else size, column.right)
            for text, column, size in zip(texts, columns, widths, strict=True)
        )
        for texts in table
    )
    return [clip(line, width) if width else line for line in lines]


def clip(text: str, width: int) -> str:
    """As much of it as fits."""
    if text.isascii():
        return text[:width]
    for end, char in enumerate(text):
        width -= cells_of_char(char)
        if width < 0:
            return text[:end]
    return text


def terminal_width() -> int | None:
    """Of the terminal that is written to; None when it is none."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError):
        return None


def _app(row: Row, now: float) -> str:
    app: str = row["app"]
    return app.removeprefix("default/") or "-"


def _minutes(row: Row, now: float) -> str:
    """CPU time as in `ps aux`."""
    minutes, seconds = divmod(int(row["cpu_s"]), 60)
    return f"{minutes}:{seconds:02}"


def _hours(row: Row, now: float) -> str:
    """CPU time as in `ps -ef`."""
    minutes, seconds = divmod(int(row["cpu_s"]), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{hours:02}:{minutes:02}:{seconds:02}"


def _start(row: Row, now: float) -> str:
    """By the reader's clock: nodes tell ages only, since their clocks may be wrong."""
    from datetime import datetime

    started = datetime.fromtimestamp(now - row["elapsed_s"])
    if row["elapsed_s"] < DAY_S:
        return f"{started:%H:%M}"
    return (
        f"{started:%b%d}" if started.year == datetime.fromtimestamp(now).year else f"{started:%Y}"
    )


def _of(key: str) -> Callable[[Row, float], str]:
    return lambda row, now: str(row[key]) or "-"


PLACE = (
    Column("DC", _of("dc")),
    Column("NODE", _of("node")),
    Column("APP", _app),
    Column("CLASS", _of("class")),
)
PID = Column("PID", _of("pid"), right=True)
CPU = Column("%CPU", lambda row, now: f"{row['cpu_percent']:.1f}", right=True)
RSS = Column("RSS", _of("rss_kib"), right=True)
TTY = Column("TTY", _of("tty"))
STAT = Column("STAT", _of("stat"))

SHORT: Sequence[Column] = (
    *PLACE,
    PID,
    Column("USER", _of("user")),
    CPU,
    RSS,
    STAT,
    Column("TIME", _minutes, right=True),
    Column("COMMAND", _of("command")),
)
USER: Sequence[Column] = (
    *PLACE,
    Column("USER", _of("user")),
    PID,
    CPU,
    Column("%MEM", lambda row, now: f"{row['memory_percent']:.1f}", right=True),
    Column("VSZ", _of("vsz_kib"), right=True),
    RSS,
    TTY,
    STAT,
    Column("START", _start, right=True),
    Column("TIME", _minutes, right=True),
    Column("COMMAND", _of("command")),
)
FULL: Sequence[Column] = (
    *PLACE,
    Column("UID", _of("user")),
    PID,
    Column("PPID", _of("ppid"), right=True),
    Column("C", lambda row, now: str(int(min(99, row["cpu_percent"]))), right=True),
    Column("STIME", _start, right=True),
    TTY,
    Column("TIME", _hours, right=True),
    Column("CMD", _of("command")),
)
