"""What commands share: parsing that answers in one sentence, tables, sizes, ages."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tabane.commandline import CommandLine
from tabane.errors import UsageError

Row = dict[str, Any]
"""What nodes tell of one thing."""


class Parser(CommandLine):
    """Of a command. `h_is_help`: whether `-h` is, or something else as in the command's namesake.
    `or_else`: as of `CommandLine`."""

    def __init__(self, name: str, about: str, *, h_is_help: bool = True, or_else: str = "") -> None:
        super().__init__(
            f"tabane {name}",
            prefix=f"{name}: ",
            or_else=or_else,
            description=about,
            add_help=False,
        )
        letters = ["-h"] if h_is_help else []
        self.add_argument(*letters, "--help", action="help", help="show this and exit")
        self.add_version("-V")
        self.add_argument("--root", type=Path, help="the cluster's directory")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str], namespace: None = None
    ) -> argparse.Namespace:
        """Options may stand between words, as in `df / -T /srv`, unless there is a `--`."""
        takes_words = any(a.nargs == "*" and not a.option_strings for a in self._actions)
        if takes_words and "--" not in args:
            return self.parse_intermixed(args)
        return super().parse_args(args, namespace)


NAME = re.compile(r"([a-z0-9][a-z0-9-]{0,62}/)?[a-z0-9][a-z0-9-]{0,62}")
LARGEST = 1_000_000
CONTAINER_HELP = "of an instance with several; else the main one"


def app_key(name: str) -> str:
    """`hello` is `default/hello`. Raises `UsageError` for what no app can be called."""
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no app's name: write NAME or NAMESPACE/NAME")
    return name if "/" in name else f"default/{name}"


def whole(low: int) -> Callable[[str], int]:
    """An option's type: a whole number from `low`."""

    def read(text: str) -> int:
        if not re.fullmatch("[0-9]{1,7}", text) or not low <= int(text) <= LARGEST:
            problem = f"{text!r} is not a whole number from {low} to {LARGEST}"
            raise argparse.ArgumentTypeError(problem)
        return int(text)

    return read


def seconds_upto(most_s: float, *, or_none: bool = False) -> Callable[[str], float]:
    """An option's type: `2`, `2s`, `1m30s`; more than 0 seconds, or also 0 (`or_none`)."""

    def read(text: str) -> float:
        from tabane.units import parse_seconds

        try:
            seconds = parse_seconds(text)
        except UsageError:
            seconds = -1.0
        if not 0 <= seconds <= most_s or not (seconds or or_none):
            least = "from" if or_none else "above"
            problem = f"{text!r} is no number of seconds {least} 0, up to {most_s:g}, as 2 or 2s"
            raise argparse.ArgumentTypeError(problem)
        return seconds

    return read


def print_json(value: Any) -> None:
    """In ASCII, so that nothing in it reaches a terminal as a control character."""
    print(json.dumps(value, indent=2))


def say(text: str) -> None:
    """One line, whatever is in it, at once."""
    print(printable(text), flush=True)


def complain(text: str) -> None:
    """One line on stderr."""
    print(f"tabane: {printable(text)}", file=sys.stderr)


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns as wide as their widest cell; numbers to the right."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    right = [all(is_number(row[n]) for row in cells) and bool(cells) for n in range(len(headings))]
    widths = [max(map(cells_of, column)) for column in zip(headings, *cells, strict=True)]
    for row in [list(headings), *cells]:
        parts = [
            pad(cell, width, at_right)
            for cell, width, at_right in zip(row, widths, right, strict=True)
        ]
        print("  ".join(parts).rstrip())


def pad(text: str, width: int, right: bool) -> str:
    blanks = " " * (width - cells_of(text))
    return blanks + text if right else text + blanks


def cells_of(text: str) -> int:
    """How many cells of a terminal it takes."""
    return len(text) if text.isascii() else sum(map(cells_of_char, text))


def cells_of_char(char: str) -> int:
    import unicodedata

    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace("-", "", 1).isdigit() or text == "-"


def printable(text: str) -> str:
    """Control characters and bytes that are no text escaped, so that no program's words move the
    cursor."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # of an argument, a byte that is no UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()


def say_silent(silent: Iterable[str]) -> int:
    """Name who did not answer, on stderr; 1 when there is anyone."""
    names = list(silent)
    if names:
        complain(f"no answer from {', '.join(names)}")
    return 1 if names else 0


def format_age(seconds: float) -> str:
    """`42s`, `7m12s`, `3h05m`, `4d11h`."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def format_us(microseconds: float) -> str:
    """Milliseconds with one decimal."""
    return f"{microseconds / 1000:.1f}"


def format_at(seconds: float) -> str:
    from datetime import datetime

    return f"{datetime.fromtimestamp(seconds):%H:%M:%S.%f}"[:-3]
