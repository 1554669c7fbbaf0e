"""What every benchmark says, and how: rows, bars, a table, `bench/results/NAME.json` and a plot.

    report = Report("wake", "From a request to its first byte")
    report.row(driver="runc", **summary(runc_ms))
    report.bar("runc added ms", percentile(added_ms, 50), 5, unit="ms")
    raise SystemExit(report.finish())

A bar is what must be reached; `finish` prints pass or miss for each, and is 1 if any is missed.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).parent / "results"

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Bar:
    """A measured value beside what it must reach."""

    value: float
    bar: float
    unit: str
    better: Better = "lower"

    @property
    def reached(self) -> bool:
        return self.value <= self.bar if self.better == "lower" else self.value >= self.bar


def percentile(values: Iterable[float], percent: float) -> float:
    """The value below which `percent` of them lie, interpolated between neighbours."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values: nothing was measured")
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summary(values: Sequence[float]) -> dict[str, float]:
    """The columns most rows want: how many, median, tail, worst."""
    columns = {f"p{percent}": percentile(values, percent) for percent in (50, 90, 99)}
    return {"n": len(values), **columns, "max": max(values)}


def describe_machine() -> dict[str, str | int | float]:
    """What the numbers depend on. No names: results are published."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "cpu": next(models, platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_kib / (1 << 20), 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


class Report:
    """Gathers what one benchmark found."""

    def __init__(self, name: str, title: str, *, results: Path = RESULTS) -> None:
        self.name = name
        self.title = title
        self.rows: list[dict[str, Any]] = []
        self.bars: dict[str, Bar] = {}
        self._results = results

    def row(self, **columns: str | float) -> None:
        """One line of the table."""
        self.rows.append(columns)

    def bar(
        self, what: str, value: float, bar: float, *, unit: str, better: Better = "lower"
    ) -> None:
        """A value that must be at most `bar` (at least, when higher is better)."""
        self.bars[what] = Bar(value, bar, unit, better)

    def finish(self, plot: Callable[[Any], None] | None = None) -> int:
        """Write and print everything. `plot` draws on matplotlib axes; without it, the bars are."""
        self._results.mkdir(parents=True, exist_ok=True)
        machine = describe_machine()
        found = {
            "name": self.name,
            "machine": machine,
            "rows": self.rows,
            "bars": {what: asdict(bar) for what, bar in self.bars.items()},
        }
        text = json.dumps(found, indent=2, ensure_ascii=False)
        (self._results / f"{self.name}.json").write_text(text + "\n")
        self._draw(plot or self._draw_bars)
        print(self.title, f"({machine['cpu']}, {machine['cores']} cores)", end="\n\n")
        print(*table(self.rows), "", *self._verdicts(), sep="\n")
        return int(not all(bar.reached for bar in self.bars.values()))

    def _verdicts(self) -> list[str]:
        width = max(map(len, self.bars), default=0)
        return [
            f"{'pass' if bar.reached else 'MISS'}  {what:<{width}}  {shown(bar.value)} {bar.unit}"
            f" (at {'most' if bar.better == 'lower' else 'least'} {shown(bar.bar)})"
            for what, bar in self.bars.items()
        ]

    def _draw(self, plot: Callable[[Any], None]) -> None:
        import matplotlib as mpl

        mpl.use("svg")
        mpl.rcParams["svg.hashsalt"] = self.name
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        axes.set_title(self.title)
        plot(axes)
        figure.savefig(self._results / f"{self.name}.svg", metadata={"Date": None})
        pyplot.close(figure)

    def _draw_bars(self, axes: Any) -> None:
        """Each value as a share of its bar, which is the line at 100 %."""
        names = [f"{what} ({shown(bar.value)} {bar.unit})" for what, bar in self.bars.items()]
        shares = [
            100 * bar.value / bar.bar if bar.bar else 100 + bar.value for bar in self.bars.values()
        ]
        colors = ["tab:green" if bar.reached else "tab:red" for bar in self.bars.values()]
        axes.barh(names, shares, color=colors)
        axes.axvline(100, color="black", linewidth=1)
        axes.invert_yaxis()
        axes.set_xlabel("% of the bar")


def shown(value: object) -> str:
    """Three significant digits are what a shared machine can tell."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of text with aligned columns: words to the left, numbers to the right."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([shown(row.get(name, "")) for name in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    words = [any(isinstance(row.get(name), str) for row in rows) for name in columns]
    return [
        "  ".join(
            cell.ljust(width) if word else cell.rjust(width)
            for cell, width, word in zip(line, widths, words, strict=True)
        ).rstrip()
        for line in cells
    ]
