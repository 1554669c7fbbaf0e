"""The formats of ps by their names (`aux`, `-f`, `-l`, ...), and those that people write (`-o`)."""

from __future__ import annotations

from collections.abc import Iterable

from tabane.errors import UsageError
from tabane.tools.cli.columns import COLUMNS, Column, find_column

PLACE = "dc node app class"
"""What stands before every format but one that people write themselves."""
FORMATS = {
    "": "pid user pcpu rss stat bsdtime args",
    "-f": "uid pid ppid c stime tname time cmd",
    "-F": "uid pid ppid c sz rss psr stime tname time cmd",
    "-l": "f s uid pid ppid c opri ni addr sz wchan tname time ucmd",
    "-ly": "s uid pid ppid c opri ni rss sz wchan tname time ucmd",
    "-lf": "f s user pid ppid c opri ni addr sz wchan stime tname time cmd",
    "-j": "pid pgid sid tname time ucmd",
    "-jf": "user pid ppid pgid sid c stime tname time cmd",
    "u": "user pid pcpu pmem vsz rss tname stat start_time bsdtime args",
    "l": "f uid pid ppid priority ni vsz rss wchan stat tname bsdtime args",
    "j": "ppid pid pgid sid tname tpgid stat uid bsdtime args",
}
MOST_CELLS = 1000


def named_format(name: str, *, numeric: bool = False) -> list[Column]:
    """A format of the table above. In the full ones UID is a name, unless numbers are asked for."""
    columns = [find_column(word) for word in f"{PLACE} {FORMATS[name]}".split()]
    found = [column for column in columns if column is not None]
    if name in ("-f", "-F", "-jf", "-lf"):
        user = COLUMNS["user"]._replace(heading="UID")
        found = [user if column.heading in ("UID", "USER") else column for column in found]
    if numeric:
        uid = COLUMNS["uid"]
        found = [
            uid._replace(heading=c.heading) if c.heading in ("UID", "USER") else c for c in found
        ]
    return found


def parse_columns(texts: Iterable[str]) -> list[Column]:
    """`pid,args`, `user:20`, `pid=`, `pid=PROCESS,comm=`. Raises `UsageError`."""
    words = [word for text in texts for word in text.replace(",", " ").split()]
    if not words:
        raise UsageError("ps: -o: name columns, as in -o pid,args (`tabane ps L` lists them)")
    return [_parse_column(word) for word in words]


def _parse_column(word: str) -> Column:
    name, equals, heading = word.partition("=")
    name, colon, width = name.partition(":")
    column = find_column(name.lower())
    if column is None:
        raise UsageError(f"ps: there is no column {name!r}: `tabane ps L` lists them")
    if colon:
        if not (width.isascii() and width.isdigit() and 0 < int(width[:5]) <= MOST_CELLS):
            raise UsageError(f"ps: {word!r}: a width is a number from 1 to {MOST_CELLS}")
        column = column._replace(width=int(width))
    return column._replace(heading=heading) if equals else column


def with_inserted(texts: Iterable[str]) -> list[Column]:
    """The columns of `-O`: these between the pid and what else ps shows."""
    before, after = f"{PLACE} pid".split(), ["s", "tname", "time", "args"]
    return [*parse_columns(before), *parse_columns(texts), *parse_columns(after)]


def parse_order(texts: Iterable[str]) -> list[tuple[Column, bool]]:
    """`-rss,+pid`: columns to sort by, each with whether from the largest. Raises `UsageError`."""
    found = []
    for word in (word for text in texts for word in text.replace(",", " ").split()):
        column = find_column(word.lstrip("+-").lower())
        if column is None:
            problem = f"ps: there is no column {word.lstrip('+-')!r} to sort by"
            raise UsageError(f"{problem}: `tabane ps L` lists them")
        found.append((column, word.startswith("-")))
    return found


def list_columns() -> list[str]:
    """`NAME HEADING` of each, by name."""
    from tabane.tools.cli.columns import ALIASES

    names = sorted({*COLUMNS, *ALIASES})
    return [f"{name:<12} {column.heading}" for name in names if (column := find_column(name))]
