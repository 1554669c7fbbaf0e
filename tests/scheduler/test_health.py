"""What checks find, and what follows from it."""

from __future__ import annotations

import itertools

import pytest

from tabane.reactions import Health
from tabane.scheduler.health import Record

PROBLEM = "GET / is not answered within 2 s"


def record(**policy: float) -> Record:
    return Record(Health(http="/", **policy), 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("failures", [1, 2, 3])
@pytest.mark.parametrize("found", [f for n in range(7) for f in itertools.product("+-", repeat=n)])
def test_only_so_many_in_a_row_end_it(failures: int, found: tuple[str, ...]) -> None:
    """Every order of up to six checks: it ends with the first run of `failures` of them."""
    mine, told = record(failures=failures), ""
    for now, one in enumerate(found, 1):
        told = told or mine.on_check("" if one == "+" else PROBLEM, now)
    assert bool(told) == ("-" * failures in "".join(found))


def test_the_reason_says_what_and_how_often() -> None:
    mine = record(failures=2)
    assert mine.on_check(PROBLEM, 1.0) == ""
    assert mine.on_check(PROBLEM, 2.0) == f"unhealthy: {PROBLEM}, 2 times in a row"
    assert record(failures=1).on_check(PROBLEM, 1.0) == f"unhealthy: {PROBLEM}"


def test_what_begins_slowly_has_its_time() -> None:
    mine = record(failures=1, startup_s=30.0)
    assert [mine.on_check(PROBLEM, now) for now in (10.0, 29.9)] == ["", ""]
    assert mine.on_check(PROBLEM, 30.0)


def test_once_a_check_passed_it_has_begun() -> None:
    mine = record(failures=1, startup_s=30.0)
    assert mine.on_check("", 10.0) == ""
    assert mine.on_check(PROBLEM, 20.0)


def test_what_failed_before_a_rest_does_not_count_after_it() -> None:
    mine = record(failures=2)
    mine.on_check(PROBLEM, 1.0)
    mine.on_rest()
    assert mine.on_check(PROBLEM, 100.0) == ""
    assert mine.on_check(PROBLEM, 110.0)


def test_a_verdict_takes_as_long_as_its_checks() -> None:
    assert Health().verdict_s == 0.0
    policy = Health(tcp=True, interval_s=5.0, timeout_s=1.0, failures=2, startup_s=7.0)
    assert policy.verdict_s == 7.0 + 3 * 6.0
