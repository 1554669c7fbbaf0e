"""What commands share: parsing that answers in one sentence, tables, sizes, ages."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tabane.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Like argparse's, but a mistake is a `UsageError` of one sentence."""

    def __init__(self, name: str, about: str) -> None:
        super().__init__(f"tabane {name}", description=about, allow_abbrev=False)
        self.add_argument("--root", type=Path, help="the cluster's directory")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog.removeprefix('tabane ')}: {message}")


def app_key(name: str) -> str:
    """`hello` is `default/hello`."""
    return name if "/" in name else f"default/{name}"


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns as wide as their widest cell; numbers to the right."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    right = [all(is_number(row[n]) for row in cells) and bool(cells) for n in range(len(headings))]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    for row in [list(headings), *cells]:
        parts = [
            cell.rjust(width) if at_right else cell.ljust(width)
            for cell, width, at_right in zip(row, widths, right, strict=True)
        ]
        print("  ".join(parts).rstrip())


def is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace("-", "", 1).isdigit() or text == "-"


def printable(text: str) -> str:
    """Control characters escaped, so that no program's words move the cursor."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say_silent(silent: Iterable[str]) -> int:
    """Name who did not answer, on stderr; 1 when there is anyone."""
    names = list(silent)
    if names:
        print(f"tabane: no answer from {', '.join(names)}", file=sys.stderr)
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
