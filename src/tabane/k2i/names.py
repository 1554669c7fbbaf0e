"""Names for the kernel's numbers: users, groups, terminals."""

from __future__ import annotations

import grp
import pwd
from functools import cache
from os import major, minor
from pathlib import Path

_PTY_MAJORS = range(136, 144)
_TTY_MAJOR = 4


class Names:
    """Of users and groups. They are looked up once, since the same few are asked for again and
    again, until `refresh`: names change."""

    def __init__(self) -> None:
        self._users: dict[int, str] = {}
        self._groups: dict[int, str] = {}

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

    def refresh(self) -> bool:
        """Look all up again; whether any name changed."""
        users = {uid: _look_up_user(uid) for uid in self._users}
        groups = {gid: _look_up_group(gid) for gid in self._groups}
        changed = users != self._users or groups != self._groups
        self._users, self._groups = users, groups
        return changed


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
