"""What the fields of app files are made of: how a field is described, and readers of plain values.

A reader returns the model's value, or raises `UsageError` saying what is wrong and what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tabane.errors import UsageError
from tabane.units import parse_duration, parse_size, shorten

Reader = Callable[[Any], Any]


LARGEST = 1_000_000
"""What `min`, `max`, `concurrency` and `queue` may be at the most."""


LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class Mistake(UsageError):
    """What is wrong with the field at a path, as `resources.memory`."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Field:
    """`attribute` of the model is what `read` makes of the value; `show` is the way back."""

    attribute: str
    read: Reader
    show: Callable[[Any], Any] = _plain


@dataclass(frozen=True)
class Section:
    """`attribute` of the model is a `model` of these fields."""

    attribute: str
    model: Callable[..., Any]
    fields: Mapping[str, Field]


@dataclass(frozen=True)
class Tables:
    """`attribute` of the model is a tuple, with a `model` of these fields for each table of an
    array. `check` raises `Mistake` with the name of a field."""

    attribute: str
    model: Callable[..., Any]
    fields: Mapping[str, Field]
    required: tuple[str, ...]
    check: Callable[[Any], None]
    most: int
    key: str = "name"
    """The field that is another one in each of them."""


def as_text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise UsageError(f"{shorten(value)} is not text: write it in quotes, without NUL")
    return value


def as_label(value: Any) -> str:
    if not LABEL.fullmatch(as_text(value)):
        raise UsageError(
            f"{shorten(value)} is no name: 1 to 63 of a-z, 0-9 and -, with no - at either end"
        )
    return str(value)


def whole(low: int, high: int = LARGEST) -> Reader:
    def read(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise UsageError(f"{shorten(value)} is not a whole number from {low} to {high}")
        return value

    return read


def one_of(*words: str) -> Reader:
    def read(value: Any) -> str:
        if as_text(value) not in words:
            raise UsageError(f"{shorten(value)} is none of {', '.join(words)}")
        return str(value)

    return read


def as_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{shorten(value)} is neither true nor false")
    return value


def as_size(value: Any) -> int:
    smallest, largest = 1 << 20, 1 << 50
    size = value if type(value) is int else parse_size(as_text(value))
    if not smallest <= size <= largest:
        raise UsageError(f"{shorten(value)} is not from 1MiB to 1024TiB")
    return size


def as_duration(value: Any) -> float:
    if not isinstance(value, str):
        raise UsageError(f'{shorten(value)} has no unit: write a duration as "30s" or "1h30m"')
    return parse_duration(value)


def as_positive_duration(value: Any) -> float:
    seconds = as_duration(value)
    if not seconds:
        raise UsageError(f"{shorten(value)} is not longer than nothing")
    return seconds


def as_path(value: Any) -> str:
    if not as_text(value).startswith("/"):
        raise UsageError(f"{shorten(value)} is not an absolute path in the image")
    return str(value)


def list_of(read: Reader, *, empty: bool = True) -> Reader:
    def read_list(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not (value or empty):
            least = "" if empty else " of at least one"
            raise UsageError(f'{shorten(value)} is not a list{least}: write it as ["...", "..."]')
        return tuple(map(read, value))

    return read_list


def set_of(read: Reader, *, empty: bool = True) -> Reader:
    read_list = list_of(read, empty=empty)

    def read_set(value: Any) -> tuple[Any, ...]:
        items: tuple[Any, ...] = read_list(value)
        for item in items:
            if items.count(item) > 1:
                raise UsageError(f"{shorten(item)} is there twice: leave one of them out")
        return items

    return read_set


def as_command(value: Any) -> tuple[str, ...]:
    command: tuple[str, ...] = list_of(as_text, empty=False)(value)
    if not command[0]:
        raise UsageError("its first word, the program, is empty")
    return command


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """`: did you mean ...?`, or nothing when nothing is close."""
    import difflib

    close = difflib.get_close_matches(given, allowed, n=1)
    return f": did you mean {close[0]}?" if close else ""


def as_interval(value: Any) -> float:
    seconds = as_duration(value)
    if not 1 <= seconds <= 86400:
        raise UsageError(f"{shorten(value)} is not from 1s to 1d")
    return seconds
