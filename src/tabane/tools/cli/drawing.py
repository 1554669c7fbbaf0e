"""Trees as pstree draws them: one plain function from labels to lines, twice, for its two forms.

Neither is recursive, since a chain of processes may be thousands long. Equal subtrees of siblings
are drawn once, as `3*[httpd]`: each shape has a number, so that two of any size are compared by it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from tabane.tools.cli.common import cells_of, printable
from tabane.tools.cli.trees import Branch


class Lines(NamedTuple):
    """What trees are drawn with, each three cells wide."""

    one: str
    first: str
    middle: str
    last: str
    down: str


ASCII = Lines("---", "-+-", " |-", " `-", " | ")
UNICODE = Lines("───", "─┬─", " ├─", " └─", " │ ")
BLANK = "   "


class Knot(NamedTuple):
    """A label and what hangs below it; `times`: so many siblings look just like this."""

    label: str
    children: Sequence[Knot]
    times: int = 1


def tie(
    roots: Iterable[Branch],
    label: Callable[[Branch, Branch | None], str],
    merges: Callable[[Branch], bool],
) -> list[Knot]:
    """What is to be drawn of these trees; `label` is given a branch and its parent, `merges` says
    whether a branch is drawn once with its equal siblings."""
    roots = list(roots)
    order: list[tuple[Branch, Branch | None]] = [(root, None) for root in roots]
    for branch, _ in order:
        order += [(child, branch) for child in branch.children]
    numbers: dict[object, int] = {}
    made: dict[int, tuple[Knot, int]] = {}
    for branch, parent in reversed(order):
        merged = _merge([made.pop(id(child)) for child in branch.children])
        text = printable(label(branch, parent))
        shape = text, tuple((shape, times) for _, times, shape in merged)
        key = shape if merges(branch) else id(branch)
        knot = Knot(text, [knot._replace(times=times) for knot, times, _ in merged])
        made[id(branch)] = knot, numbers.setdefault(key, len(numbers))
    tops = _merge([made[id(root)] for root in roots])
    return [knot._replace(times=times) for knot, times, _ in tops]


def _merge(knots: Sequence[tuple[Knot, int]]) -> list[tuple[Knot, int, int]]:
    """Siblings of one shape as one, in the place of the first, with how many there are."""
    first: dict[int, Knot] = {}
    for knot, shape in knots:
        first.setdefault(shape, knot)
    times = Counter(shape for _, shape in knots)
    return [(knot, times[shape], shape) for shape, knot in first.items()]


def draw_across(root: Knot, with_: Lines = ASCII) -> list[str]:
    """`sh-+-cat`, and the other children below it."""
    lines: list[str] = []
    waiting = [(root, "", "", "", "")]
    line = ""
    while waiting:
        knot, start, lead, base, closing = waiting.pop()
        line = line + lead if lead else start
        opening = f"{knot.times}*[" if knot.times > 1 else ""
        closing += "]" if opening else ""
        line += opening + knot.label
        if not knot.children:
            lines.append(line + closing)
            line = ""
        base += " " * cells_of(opening + knot.label)
        waiting += reversed(_children(knot, base, with_, closing))
    return lines


def _children(
    knot: Knot, base: str, with_: Lines, closing: str
) -> list[tuple[Knot, str, str, str, str]]:
    """Each with the start of its line, or for the first one what goes on with its parent's."""
    found = []
    last = len(knot.children) - 1
    for n, child in enumerate(knot.children):
        lead = (with_.first if last else with_.one) if n == 0 else ""
        start = base + (with_.last if n == last else with_.middle)
        found.append((child, start, lead, base + (BLANK if n == last else with_.down), closing))
    return found


def draw_down(root: Knot, with_: Lines = ASCII) -> list[str]:
    """One line each, as `pstree -a`."""
    lines = []
    waiting = [(root, "", "")]
    while waiting:
        knot, start, base = waiting.pop()
        lines.append(start + (f"{knot.times}*[{knot.label}]" if knot.times > 1 else knot.label))
        last = len(knot.children) - 1
        waiting += [
            (
                knot.children[n],
                f"{base} {with_.last if n == last else with_.middle}",
                f"{base} {BLANK if n == last else with_.down}",
            )
            for n in range(last, -1, -1)
        ]
    return lines
