"""Mounted file systems and how full they are, as df(1) shows them.

To ask a file system for anything may block for ever when it is another machine's or a user's
program. That is done on a thread each, with a deadline; what is late is not asked again before that
thread has come back.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from posixpath import normpath
from typing import TypeVar

from msgspec.structs import replace

from tabane.k2i.host import NOWHERE, Place, Placed

DEADLINE_S = 1.0
BLOCKING = ("nfs", "cifs", "smb", "fuse", "ceph", "9p", "glusterfs", "lustre", "afs", "ocfs2")
"""What the names of such file systems' types begin with."""
UNASKED = ("autofs",)
"""To look at one would mount it."""
NO_ANSWER = "it does not answer"
MOST_LATE = 16
"""Threads that wait for an answer, of each kind of question."""
OUT_OF_REACH = (os.strerror(errno.ENOENT), os.strerror(errno.EACCES))

T = TypeVar("T")
Sizes = dict[str, int]
"""What `Mount` says of how full it is."""

_ESCAPE = re.compile(r"\\([0-7]{3})")


class Mount(Placed, frozen=True, kw_only=True):
    """A mount of the node's own mount namespace. Sizes are null, and `problem` says why, where
    there was no answer."""

    device: str
    type: str
    mount_point: str
    root: str
    """Which directory of the file system is mounted there."""
    device_id: str
    """`major:minor`: equal for mounts of one file system."""
    options: str
    read_only: bool
    size_kib: int | None = None
    used_kib: int | None = None
    available_kib: int | None = None
    """To users other than root."""
    used_percent: int | None = None
    """As df reckons: of what users may have, rounded up."""
    inodes: int | None = None
    inodes_used: int | None = None
    inodes_free: int | None = None
    problem: str = ""
    hidden: bool = False
    """Whether that is since it cannot be got to: another mount lies over it, or it is its owner's
    alone."""
    file: str = ""
    """The file that was asked for, which lies on it. Where there is none, all else is empty, and
    `problem` says so."""


def parse_mount(line: str, place: Place = NOWHERE) -> Mount:
    """A line of /proc/PID/mountinfo, proc_pid_mountinfo(5)."""
    before, _, after = line.partition(" - ")
    _, _, device_id, root, mount_point, options, *_ = before.split(" ")
    kind, device, _ = after.split(" ", 2)
    return Mount(
        **place._asdict(),
        device=_unescape(device),
        type=_unescape(kind),
        mount_point=_unescape(mount_point),
        root=_unescape(root),
        device_id=device_id,
        options=options,
        read_only="ro" in options.split(","),
    )


def _unescape(text: str) -> str:
    """Blanks, tabs, newlines and backslashes stand there as octal numbers."""
    return _ESCAPE.sub(lambda found: chr(int(found[1], 8)), text)


def sizes(stat: os.statvfs_result) -> Sizes:

    def kib(blocks: int) -> int:
        return blocks * stat.f_frsize >> 10

    used = stat.f_blocks - stat.f_bfree
    usable = used + stat.f_bavail
    return {
        "size_kib": kib(stat.f_blocks),
        "used_kib": kib(used),
        "available_kib": kib(stat.f_bavail),
        "used_percent": -(-100 * used // usable) if usable else 0,
        "inodes": stat.f_files,
        "inodes_used": stat.f_files - stat.f_ffree,
        "inodes_free": stat.f_ffree,
    }


class Waiting:
    """Work that may never end, each on a thread of its own."""

    def __init__(self) -> None:
        self._late: dict[str, threading.Thread] = {}

    def run(self, key: str, work: Callable[[], T]) -> T | str:
        """What it returns, or `NO_ANSWER` when that takes too long, when work of this key is late
        already, or too much of any."""
        self._late = {name: late for name, late in self._late.items() if late.is_alive()}
        if key in self._late or len(self._late) >= MOST_LATE:
            return NO_ANSWER
        answers: list[T] = []
        thread = threading.Thread(
            target=lambda: answers.append(work()), name=f"look at {key}", daemon=True
        )
        thread.start()
        thread.join(DEADLINE_S)
        if answers:
            return answers[0]
        self._late[key] = thread
        return NO_ANSWER


class MountReader:
    """Reads the mounts of the process it is in. For any thread."""

    def __init__(self, place: Place = NOWHERE, *, root: Path = Path("/proc")) -> None:
        self._place = place
        self._file = root / "self" / "mountinfo"
        self._sizes, self._lookups = Waiting(), Waiting()

    def read(self) -> list[Mount]:
        return [self._measure(mount) for mount in self._parse()]

    def read_holding(self, files: Iterable[str], *, looks: bool) -> list[Mount]:
        """Where each of these files lies. `looks`: whether there is one, and where links lead; else
        it is where such a file would be."""
        mounts = self._parse()
        return [self._find(file, mounts, looks=looks) for file in files]

    def _find(self, file: str, mounts: Sequence[Mount], *, looks: bool) -> Mount:
        path = self._lookups.run(file, partial(_resolve, file)) if looks else normpath(file)
        if not path.startswith("/"):
            return _nowhere(self._place, file, path)
        mount = nearest(path, mounts)
        return replace(self._measure(mount), file=file) if mount else _nowhere(self._place, file)

    def _parse(self) -> list[Mount]:
        text = self._file.read_bytes().decode("utf-8", "surrogateescape")
        return [parse_mount(line, self._place) for line in text.splitlines()]

    def _measure(self, mount: Mount) -> Mount:
        found: Sizes | str = {}
        if mount.type.startswith(BLOCKING):
            found = self._sizes.run(mount.mount_point, partial(_ask, mount.mount_point))
        elif mount.type not in UNASKED:
            found = _ask(mount.mount_point)
        if isinstance(found, str):
            return replace(_printable(mount), problem=found, hidden=found in OUT_OF_REACH)
        return replace(_printable(mount), **found)


def nearest(path: str, mounts: Sequence[Mount]) -> Mount | None:
    """The mount that a path is below of; the last of several at one place. (None is above a
    directory that was made a process's root without being a mount.)"""

    def is_above(mount: Mount) -> bool:
        return f"{path}/".startswith(mount.mount_point.rstrip("/") + "/")

    above = filter(is_above, reversed(mounts))
    return max(above, key=lambda mount: len(mount.mount_point), default=None)


def _nowhere(place: Place, file: str, problem: str = "it is on no mount") -> Mount:
    return Mount(
        **place._asdict(),
        device="",
        type="",
        mount_point="",
        root="",
        device_id="",
        options="",
        read_only=False,
        problem=problem,
        hidden=problem in OUT_OF_REACH,
        file=file,
    )


def _resolve(path: str) -> str:
    """Where its links lead, which begins with a slash, or why there is no such file."""
    try:
        return os.path.realpath(path, strict=True)
    except (OSError, ValueError) as error:
        return os.strerror(getattr(error, "errno", None) or errno.ENOENT)


def _ask(path: str) -> Sizes | str:
    """Its sizes, or why there are none."""
    try:
        return sizes(os.statvfs(path))
    except OSError as error:
        return os.strerror(error.errno or 0)


def _printable(mount: Mount) -> Mount:
    """Names that are not UTF-8 as `\\xff`."""
    texts = {
        name: os.fsencode(text).decode("utf-8", "backslashreplace")
        for name in ("device", "mount_point", "root")
        if not (text := getattr(mount, name)).isascii()
    }
    return replace(mount, **texts) if texts else mount
