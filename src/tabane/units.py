"""Sizes and durations as people write them: `64MiB`, `1.5GiB`, `100MB`; `30s`, `1h30m`, `250ms`."""

from __future__ import annotations

import re
from decimal import Decimal

from tabane.errors import UsageError

LONGEST_S = 100 * 366 * 86400.0
LARGEST_BYTES = 1 << 60

_NUMBER = r"([0-9]{1,20}(?:\.[0-9]{1,30})?)"
_BYTES = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}
_SIZE = re.compile(rf"{_NUMBER} ?({'|'.join(_BYTES)})")
_SECONDS = {
    "d": Decimal(86400),
    "h": Decimal(3600),
    "m": Decimal(60),
    "s": Decimal(1),
    "ms": Decimal("0.001"),
}
_PLAIN = re.compile(_NUMBER)
_DURATION = re.compile("".join(rf"(?:{_NUMBER}{unit}(?![a-z]))?" for unit in _SECONDS))


def parse_size(text: str) -> int:
    """Bytes. Raises `UsageError`."""
    found = _SIZE.fullmatch(text)
    size = int(Decimal(found[1]) * _BYTES[found[2]]) if found else -1
    if not 0 <= size <= LARGEST_BYTES:
        raise UsageError(
            f'{shorten(text)} is no size: write a number and B, kB, MB, ..., as "64MiB"'
        )
    return size


def format_size(size_bytes: int) -> str:
    """In the largest binary unit that shows it exactly."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size_bytes and size_bytes % _BYTES[unit] == 0:
            return f"{size_bytes // _BYTES[unit]}{unit}"
    return f"{size_bytes}B"


def show_size(size_bytes: int) -> str:
    """Rounded, as people say it: `1.5 GiB`."""
    value, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{size_bytes} B" if unit == "B" else f"{value:.1f} {unit}"


def parse_duration(text: str) -> float:
    """Seconds. Raises `UsageError`."""
    found = _DURATION.fullmatch(text)
    if not text or not found:
        raise UsageError(
            f'{shorten(text)} is no duration: write it with d, h, m, s or ms, as "30s" or "1h30m"'
        )
    numbers = zip(found.groups(), _SECONDS.values(), strict=True)
    seconds = float(sum(Decimal(number) * unit for number, unit in numbers if number))
    if seconds > LONGEST_S:
        raise UsageError(f"{shorten(text)} is too long: at most 100 years")
    return seconds


def parse_seconds(text: str) -> float:
    """Of what is typed, where seconds are what is usual: `2`, `0.5`, or a duration, as `1m30s`.
    Raises `UsageError`."""
    return parse_duration(f"{text}s" if _PLAIN.fullmatch(text) else text)


def format_duration(seconds: float) -> str:
    """The shortest text that `parse_duration` reads as exactly this."""
    rest = Decimal(repr(seconds))
    if 0 < rest < 1:
        return f"{(rest * 1000).normalize():f}ms"
    text = ""
    for unit in ("d", "h", "m"):
        count, rest = divmod(rest, _SECONDS[unit])
        text += f"{count:f}{unit}" if count else ""
    return text + f"{rest.normalize():f}s" if rest or not text else text


def shorten(value: object, length: int = 60) -> str:
    """A value as an error message shows it: in quotes if it is text, and not endless."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def micros(seconds: float) -> int:
    return round(seconds * 1_000_000)
