"""Processes as a tree: parents before their children, each with its depth."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from tabane.k2i.table import Process

Key = tuple[str, str, int]


class Branch(Process, frozen=True, gc=False, kw_only=True):
    """A process in the tree. Its children follow it, one deeper, before its next sibling."""

    depth: int
    children: int


def grow(processes: Iterable[Process]) -> list[Branch]:
    """In the order of a tree drawn from top to bottom. Roots are those whose parent is not among
    the processes, or whose parent's pid was given to a younger process; siblings are in the order
    of their pids. Not recursive: chains of processes may be longer than Python's stack."""
    all_of_them = sorted(processes, key=_key)
    known = {_key(process): process for process in all_of_them}
    children: dict[Key, list[Process]] = {}
    roots: list[Process] = []
    for process in all_of_them:
        parent = known.get((*_key(process)[:2], process.ppid))
        if parent is None or parent is process or parent.start_ticks > process.start_ticks:
            roots.append(process)
        else:
            children.setdefault(_key(parent), []).append(process)
    found = []
    todo = [(process, 0) for process in reversed(roots)]
    while todo:
        process, depth = todo.pop()
        below = children.get(_key(process), [])
        values = msgspec.structs.asdict(process)
        found.append(Branch(**values, depth=depth, children=len(below)))
        todo += [(child, depth + 1) for child in reversed(below)]
    return found


def _key(process: Process) -> Key:
    """A process inside a virtual machine has a pid of that machine's own."""
    return process.inside, process.instance if process.inside else "", process.pid
