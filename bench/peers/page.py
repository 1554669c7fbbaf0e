"""The page of results, docs/middlecon-bench.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from report import Report, describe_machine, shown


def write(report: Report, notes: Sequence[str]) -> str:
    """Markdown: what was measured where, the bars, every row, the plot."""
    machine = describe_machine()
    lines = [
        "# middlecon beside its peers",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"Linux {machine['kernel']}, Python {machine['python']}; everything on this one machine.",
        "Written by `make bench-middlecon`. How each peer does the job, and why so: "
        "[the peers of the benchmark](decisions/bench-peers.md).",
        "",
        *notes,
        *([""] if notes else []),
        *_table(_bar(what, bar) for what, bar in report.bars.items()),
        "",
        "N is the number of members, or as the job says; `p50_us` and `p99_us` are microseconds of "
        "one say, call, burst or kill; `of_floor` is the median over the floor's.",
        "",
        *_table(report.rows),
        "",
        f"![{report.title}](../bench/results/{report.name}.svg)",
    ]
    return "\n".join(lines) + "\n"


def _bar(what: str, bar: Any) -> dict[str, str]:
    sign = "≤" if bar.better == "lower" else "≥"
    return {
        "": "reached" if bar.reached else "**missed**",
        "what": what,
        "measured": f"{shown(bar.value)} {bar.unit}",
        "bar": f"{sign} {shown(bar.bar)}",
    }


def _table(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    yield _line(columns)
    yield _line("---" if name in _WORDS else "---:" for name in columns)
    for row in rows:
        yield _line(shown(row.get(name, "")) for name in columns)


_WORDS = ("", "what", "job", "contender")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
