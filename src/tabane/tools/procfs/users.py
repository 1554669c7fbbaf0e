"""Users of other nodes by name, as tools here will look them up.

Tools get a number from /proc and look its name up on this machine. So a user of another node shows
as the number that has the same name here. One whose name is not known here, and a number without a
name there that has one here, gets a number of the view's own from `FIRST` up; the shell's own
/etc/passwd names them. A number that has a name neither there nor here stays as it is. Groups are
treated in the same way.
"""

from __future__ import annotations

import grp
import pwd
from collections.abc import Callable, Mapping
from contextlib import suppress

FIRST = 4_100_000_000
"""Below the largest uid (-1 is none), above what user namespaces are given."""


_Entry = pwd.struct_passwd | grp.struct_group
"""The third of its fields is the number."""


class Owners:
    """Numbers of users, or of groups, of one view."""

    def __init__(self, find: Callable[[str], int | None], has_name: Callable[[int], bool]) -> None:
        """`find` says the number of a name on this machine; `has_name` whether a number has one."""
        self._find = find
        self._has_name = has_name
        self._own: dict[str, int] = {}
        """Numbers of the view's own, by the names they show."""
        self._known: dict[tuple[int, str], int] = {}

    @property
    def own(self) -> Mapping[str, int]:
        """The numbers that only this view has, by name."""
        return self._own

    def of(self, number: int, names: Mapping[int, str]) -> int:
        """The number here of a node's, whose own `names` are given."""
        name = names.get(number, "")
        key = (number, name)
        if key not in self._known:
            self._known[key] = self._choose(number, name)
        return self._known[key]

    def _choose(self, number: int, name: str) -> int:
        if name and (found := self._find(name)) is not None:
            return found
        if not name and not self._has_name(number):
            return number
        return self._own.setdefault(name or f"uid-{number}", FIRST + len(self._own))


def local_users() -> Owners:
    """Users, by this machine's database."""
    return _local(pwd.getpwnam, pwd.getpwuid)


def local_groups() -> Owners:
    """Groups, by this machine's database."""
    return _local(grp.getgrnam, grp.getgrgid)


def _local(by_name: Callable[[str], _Entry], by_number: Callable[[int], _Entry]) -> Owners:
    def find(name: str) -> int | None:
        with suppress(KeyError):
            return by_name(name)[2]
        return None

    def has_name(number: int) -> bool:
        with suppress(KeyError):
            return bool(by_number(number))
        return False

    return Owners(find, has_name)
