"""Who is whose child: processes as trees, one or more per node, and how ps draws them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from tabane.tools.cli.common import Row

Key = tuple[str, str, str, int]


class Branch(NamedTuple):
    """A process and its children, both in the order of the rows."""

    row: Row
    children: list[Branch]


def key_of(row: Row) -> Key:
    """What is inside of an instance has pids of its own."""
    inside = row["instance"] if row["inside"] else ""
    return row["dc"], row["node"], inside, row["pid"]


def grow(rows: Sequence[Row]) -> list[Branch]:
    """The trees of these rows: who has no parent among them is a root. Siblings keep the rows'
    order. Whoever is in a circle of parents (pids that changed hands while they were read) is
    taken for a root, so that nobody is lost."""
    branches = {key_of(row): Branch(row, []) for row in rows}
    parents: dict[Key, Key] = {}
    roots = []
    for key, branch in branches.items():
        parent = (*key[:3], branch.row["ppid"])
        if parent not in branches or _descends(parent, key, parents):
            roots.append(branch)
        else:
            parents[key] = parent
            branches[parent].children.append(branch)
    return roots


def _descends(key: Key, from_: Key, parents: dict[Key, Key]) -> bool:
    found: Key | None = key
    while found is not None and found != from_:
        found = parents.get(found)
    return found == from_


def walk(roots: Iterable[Branch]) -> Iterator[Branch]:
    """Every branch, parents before children. Not recursive: a chain may be thousands long."""
    waiting = list(roots)
    while waiting:
        branch = waiting.pop()
        yield branch
        waiting += branch.children


def flatten(roots: Iterable[Branch]) -> Iterator[tuple[Row, tuple[bool, ...]]]:
    """Each row with, for every level above it but the root's, whether that branch is its parent's
    last; in the order of the drawing."""
    waiting: list[tuple[Branch, tuple[bool, ...]]] = [(root, ()) for root in reversed(list(roots))]
    while waiting:
        branch, above = waiting.pop()
        yield branch.row, above
        last = len(branch.children) - 1
        waiting += [(branch.children[n], (*above, n == last)) for n in range(last, -1, -1)]


def forest_prefix(above: tuple[bool, ...]) -> str:
    r"""As `ps -ef --forest` draws it: ` |   \_ `."""
    if not above:
        return ""
    return "".join("    " if last else " |  " for last in above[:-1]) + r" \_ "


def indent_prefix(above: tuple[bool, ...]) -> str:
    """As `ps -eH` does: two blanks a level."""
    return "  " * len(above)
