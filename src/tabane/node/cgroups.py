"""The machine's cgroup hierarchies, version 1 or 2, and removing a subtree from all of them."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import NamedTuple

from tabane.clock import SYSTEM
from tabane.errors import TimedOut

_PAUSE_S = 0.002


class Hierarchies(NamedTuple):
    """Where they are mounted. A *hybrid* machine has controllers in version 1 and an empty 2."""

    v1: tuple[Path, ...]
    v2: tuple[Path, ...]

    @property
    def is_hybrid(self) -> bool:
        return bool(self.v1 and self.v2)


def parse_hierarchies(mountinfo: str) -> Hierarchies:
    """Read them from the text of /proc/self/mountinfo (proc(5))."""
    found: dict[str, list[Path]] = {"cgroup": [], "cgroup2": []}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind = after.split(" ", 1)[0]
        if kind in found:
            found[kind].append(Path(before.split()[4]))
    return Hierarchies(tuple(found["cgroup"]), tuple(found["cgroup2"]))


def find_hierarchies() -> Hierarchies:
    return parse_hierarchies(Path("/proc/self/mountinfo").read_text())


def remove_cgroups(path: str, *, timeout_s: float = 5.0) -> None:
    """Remove the cgroup `path` and all below it from every hierarchy, once its processes are gone.

    Blocks. What is not there is fine. Raises `TimedOut` when there still are processes in it.
    """
    found = find_hierarchies()
    deadline = SYSTEM.now() + timeout_s
    for root in (*found.v1, *found.v2):
        _remove_tree(root / path.lstrip("/"), deadline)


def _remove_tree(top: Path, deadline: float) -> None:
    for directory, _, _ in os.walk(top, topdown=False):
        while not _removed(Path(directory)):
            if SYSTEM.now() > deadline:
                raise TimedOut(f"cgroup {directory} still has processes: end them, then try again")
            time.sleep(_PAUSE_S)  # the kernel tells no event when a version 1 cgroup gets empty


def _removed(directory: Path) -> bool:
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True
