import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.errors import UsageError
from tabane.units import (
    format_duration,
    format_size,
    parse_duration,
    parse_seconds,
    parse_size,
    shorten,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MiB", 64 << 20),
        ("1.5GiB", 3 << 29),
        ("100MB", 100_000_000),
        ("100 MB", 100_000_000),
        ("7B", 7),
        ("0B", 0),
        ("2kB", 2000),
        ("0.1KiB", 102),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "64", "MiB", "-1B", "1e3B", "٣B", "64mb", "1.B", "9" * 9999])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30.0),
        ("1h", 3600.0),
        ("1h30m", 5400.0),
        ("250ms", 0.25),
        ("1.5s", 1.5),
        ("2d", 172800.0),
        ("1m1ms", 60.001),
        ("0s", 0.0),
        ("5m", 300.0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "seconds"), [("2", 2.0), ("0.25", 0.25), ("2s", 2.0), ("1m30s", 90.0), ("0", 0.0)]
)
def test_seconds_as_they_are_typed(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "nan", "inf", "1e3", "5 ", "٣", "9" * 30])
def test_no_seconds(text: str) -> None:
    with pytest.raises(UsageError):
        parse_seconds(text)


@pytest.mark.parametrize("text", ["", "5", "s", "-1s", "1s1h", "1h1h", "1 h", "1w", "1msec", "٣s"])
def test_no_durations(text: str) -> None:
    with pytest.raises(UsageError, match="is no duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0s"), (60.0, "1m"), (5400.5, "1h30m0.5s"), (0.25, "250ms"), (90000.0, "1d1h")],
)
def test_durations_are_shown_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.floats(1e-9, 3e9))
def test_durations_survive_being_shown(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.integers(0, 1 << 60))
def test_sizes_survive_being_shown(size: int) -> None:
    assert parse_size(format_size(size)) == size


def test_long_values_are_cut() -> None:
    assert shorten("a" * 100) == "'" + "a" * 59 + "..."
    assert shorten(5) == "5"
