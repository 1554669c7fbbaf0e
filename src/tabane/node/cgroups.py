"""The machine's cgroup hierarchies, version 1 or 2: making and removing a subtree in all."""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tabane.clock import SYSTEM
from tabane.errors import TimedOut

_PAUSE_S = 0.002
V1_STATE, V2_FREEZE = "freezer.state", "cgroup.freeze"


class Hierarchies(NamedTuple):
    """Where they are mounted. A *hybrid* machine has controllers in version 1 and an empty 2."""

    v1: tuple[Path, ...]
    v2: tuple[Path, ...]

    @property
    def roots(self) -> tuple[Path, ...]:
        return self.v1 + self.v2

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


def make_cgroups(path: str) -> None:
    """Make the cgroup `path` in every hierarchy. While it is there, those above it stay."""
    for root in find_hierarchies().roots:
        while not _made(root / path.lstrip("/")):
            pass


def _made(directory: Path) -> bool:
    """False when another cluster removed one above it just then."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:
        return False
    return True


def thaw_cgroups(path: str) -> None:
    """Let all that is frozen in the cgroup `path` and below it run: it would not end when it is
    killed, nor its pid namespace. What is not there is fine."""
    for root in find_hierarchies().roots:
        for directory, _, files in os.walk(root / path.lstrip("/")):
            for name, thawed in ((V1_STATE, "THAWED"), (V2_FREEZE, "0")):
                if name in files:
                    with suppress(FileNotFoundError):
                        Path(directory, name).write_text(thawed)


def remove_cgroups(path: str, *, timeout_s: float = 5.0) -> None:
    """Remove the cgroup `path` and all below it from every hierarchy, once its processes are gone,
    and those above it that have no others.

    Blocks. What is not there is fine. Raises `TimedOut` when there still are processes in it.
    """
    deadline = SYSTEM.now() + timeout_s
    for root in find_hierarchies().roots:
        top = root / path.lstrip("/")
        _remove_tree(top, deadline)
        for above in top.parents:
            if above == root or not _removed(above):
                break


def _remove_tree(top: Path, deadline: float) -> None:
    for directory, _, _ in os.walk(top, topdown=False):
        while not _removed(Path(directory)):
            if SYSTEM.now() > deadline:
                raise TimedOut(f"cgroup {directory} still has processes: end them, then try again")
            time.sleep(_PAUSE_S)  # the kernel tells no event when a version 1 cgroup gets empty


def _removed(directory: Path) -> bool:
    """Whether it is gone; False while there are processes or other cgroups in it."""
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise
        return False
    return True
