"""Moments of crontab lines, also where clocks change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from tabane.cron import check_cron, check_timezone, latest_until, next_after
from tabane.errors import UsageError

BERLIN = "Europe/Berlin"


def stamp(text: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


def moments(line: str, zone: str, begin: str, count: int) -> list[str]:
    """Local times with their offsets, from `begin` on."""
    shown, moment = [], stamp(begin, zone)
    for _ in range(count):
        moment = next_after(line, zone, moment)
        shown.append(datetime.fromtimestamp(moment, ZoneInfo(zone)).strftime("%d %H:%M%z"))
    return shown


@pytest.mark.parametrize(
    ("line", "after", "then"),
    [
        ("*/5 * * * *", "2026-01-01T00:00", "2026-01-01T00:05"),
        ("*/5 * * * *", "2026-01-01T00:04:59.999", "2026-01-01T00:05"),
        ("@hourly", "2026-12-31T23:00", "2027-01-01T00:00"),
        ("@daily", "2026-02-28T12:00", "2026-03-01T00:00"),
        ("@weekly", "2026-11-26T00:00", "2026-11-29T00:00"),
        ("30 9 * * mon-fri", "2026-11-27T09:30", "2026-11-30T09:30"),
        ("0 0 13 * 5", "2026-11-26T00:00", "2026-11-27T00:00"),
        ("0 0 29 2 *", "2026-01-01T00:00", "2028-02-29T00:00"),
    ],
)
def test_the_next_moment(line: str, after: str, then: str) -> None:
    assert next_after(line, "UTC", stamp(after)) == stamp(then)


def test_an_hour_that_is_left_out() -> None:
    """29 March 2026: 02:00 in Berlin is 03:00."""
    assert moments("30 2 * * *", BERLIN, "2026-03-28T12:00", 2) == [
        "29 03:00+0200",
        "30 02:30+0200",
    ]
    assert moments("*/30 * * * *", BERLIN, "2026-03-29T01:00", 2) == [
        "29 01:30+0100",
        "29 03:00+0200",
    ]


def test_an_hour_that_comes_twice() -> None:
    """25 October 2026: 03:00 in Berlin is 02:00 again."""
    assert moments("30 2 * * *", BERLIN, "2026-10-24T12:00", 2) == [
        "25 02:30+0200",
        "26 02:30+0100",
    ]
    assert moments("30 * * * *", BERLIN, "2026-10-25T01:00", 3) == [
        "25 01:30+0200",
        "25 02:30+0200",
        "25 02:30+0100",
    ]


@pytest.mark.parametrize("line", ["30 2 * * *", "30 * * * *", "*/20 2 * * *", "0 0 1 * *"])
def test_the_latest_is_one_of_those_that_came(line: str) -> None:
    """However far back it is looked from, and over changes of the clock."""
    came, moment = [], stamp("2026-10-20T00:00", BERLIN)
    end = moment + 40 * 86400
    while (moment := next_after(line, BERLIN, moment)) <= end:
        came.append(moment)
    begin = stamp("2026-10-20T00:00", BERLIN)
    for hours in range(0, 40 * 24, 7):
        now = begin + hours * 3600.0
        wanted = max((one for one in came if one <= now), default=None)
        assert latest_until(line, BERLIN, begin, now) == wanted, hours


def test_there_is_none_when_none_came_since() -> None:
    noon = stamp("2026-11-26T12:00")
    assert latest_until("0 12 * * *", "UTC", noon - 1, noon) == noon
    assert latest_until("0 12 * * *", "UTC", noon, noon + 3600) is None


def test_a_rare_one_is_found_years_later() -> None:
    now = datetime(2027, 6, 1, tzinfo=UTC)
    began = (now - timedelta(days=2000)).timestamp()
    assert latest_until("0 0 29 2 *", "UTC", began, now.timestamp()) == stamp("2024-02-29T00:00")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "* * * *",
        "* * * * * *",
        "60 * * * *",
        "x * * * *",
        "@reboot",
        "0 0 30 2 *",
        "*/0 * * * *",
    ],
)
def test_what_is_no_line(line: str) -> None:
    with pytest.raises(UsageError):
        check_cron(line)


@pytest.mark.parametrize("name", ["", "Mars/Olympus", "../etc/passwd", "europe"])
def test_what_is_no_zone(name: str) -> None:
    with pytest.raises(UsageError):
        check_timezone(name)
