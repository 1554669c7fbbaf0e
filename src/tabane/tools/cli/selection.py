"""Which processes ps shows: a plain function from its lists (`-p`, `-u`, `-C`, ...) to a test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from tabane.errors import UsageError
from tabane.tools.cli.columns import gpid
from tabane.tools.cli.common import Row

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

    def all_users(self) -> list[str]:
        """Names and numbers. Raises `UsageError`."""
        return split(self.program, [*self.users, *self.real_users])


def split(program: str, texts: Iterable[str]) -> list[str]:
    """`1,2 3` is three words. Raises `UsageError` for an empty list, which would choose all."""
    words = []
    for text in texts:
        found = text.replace(",", " ").split()
        if not found:
            raise UsageError(f"{program}: an empty list names nobody: leave the option out")
        words += found
    return words


def tests_of(lists: Lists, rows: Iterable[Row]) -> list[Test]:
    """A test for each list that names something. Raises `UsageError`."""

    def words(texts: Iterable[str]) -> list[str]:
        return split(lists.program, texts)

    def numbers(texts: Iterable[str]) -> list[int]:
        return [number(lists.program, word) for word in words(texts)]

    return [
        *_pid_tests(lists.program, words(lists.pids)),
        *_number_tests("ppid", numbers(lists.ppids)),
        *_number_tests("session", numbers(lists.sessions)),
        *_owner_tests("uid", "user", words(lists.users)),
        *_real_user_tests(words(lists.real_users), rows),
        *_owner_tests("gid", "group", words(lists.groups)),
        *_word_tests(words(lists.names), lambda row, word: row["name"][:15] == word[:15]),
        *_word_tests(words(lists.terminals), lambda row, word: row["tty"] in (word, f"tty{word}")),
    ]


def _pid_tests(program: str, words: Sequence[str]) -> list[Test]:
    """By pid on any node, or by `dc/node:pid`."""
    places = {word for word in words if ":" in word}
    pids = {number(program, word) for word in words if ":" not in word}
    return [lambda row: row["pid"] in pids or gpid(row) in places] if words else []


def _number_tests(field: str, numbers: Sequence[int]) -> list[Test]:
    found = set(numbers)
    return [lambda row: row[field] in found] if numbers else []


def _owner_tests(id_field: str, name_field: str, words: Sequence[str]) -> list[Test]:
    """By name or number."""
    found = set(words)
    return [lambda row: row[name_field] in found or str(row[id_field]) in found] if words else []


def _real_user_tests(words: Sequence[str], rows: Iterable[Row]) -> list[Test]:
    """Nodes tell real users by number; their names are those of other processes there."""
    if not words:
        return []
    names = {(row["node"], row["uid"]): row["user"] for row in rows}

    def test(row: Row) -> bool:
        return str(row["ruid"]) in words or names.get((row["node"], row["ruid"])) in words

    return [test]


def _word_tests(words: Sequence[str], matches: Callable[[Row, str], bool]) -> list[Test]:
    found = [word.removeprefix("/dev/") for word in words]
    return [lambda row: any(matches(row, word) for word in found)] if words else []


def number(program: str, word: str) -> int:
    """Raises `UsageError` for what is no number."""
    if not (word.isascii() and word.isdigit() and len(word) < 12 and int(word) < LARGEST):
        raise UsageError(f"{program}: {word!r} is no number")
    return int(word)
