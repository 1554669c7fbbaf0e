"""What ends up on a terminal: columns, cut to its width, in colours where it shows them.

Nothing that is not a terminal gets colours or is cut: programs read whole lines.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from tabane.tools.cli.common import cells_of, cells_of_char, pad, printable

BOLD, RED = "1", "31"
UNLIMITED = 1 << 30
"""A width that no line has."""
NO_COLOURS: Mapping[int, str] = {}


class Place(NamedTuple):
    """How a column stands: its heading, numbers to the right; `fixed`: so many cells, no more."""

    heading: str
    right: bool = False
    fixed: int = 0


def terminal_width() -> int | None:
    """Of the terminal that is written to; None when it is none."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError):
        return None


def shows_colours() -> bool:
    """Whether stdout is a terminal that takes them; NO_COLOR with any value forbids them."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return sys.stdout.isatty()


def paint(line: str, colour: str) -> str:
    return f"\x1b[{colour}m{line}\x1b[0m" if line else line


def layout(places: Sequence[Place], rows: Iterable[Sequence[str]]) -> list[str]:
    """The heading, then a line for each row, each column as wide as its widest cell. What could
    move a cursor is escaped, the last column is not padded."""
    table = [[place.heading for place in places]]
    table += [[_cut(printable(text), p.fixed) for text, p in zip(row, places)] for row in rows]  # noqa: B905
    widths = [max(map(cells_of, texts)) for texts in zip(*table, strict=True)]
    for n, place in enumerate(places):
        widths[n] = max(widths[n], place.fixed)
    if places and not places[-1].right:
        widths[-1] = 0
    rights = [place.right for place in places]
    return [" ".join(map(pad, texts, widths, rights)).rstrip() for texts in table]


def _cut(text: str, fixed: int) -> str:
    return clip(text, fixed) if fixed else text


def clip(text: str, width: int | None) -> str:
    """As much of it as fits; all without a width."""
    if width is None or (text.isascii() and len(text) <= width):
        return text
    if text.isascii():
        return text[:width]
    for end, char in enumerate(text):
        width -= cells_of_char(char)
        if width < 0:
            return text[:end]
    return text


def show(
    lines: Sequence[str],
    *,
    heading: bool = True,
    width: int | None = None,
    colours: Mapping[int, str] = NO_COLOURS,
) -> None:
    """Print them, cut to the terminal or to a `width` that was asked for; the first is a heading
    unless told otherwise. `colours` of lines, by their numbers, are seen on a terminal only."""
    width = terminal_width() if width is None else width
    wanted = ({0: BOLD} if heading else {}) | dict(colours) if shows_colours() else {}
    for n, line in enumerate(lines):
        text = clip(line, width)
        print(paint(text, wanted[n]) if n in wanted else text)
