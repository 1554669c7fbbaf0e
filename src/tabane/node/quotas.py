"""What the operator of a cluster lets users have on each node: `limits.toml` in its directory.

It is read again when it has changed. One that has a mistake changes nothing, and is complained of
in the node's log; at an agent's start that is: nobody is limited.
"""

from __future__ import annotations

import logging
import pwd
import tomllib
from pathlib import Path

from tabane.errors import SpecError
from tabane.model import Value
from tabane.scheduler.quotas import Quota, Quotas
from tabane.spec import error_of, read_fields, read_text
from tabane.spec_readers import Field, Mistake, Section, Tables, as_size, as_text, whole
from tabane.units import shorten

log = logging.getLogger(__name__)

MOST_USERS = 10_000


class _User(Value, frozen=True):
    name: str
    instances: int | None = None
    memory_bytes: int | None = None
    starts: int | None = None


def _check(user: _User) -> None:
    _uid(user)


def _uid(user: _User) -> int:
    """Raises `Mistake`."""
    if user.name.isascii() and user.name.isdecimal():
        return int(user.name)
    try:
        return pwd.getpwnam(user.name).pw_uid
    except KeyError:
        problem = f"there is no user {shorten(user.name)} on this machine: a uid will do"
        raise Mistake("name", problem) from None


AMOUNTS = {
    "instances": Field("instances", whole(0)),
    "memory": Field("memory_bytes", as_size),
    "starts": Field("starts", whole(0)),
}
USER = {"name": Field("name", as_text)} | AMOUNTS
FIELDS: dict[str, Field | Section | Tables] = {
    "default": Section("default", Quota, AMOUNTS),
    "user": Tables("users", _User, USER, ("name",), _check, MOST_USERS),
}


def load_quotas(path: Path) -> Quotas:
    """Raises `SpecError`, also when it cannot be read."""
    text, file = read_text(path), str(path)
    try:
        read = read_fields(tomllib.loads(text), FIELDS)
    except RecursionError:
        raise SpecError(file, 0, "", "is nested too deeply") from None
    except Mistake as mistake:
        raise error_of(mistake, file=file, text=text) from None
    except ValueError as error:
        raise SpecError(file, 0, "", f"this is not TOML: {error}") from None
    users = {
        _uid(each): Quota(each.instances, each.memory_bytes, each.starts)
        for each in read.get("users", ())
    }
    return Quotas(read.get("default", Quota()), users)


class QuotaFile:
    """See the module's text."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._quotas = Quotas()

    def current(self) -> Quotas:
        """As it is now. Raises nothing."""
        try:
            info = self._path.stat()
            seen = info.st_mtime_ns, info.st_ino
        except FileNotFoundError:
            seen = None
        except OSError as error:
            log.error("%s cannot be read, what it said before still holds: %s", self._path, error)
            return self._quotas
        if seen != self._seen:
            self._seen = seen
            self._read(is_there=seen is not None)
        return self._quotas

    def _read(self, *, is_there: bool) -> None:
        try:
            self._quotas = load_quotas(self._path) if is_there else Quotas()
        except SpecError as error:
            log.error("%s; what it said before still holds", error)
