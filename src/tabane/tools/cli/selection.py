"""Which processes ps shows: a plain function from its lists (`-p`, `-u`, `-C`, ...) to a test."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from tabane.errors import UsageError
from tabane.tools.cli.columns import Row, gpid

Test = Callable[[Row], bool]
LARGEST = 1 << 32


class Lists(NamedTuple):
    """What was named; a row is chosen when it is in any of these. Empty ones choose nothing."""

    pids: Iterable[str] = ()
    ppids: Iterable[str] = ()
    sessions: Iterable[str] = ()
    users: Iterable[str] = ()
    real_users: Iterable[str] = ()
    groups: Iterable[str] = ()
    names: Iterable[str] = ()
    terminals: Iterable[str] = ()
    program: str = "ps"
    """Who says what is wrong with them."""


def split(texts: Iterable[str]) -> list[str]:
    """`1,2 3` is three words."""
    return [word for text in texts for word in text.replace(",", " ").split()]


def tests_of(lists: Lists, rows: Iterable[Row]) -> list[Test]:
    """A test for each list that names something. Raises `UsageError` for an empty list."""
    return [
        *_pid_tests(lists.program, lists.pids),
        *_number_tests(lists.program, "ppid", lists.ppids),
        *_number_tests(lists.program, "session", lists.sessions),
        *_owner_tests("uid", "user", lists.users),
        *_real_user_tests(lists.real_users, rows),
        *_owner_tests("gid", "group", lists.groups),
        *_word_tests(lists.names, lambda row, word: row["name"][:15] == word[:15]),
        *_word_tests(lists.terminals, lambda row, word: row["tty"] in (word, f"tty{word}")),
    ]


def _pid_tests(program: str, texts: Iterable[str]) -> list[Test]:
    """By pid on any node, or by `dc/node:pid`."""
    words = split(texts)
    places = {word for word in words if ":" in word}
    pids = {number(program, word) for word in words if ":" not in word}
    if texts and not words:
        raise UsageError(f"{program}: -p: name processes, as in -p 1,2")
    return [lambda row: row["pid"] in pids or gpid(row) in places] if words else []


def _number_tests(program: str, field: str, texts: Iterable[str]) -> list[Test]:
    numbers = {number(program, word) for word in split(texts)}
    return [lambda row: row[field] in numbers] if numbers else []


def _owner_tests(id_field: str, name_field: str, texts: Iterable[str]) -> list[Test]:
    """By name or number."""
    words = set(split(texts))
    if not words:
        return []
    return [lambda row: row[name_field] in words or str(row[id_field]) in words]


def _real_user_tests(texts: Iterable[str], rows: Iterable[Row]) -> list[Test]:
    """Nodes tell real users by number; their names are those of other processes there."""
    words = set(split(texts))
    if not words:
        return []
    names = {(row["node"], row["uid"]): row["user"] for row in rows}

    def test(row: Row) -> bool:
        return str(row["ruid"]) in words or names.get((row["node"], row["ruid"])) in words

    return [test]


def _word_tests(texts: Iterable[str], matches: Callable[[Row, str], bool]) -> list[Test]:
    words = [word.removeprefix("/dev/") for word in split(texts)]
    return [lambda row: any(matches(row, word) for word in words)] if words else []


def number(program: str, word: str) -> int:
    """Raises `UsageError` for what is no number."""
    if not (word.isascii() and word.isdigit() and len(word) < 12 and int(word) < LARGEST):
        raise UsageError(f"{program}: {word!r} is no number")
    return int(word)
