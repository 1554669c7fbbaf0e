"""Names for the kernel's numbers: users, groups, terminals."""

from __future__ import annotations

import grp
import pwd
from functools import cache
from os import major, minor
from pathlib import Path

_PTY_MAJORS = range(136, 144)
_TTY_MAJOR = 4


ACCOUNTS = (Path("/etc/passwd"), Path("/etc/group"))
ELSEWHERE_S = 60.0
"""So often names are looked up again while `ACCOUNTS` do not change: a directory service may have
them. There may be a user for each instance, and each costs a look through these files."""
MOST = 4096
"""Of instances that are long gone there are names, too: beyond so many, all are forgotten."""


class Names:
    """Of users and groups. They are looked up once, since the same few are asked for again and
    again, until `refresh`: names change."""

    def __init__(self) -> None:
        self._users: dict[int, str] = {}
        self._groups: dict[int, str] = {}
        self._accounts: list[tuple[int, int, int]] = []
        self._looked_at = float("-inf")

    def user(self, uid: int) -> str:
        """The uid itself when nobody has it."""
        name = self._users.get(uid)
        if name is None:
            name = self._users[uid] = _look_up_user(uid)
        return name

    def group(self, gid: int) -> str:
        name = self._groups.get(gid)
        if name is None:
            name = self._groups[gid] = _look_up_group(gid)
        return name

    def refresh(self, now: float) -> bool:
        """Look all up again, if they may have changed; whether any name has, or may have."""
        accounts = [_state_of(path) for path in ACCOUNTS]
        if accounts == self._accounts and now - self._looked_at < ELSEWHERE_S:
            return False
        self._accounts, self._looked_at = accounts, now
        if len(self._users) + len(self._groups) > MOST:
            self._users, self._groups = {}, {}
            return True
        users = {uid: _look_up_user(uid) for uid in self._users}
        groups = {gid: _look_up_group(gid) for gid in self._groups}
        changed = users != self._users or groups != self._groups
        self._users, self._groups = users, groups
        return changed


def _state_of(path: Path) -> tuple[int, int, int]:
    """What differs when a file was written, or another one put in its place."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0, 0
    return status.st_ino, status.st_mtime_ns, status.st_size


def _look_up_user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _look_up_group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


@cache
def terminal(number: int) -> str:
    """As ps shows a controlling terminal: `pts/3`, `tty1`, `?` for none."""
    if not number:
        return "?"
    kind, which = major(number), minor(number)
    if kind in _PTY_MAJORS:
        return f"pts/{(kind - _PTY_MAJORS.start) * 256 + which}"
    if kind == _TTY_MAJOR:
        return f"tty{which}" if which < 64 else f"ttyS{which - 64}"
    try:
        uevent = Path(f"/sys/dev/char/{kind}:{which}/uevent").read_text()
    except OSError:
        return "?"
    return next((s[8:] for s in uevent.splitlines() if s.startswith("DEVNAME=")), "?")
