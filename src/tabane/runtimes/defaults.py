"""How every driver enforces the defaults, as the tables of docs/defaults.md.

`python -m tabane.runtimes.defaults` prints them; a test compares.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import cast

from tabane.runtimes.api import DEFAULTS, Driver, Spawner
from tabane.runtimes.registry import load, names


def all_drivers() -> list[Driver]:
    """Those that start something real, to be asked what they can do; not to be started."""
    return [load(name, cast(Spawner, None), Path("/nonexistent")) for name in names()]


def render_tables(drivers: list[Driver]) -> str:
    """What is enforced by whom, and a table of how for each driver; alike ones share theirs."""
    sections = [_matrix(drivers)]
    for _, alike in groupby(drivers, lambda driver: (driver.isolation, driver.enforcements())):
        sections.append(_table(list(alike)))
    return "\n\n".join(sections)


def _matrix(drivers: list[Driver]) -> str:
    enforced = {driver.name: _enforced(driver) for driver in drivers}
    lines = [_row("default", "means", "not enforced by"), _row("---", "---", "---")]
    for default, meaning in DEFAULTS.items():
        without = [f"`{name}`" for name, found in enforced.items() if default not in found]
        lines.append(_row(f"`{default}`", meaning, ", ".join(without)))
    return "\n".join(lines)


def _enforced(driver: Driver) -> set[str]:
    return {row.default for row in driver.enforcements() if row.enforced}


def _table(alike: list[Driver]) -> str:
    title = ", ".join(f"`{driver.name}`" for driver in alike)
    lines = [f"## {title}, class `{alike[0].isolation}`", ""]
    lines += [_row("default", "enforced", "how, or why not"), _row("---", "---", "---")]
    for row in alike[0].enforcements():
        lines.append(_row(f"`{row.default}`", "yes" if row.enforced else "no", row.how))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


if __name__ == "__main__":
    print(render_tables(all_drivers()))
