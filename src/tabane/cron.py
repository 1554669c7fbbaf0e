"""The moments that a line of crontab(5) means, in a time zone; by the library cronsim.

Five fields (minute, hour, day of the month, month, day of the week), or one of `NICKNAMES`. Where
clocks are put forward or back it is as with Debian's cron: a job of a certain hour and minute that
the change leaves out comes at the moment of the change, and one in the hour that comes twice comes
once; jobs with a `*` in the minute or the hour go by what passes, so that nothing is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, tzinfo

from tabane.errors import UsageError
from tabane.units import shorten

NICKNAMES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
FIELDS = 5
WINDOWS_S = tuple(days * 86400.0 for days in (1 / 24, 1, 8, 32, 367, 8 * 366 + 1))
"""How far back the latest moment is looked for: the longest pause is from one 29th of February to
the next, over a year such as 1900."""


def check_cron(line: str) -> None:
    """Raises `UsageError` for what is no line of a crontab, or means no moment."""
    _moments(line, "UTC", 0.0)


def check_timezone(name: str) -> None:
    """Raises `UsageError` for what is no zone of the IANA database."""
    _zone(name)


def next_after(line: str, timezone: str, moment: float) -> float:
    """The first moment after that one, in seconds since the epoch."""
    return next(_moments(line, timezone, moment))


def latest_until(line: str, timezone: str, since: float, now: float) -> float | None:
    """The last moment after `since` that is not after `now`; None: there is none."""
    for window_s in WINDOWS_S:
        begin = max(since, now - window_s)
        latest = None
        for moment in _moments(line, timezone, begin):
            if moment > now:
                break
            latest = moment
        if latest is not None or begin == since:
            return latest
    return None


def _moments(line: str, timezone: str, after: float) -> Iterator[float]:
    from cronsim import CronSim, CronSimError  # what starts without it starts faster

    fields = NICKNAMES.get(line.strip(), line).upper().split()
    if len(fields) != FIELDS:
        raise UsageError(
            f'{shorten(line)} is not five fields, as "*/5 * * * *", '
            f"nor one of {', '.join(NICKNAMES)}"
        )
    try:
        moments = CronSim(" ".join(fields), datetime.fromtimestamp(after, _zone(timezone)))
        first = next(moments)
    except (CronSimError, ValueError) as error:
        raise UsageError(f"{shorten(line)} is no line of a crontab: {error}") from None
    except StopIteration:
        raise UsageError(f"{shorten(line)} never comes") from None
    return _stamps(first, moments)


def _stamps(first: datetime, rest: Iterator[datetime]) -> Iterator[float]:
    yield first.timestamp()
    for moment in rest:
        yield moment.timestamp()


def _zone(name: str) -> tzinfo:
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise UsageError(f'{shorten(name)} is no time zone, as "Europe/Berlin"') from None
