"""Numbers and users: the same for the same, never two things."""

from __future__ import annotations

import pytest

from tabane.tools.procfs import numbers
from tabane.tools.procfs.numbers import FIRST, Key, Numbers
from tabane.tools.procfs.users import FIRST as FIRST_USER
from tabane.tools.procfs.users import Owners

ONE = Key("tokyo/a", "first", 7, 100)


def test_numbers_are_dense_and_above_every_pid() -> None:
    given = Numbers()
    keys = [ONE._replace(pid=pid) for pid in range(1, 100)]
    assert [given.of(key) for key in keys] == list(range(4_194_305, 4_194_305 + 99))
    assert [given.of(key) for key in keys] == list(range(FIRST, FIRST + 99))


@pytest.mark.parametrize(
    "other",
    [ONE._replace(start=200), ONE._replace(incarnation="second"), ONE._replace(node="osaka/a")],
)
def test_another_process_has_another_number(other: Key) -> None:
    given = Numbers()
    assert given.of(other) != given.of(ONE)


def test_a_number_is_not_given_again() -> None:
    given = Numbers()
    first = given.of(ONE)
    kept = given.of(ONE._replace(node="osaka/a"))
    given.forget({"tokyo/a"}, set())
    assert len(given) == 1
    assert given.of(ONE) not in (first, kept)
    assert given.of(ONE._replace(node="osaka/a")) == kept


def test_there_is_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "LAST", FIRST)
    given = Numbers()
    given.of(ONE)
    with pytest.raises(OverflowError, match="open the shell anew"):
        given.of(ONE._replace(pid=8))


def test_users_are_known_by_name() -> None:
    here = {"root": 0, "alice": 1000, "www": 33}
    owners = Owners(here.get, lambda number: number in here.values())
    there = {0: "root", 1000: "bob", 1001: "alice"}
    assert owners.of(0, there) == 0
    assert owners.of(1001, there) == 1000, "alice has another number there"
    assert owners.of(1000, there) == FIRST_USER, "bob is nobody here, and not alice"
    assert owners.of(33, there) == FIRST_USER + 1, "33 is nobody there, and not our www"
    assert owners.of(1_000_000, there) == 1_000_000, "nobody on both"
    assert owners.of(1000, {1000: "carol"}) == FIRST_USER + 2, "another node's"
    assert owners.own == {"bob": FIRST_USER, "uid-33": FIRST_USER + 1, "carol": FIRST_USER + 2}
