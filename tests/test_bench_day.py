"""The recorded day that `bench/efficiency.py` plays."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.benches import load_bench

day = load_bench("day")


def test_the_file_is_what_its_generator_makes() -> None:
    assert day.load_day() == day.make_day()


def test_it_is_read_as_it_was_written() -> None:
    other = day.make_day(seed=7)
    assert day.parse_day(day.encode_day(other)) == other
    assert other != day.load_day()


def test_few_apps_have_almost_all_sessions_as_measured_elsewhere() -> None:
    share = day.popular_share(day.load_day())
    assert share == pytest.approx(day.POPULAR_SESSIONS, abs=0.002)


def test_there_is_a_quiet_and_a_busy_time_of_the_day() -> None:
    recorded = day.load_day()
    crowded = {crowd.app for crowd in recorded.crowds}
    hours = Counter(int(one.at // 3600) for one in recorded.sessions if one.app not in crowded)
    quiet, busy = hours[3], hours[15]
    assert quiet / busy == pytest.approx(day.LEAST, abs=0.07)


def test_a_flash_crowd_comes_to_an_app_that_hardly_anybody_asks_for() -> None:
    recorded = day.load_day()
    for crowd in recorded.crowds:
        times = [one.at for one in recorded.sessions if one.app == crowd.app]
        inside = [at for at in times if crowd.begins <= at <= crowd.ends]
        assert len(inside) >= day.CROWD_SESSIONS
        assert len(times) - len(inside) < 10
