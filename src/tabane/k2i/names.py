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
    """Of users and groups. To be made anew for each snapshot: names change, and a snapshot asks
    for the same few again and again."""

    def __init__(self) -> None:
        self._users: dict[int, str] = {}
        self._groups: dict[int, str] = {}

    def user(self, uid: int) -> str:
        """The uid itself when nobody has it."""
        if uid not in self._users:
            try:
                self._users[uid] = pwd.getpwuid(uid).pw_name
            except KeyError:
                self._users[uid] = str(uid)
        return self._users[uid]

    def group(self, gid: int) -> str:
        if gid not in self._groups:
            try:
                self._groups[gid] = grp.getgrgid(gid).gr_name
            except KeyError:
                self._groups[gid] = str(gid)
        return self._groups[gid]


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
