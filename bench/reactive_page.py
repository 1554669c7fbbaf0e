"""The tables of docs/reactive.md, from what `bench/reactive.py` found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from reactive_apps import SERVERS, Tried
from reactive_climb import HAND, PEER, RUNGS, TABANE, Climb
from report import percentile, shown

PAGE = Path(__file__).parents[1] / "docs" / "reactive.md"
BEGIN, END = "<!-- figures: make bench-reactive -->\n", "<!-- /figures -->"
NAMES = {TABANE: "Tabane", HAND: "the engine by hand", PEER: "systemd and podman"}


def write(
    tried: Iterable[Tried],
    climbs: Mapping[tuple[str, str], Climb],
    reasons: Mapping[str, str],
    emulated: Iterable[str],
) -> None:
    """Put the tables between the page's marks. `reasons`: of drivers that do not work here."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    text = "\n".join(tables(tuple(tried), climbs, reasons, set(emulated)))
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def tables(
    tried: tuple[Tried, ...],
    climbs: Mapping[tuple[str, str], Climb],
    reasons: Mapping[str, str],
    emulated: set[str],
) -> Iterator[str]:
    for server, what in SERVERS.items():
        yield f"### {what[0].upper()}{what[1:]}\n"
        yield "| class | engine | who | warm | thaw | restore | cold |"
        yield "| --- | --- | --- | --- | --- | --- | --- |"
        notes: list[str] = []
        for each in (one for one in tried if one.server == server):
            mark = f"`{each.engine}`{', emulated' if each.engine in emulated else ''}"
            climb = climbs.get((each.engine, server))
            if climb is None:
                notes.append(f"{mark}: {each.why_not or reasons[each.engine]}")
                continue
            yield from rows(f"{each.isolation} | {mark}", climb)
            notes += [f"{mark}, {note}" for note in explain(climb)]
        yield ""
        yield from (f"- {note}" for note in notes)
        yield ""
    yield "![Medians of every class and rung](../bench/results/reactive.svg)\n"


def rows(begin: str, climb: Climb) -> Iterator[str]:
    for who, name in NAMES.items():
        cells = [show(climb.samples.get((rung, who))) for rung in RUNGS]
        if any(cells):
            yield f"| {begin} | {name} | {' | '.join(cells)} |"
            begin = " | "


def show(values: list[float] | None) -> str:
    """Median and p99."""
    if not values:
        return ""
    return f"{shown(percentile(values, 50))}, {shown(percentile(values, 99))}"


def explain(climb: Climb) -> Iterator[str]:
    """Why cells are empty."""
    for (rung, who), why in climb.why_not.items():
        yield f"{rung}, {NAMES[who]}: {why}"
