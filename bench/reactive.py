"""The reactive ladder: every class and rung, beside the engines alone and a peer.

    make bench-reactive

Each rung is what a session finds: an instance that runs (`warm`), one that is frozen (`thaw`), a
checkpoint (`restore`), or nothing (`cold`); the milliseconds are from a client's connection to the
first byte of the answer. Three servers are woken with each engine that works here: a static one,
Apache, and a slow starter. In turn with Tabane (a cluster of one node, through its gateway) go the
engine by hand (`rungs_by_hand`: asked where it runs) and, for containers, systemd's socket
activation of podman (`socket_activation`). That Tabane woke from the rung that was meant is read in
its wake record. What somebody cannot do is a row that says so.

`COLD`, `SLOW`, `THAWS`, `RESTORES`, `WARM`, `MACHINES` and `PEERS` are how often (`SLOW`: cold
starts of the slow starter; `MACHINES`: everything of emulated machines; `PEERS`: what podman does,
which takes long); `ONLY` names engines, separated by commas.
All samples are in `bench/results/reactive-samples.json`, and a run of all engines writes the tables
of docs/reactive.md.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import reactive_page
from reactive_apps import ENGINES, SERVERS, Tried, make_tried
from reactive_climb import HAND, PEER, RUNGS, TABANE, Climb, Ladder
from report import RESULTS, Better, Report, percentile, summary
from wake import Hand

ONLY = os.environ.get("ONLY", ",".join(ENGINES)).split(",")
CONTAINERS = [engine for engine, isolation in ENGINES.items() if isolation == "container"]
COLORS = dict(zip(RUNGS, ("tab:green", "tab:blue", "tab:purple", "tab:red"), strict=True))
MARKERS = {TABANE: "o", HAND: "|", PEER: "x"}

Climbs = dict[tuple[str, str], Climb]
"""By engine and server."""


def main() -> int:
    report = Report("reactive", "The reactive ladder: request to first byte (ms)")
    with tempfile.TemporaryDirectory(prefix="tabane-bench-") as scratch:
        places = [Path(scratch, name) for name in ("apps", "hand", "peer", "tabane")]
        for place in (Path(scratch), *places):
            place.mkdir(exist_ok=True)
            place.chmod(0o755)
        tried = [each for each in make_tried(places[0]) if each.engine in ONLY]
        texts = {name: text for each in tried for name, text in each.texts.items()}
        ladder, others = Ladder(places[3], tried), []
        try:
            others.append(Hand(places[1], texts, "rungs_by_hand.py"))
            others.append(Hand(places[2], texts, "socket_activation.py"))
            climbs = climb_all(tried, ladder, *others)
            phases = ladder.wake_phases()
        finally:
            for other in others:
                other.close()
            ladder.close()
    for each in tried:
        add_rows(report, each, climbs.get((each.engine, each.server)), ladder)
    write_samples(climbs, phases)
    if set(ENGINES) <= set(ONLY):
        emulated = [name for name, row in ladder.drivers.items() if row["emulated"]]
        reactive_page.write(tried, climbs, ladder.reasons, emulated)
    missing = add_bars(report, climbs)
    status = report.finish(lambda axes: draw(axes, climbs))
    for what in missing:
        print(f"MISS  {what}  was not measured")
    return status or int(bool(missing))


def climb_all(tried: list[Tried], ladder: Ladder, hand: Hand, peer: Hand) -> Climbs:
    climbs: Climbs = {}
    for each in tried:
        if each.texts and each.engine in ladder.drivers:
            began = time.monotonic()
            climb = climbs[each.engine, each.server] = Climb(each, ladder, hand, peer)
            climb.all()
            print(f"{each.engine}, {each.server}: {time.monotonic() - began:.0f} s", flush=True)
    return climbs


def add_rows(report: Report, each: Tried, climb: Climb | None, ladder: Ladder) -> None:
    emulated = ladder.drivers.get(each.engine, {}).get("emulated")
    row = {"class": each.isolation, "engine": f"{each.engine}{' (emulated)' if emulated else ''}"}
    row["server"] = each.server
    if climb is None:
        report.row(**row, note=each.why_not or ladder.reasons[each.engine])
        return
    for rung in RUNGS:
        for who in MARKERS:
            if values := climb.samples.get((rung, who)):
                report.row(**row, rung=rung, who=who, **summary(values))
            elif why := climb.why_not.get((rung, who)):
                report.row(**row, rung=rung, who=who, note=why)


def add_bars(report: Report, climbs: Climbs) -> list[str]:
    """One for each number that is promised; returns the names of those that nothing is known of."""
    missing: list[str] = []

    def median(engine: str, server: str, rung: str, who: str = TABANE) -> float:
        climb = climbs.get((engine, server))
        values = climb.samples.get((rung, who)) if climb is not None else None
        return percentile(values, 50) if values else math.nan

    def bar(what: str, value: float, bar: float, unit: str, better: Better = "lower") -> None:
        if math.isnan(value):
            missing.append(what)
        else:
            report.bar(what, value, bar, unit=unit, better=better)

    for engine in CONTAINERS:
        for server in SERVERS:
            added = median(engine, server, "thaw") - median(engine, server, "warm")
            bar(f"container ({engine}) thaw of {server}, added", added, 3, "ms")
        restore, cold = median(engine, "slow", "restore"), median(engine, "slow", "cold")
        bar(f"container ({engine}) restore of slow", restore, 250, "ms")
        bar(f"container ({engine}) restore of slow, sooner", cold - restore, 900, "ms", "higher")
    cold = median("crun", "static", "cold")
    bar("container (crun) cold", cold / median("crun", "static", "cold", HAND), 1, "of bare crun")
    bar("container (crun) cold, stretch", cold, 15, "ms")
    cold, bare = (median("runsc", "static", "cold", who) for who in (TABANE, HAND))
    bar("sandbox (runsc) cold", cold / bare, 1.2, "of bare runsc")
    boot, restore = (median("qemu-microvm", "static", rung) for rung in ("cold", "restore"))
    bar("microvm (qemu) restore", boot / restore, 10, "times faster than boot", "higher")
    return missing


def write_samples(climbs: Climbs, phases: dict[str, dict[str, float]]) -> None:
    """Milliseconds, in the order in which they were taken; a line for each row of the table."""
    samples = {
        f"{engine} {server} {rung} {who}": [round(value, 3) for value in values]
        for (engine, server), climb in climbs.items()
        for (rung, who), values in climb.samples.items()
    }
    parts = {"samples_ms": samples, "tabane_phases_median_ms": phases}
    lines = [
        f"{json.dumps(part)}: {{\n"
        + ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items())
        + "\n}"
        for part, found in parts.items()
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "reactive-samples.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def draw(axes: Any, climbs: Climbs) -> None:
    """A line for each server with each engine: medians, a colour for each rung."""
    axes.figure.set_size_inches(9, 1.5 + 0.35 * len(climbs))
    for line, climb in enumerate(climbs.values()):
        for (rung, who), values in climb.samples.items():
            median = percentile(values, 50)
            axes.plot(median, line, MARKERS[who], color=COLORS[rung], markersize=7)
    axes.set_yticks(range(len(climbs)), [f"{engine}, {server}" for engine, server in climbs])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("median, ms")
    axes.grid(axis="x", alpha=0.3)
    handles = [axes.plot([], [], "s", color=COLORS[rung], label=rung)[0] for rung in RUNGS]
    handles += [axes.plot([], [], m, color="black", label=who)[0] for who, m in MARKERS.items()]
    axes.legend(handles=handles, ncols=len(handles), fontsize="small", loc="upper center",
                bbox_to_anchor=(0.45, -0.12))  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
