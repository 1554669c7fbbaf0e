"""Memory follows sessions, not apps: 10,000 hosted apps, always on and reactive, on the same day.

    make bench-efficiency

The recorded day (`bench/day.py`) is played in `SECONDS` against a node with `APPS` apps, each an
nginx of its own in a container, all scaled to zero; and then against one where apps always have an
instance. All 10,000 of these do not fit in the memory of a common machine, so that as many are run
as `ALWAYS_ON` says, the most popular; the others are refused. What they hold is measured, and what
all would hold is that of one, times their number: rows and bars say which of them was computed.
In between the reactive day is played once more on a node with little more than half of the memory
that its instances held at the most.

How quickly resources follow is seen twice: by the shift at which the curves of sessions and memory
are most alike, and by the flash crowds, which are steps up and down of one app.
Counts are set by the environment: APPS, ALWAYS_ON, SECONDS, and EVERY (only every n-th session is
played; for a try on a machine that does something else, too).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from day import DAY_S, Crowd, Day, load_day
from replay import OK, SAMPLE_S, Outcome, Replay, Sample, count_wakes, own_bytes, replay
from report import Report, percentile
from tabane.errors import TabaneError
from tabane.tools.cli.cluster import running_cluster
from tabane.tools.client import Cluster
from tabane.units import shorten

APPS = int(os.environ.get("APPS", "10000"))
ALWAYS_ON = int(os.environ.get("ALWAYS_ON", "300"))
EVERY = int(os.environ.get("EVERY", "1"))
SECONDS = float(os.environ.get("SECONDS", "90"))
MIB = 1 << 20
FREEZE_AFTER_S, STOP_AFTER_S = 2.0, 6.0
READY_S = 120.0
MEMORY_SHARE, MEASURED_SHARE = 0.1, 0.6
MOST_TOLD, LONGEST = 5, 160
"""Sessions that were not served, and characters of why."""
SHORT_SHARE = 0.6
"""Of the most that instances held, which they have when memory is short."""
BESIDE_BYTES = 104 * MIB
"""Besides, as a node keeps 64 MiB free, and lets no app in that has less than its `memory`."""
WAKE_SHARE = 0.2
UP_S, DOWN_S = 1.5, 2.0
"""After sessions rise; and, beside `stop_after`, after they fall: two samples, and what a start and
a stop take."""
LIKENESS = 0.6
WARM_MS, WAKE_MS = 20.0, 500.0
SHIFT_S = 15.0
SERVER = """
cat >/tmp/nginx.conf <<END
daemon off; master_process off; pid /tmp/pid; error_log stderr;
events { worker_connections 256; }
http {
  access_log off; client_body_temp_path /tmp/b; proxy_temp_path /tmp/p; fastcgi_temp_path /tmp/f;
  uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s;
  server { listen 8000; root /usr/share/common-licenses; limit_rate 20k; }
}
END
exec nginx -c /tmp/nginx.conf -e stderr
"""
APP = """\
name = "a{app}"
image = "host"
driver = "crun"
command = ["sh", "-c", '''{server}''']
port = 8000
hosts = ["a{app}.test"]

[resources]
memory = "32MiB"
disk = "8MiB"
pids = 16

[reactive]
concurrency = 20
{reactive}
"""
REACTIVE = f'freeze_after = "{FREEZE_AFTER_S:g}s"\nstop_after = "{STOP_AFTER_S:g}s"'
KEPT = f'min = 1\nstop_after = "{STOP_AFTER_S:g}s"'


class Run(NamedTuple):
    replay: Replay
    wakes: dict[str, int]
    deploy_s: float
    own_bytes: int
    """What Tabane's own processes held after the day (PSS), which is their most."""


def main() -> int:
    day = fold(load_day())
    report = Report("efficiency", "Sessions and memory of a day, always on and reactive")
    reactive = run_mode(day, APPS, REACTIVE)
    given_bytes = int(most_bytes(reactive) * SHORT_SHARE) + BESIDE_BYTES
    short = run_mode(day, APPS, REACTIVE, memory_bytes=given_bytes)
    always_on = run_mode(day, min(ALWAYS_ON, APPS), KEPT, kept=min(ALWAYS_ON, APPS))
    runs = {"reactive": reactive, "reactive, short of memory": short, "always-on": always_on}
    for mode, done in runs.items():
        report.row(mode=mode, **describe(done))
        if done is not always_on:
            tell_lost(report, mode, done.replay.outcomes)
    compare(report, day, reactive, always_on)
    in_little(report, short, given_bytes)
    return report.finish(lambda axes: draw(axes, reactive.replay, always_on.replay))


def tell_lost(report: Report, mode: str, outcomes: Sequence[Outcome]) -> None:
    """Why those were not served that should have been."""
    for one in [one for one in outcomes if one.status != OK][:MOST_TOLD]:
        why = f"a{one.app} at {one.began:.1f} s: {one.status} {shorten(one.why, LONGEST)}"
        report.row(mode=f"{mode}: not served", note=why)


def fold(day: Day) -> Day:
    """Of so many apps: with fewer than recorded, each has the sessions of several."""
    played = day.sessions[::EVERY]
    sessions = [session._replace(app=session.app % APPS) for session in played]
    return Day(sessions, [crowd._replace(app=crowd.app % APPS) for crowd in day.crowds])


def run_mode(day: Day, apps: int, reactive: str, *, kept: int = 0, memory_bytes: int = 0) -> Run:
    """A cluster of its own; the day begins when `kept` instances are there."""
    with a_cluster(memory_bytes) as (cluster, root):
        deploy_s = deploy(root, apps, reactive)
        wait_ready(cluster, kept)
        before = count_wakes(cluster)
        done = replay(cluster, root, day.sessions, SECONDS)
        wakes = count_wakes(cluster) - before
        return Run(done, dict(wakes), deploy_s, own_bytes(root))


@contextmanager
def a_cluster(memory_bytes: int) -> Iterator[tuple[Cluster, Path]]:
    with tempfile.TemporaryDirectory(prefix="tabane-bench-") as scratch:
        root = Path(scratch)
        root.chmod(0o755)
        with running_cluster(root, ["tokyo"], 1, memory_bytes=memory_bytes):
            yield Cluster(root), root


def deploy(root: Path, apps: int, reactive: str) -> float:
    """Returns how long it took, s."""
    directory = root / "apps"
    directory.mkdir()
    for app in range(apps):
        text = APP.format(app=app, server=SERVER, reactive=reactive)
        (directory / f"a{app}.toml").write_text(text)
    program = Path(sys.executable).with_name("tabane")
    began = time.monotonic()
    command = [program, "--root", root, "deploy", directory]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def wait_ready(cluster: Cluster, count: int) -> None:
    give_up = time.monotonic() + READY_S
    while True:
        found = cluster.get("/api/v1/instances")["instances"]
        ready = sum(instance["state"] == "ready" for instance in found)
        if ready >= count:
            return
        if time.monotonic() > give_up:
            raise TabaneError(f"only {ready} of {count} instances that are to be kept are ready")
        time.sleep(0.5)


def describe(run: Run) -> dict[str, float]:
    """A row."""
    outcomes, samples = run.replay.outcomes, run.replay.samples
    instances = seconds_of(samples)
    served = [one for one in outcomes if one.status == OK]
    first_ms = [one.first_byte_s * 1000 for one in served if one.first_byte_s is not None]
    waited = sum(run.wakes.values())
    return {
        "sessions": len(outcomes),
        "served": len(served),
        "waited": waited,
        "p50 ms": percentile(first_ms, 50),
        "p99 ms": percentile(first_ms, 99),
        "instances": mean([len(sample.held) for sample in samples]),
        "most": max(len(sample.held) for sample in samples),
        "MiB s": instances,
        "node MiB s": instances + run.own_bytes * (samples[-1].at - samples[0].at) / MIB,
        "deploy s": run.deploy_s,
    }


def seconds_of(samples: Sequence[Sample]) -> float:
    """MiB seconds of instances, by the trapezoidal rule."""
    parts = (
        (first.instance_bytes + second.instance_bytes) / 2 * (second.at - first.at)
        for first, second in pairwise(samples)
    )
    return sum(parts) / MIB


def most_bytes(run: Run) -> int:
    return max(sample.instance_bytes for sample in run.replay.samples)


def in_little(report: Report, short: Run, given_bytes: int) -> None:
    """The coldest make room, and that is all that is to be seen of it."""
    told = describe(short)
    lost = told["sessions"] - told["served"]
    report.bar("reactive, short of memory: sessions not served", lost, 0, unit="sessions")
    share = most_bytes(short) / given_bytes
    report.bar("reactive, short of memory: most that was held / given", share, 1, unit="ratio")


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def compare(report: Report, day: Day, reactive: Run, always_on: Run) -> None:
    told, kept = describe(reactive), describe(always_on)
    seconds = reactive.replay.samples[-1].at - reactive.replay.samples[0].at
    first = always_on.replay.samples[0]
    each_bytes = first.instance_bytes / len(first.held)
    all_on = (each_bytes * APPS + always_on.own_bytes) * seconds / MIB
    computed = {"instances": APPS, "most": APPS, "node MiB s": all_on}
    report.row(mode=f"always-on, all {APPS} (computed)", **computed)
    share = told["node MiB s"] / all_on
    report.bar(
        "reactive / always-on memory-seconds of the node, all apps (computed)",
        share,
        MEMORY_SHARE,
        unit="ratio",
    )
    report.bar(
        f"reactive, all {APPS} apps / always-on, {ALWAYS_ON} apps, memory-seconds of instances",
        told["MiB s"] / kept["MiB s"],
        MEASURED_SHARE,
        unit="ratio",
    )
    lost = told["sessions"] - told["served"]
    report.bar("reactive: sessions not served", lost, 0, unit="sessions")
    waited = told["waited"] / told["sessions"]
    report.bar("reactive: share of sessions that waited", waited, WAKE_SHARE, unit="ratio")
    report.bar("reactive: first byte, p50", told["p50 ms"], WARM_MS, unit="ms")
    report.bar("reactive: first byte, p99", told["p99 ms"], WAKE_MS, unit="ms")
    follow(report, day, reactive.replay)
    print(f"one always-on instance holds {each_bytes / MIB:.2f} MiB; waits: {reactive.wakes}")


# How resources follow sessions


def follow(report: Report, day: Day, done: Replay) -> None:
    sessions = [float(sample.sessions) for sample in done.samples]
    memory = [float(sample.instance_bytes) for sample in done.samples]
    shift_s, likeness = best_shift(sessions, memory)
    report.bar("reactive: memory is like sessions", likeness, LIKENESS, unit="r", better="higher")
    report.bar("reactive: memory is behind sessions", shift_s, STOP_AFTER_S, unit="s")
    steps = [step_of(crowd, done) for crowd in day.crowds]
    ups, downs = (sorted(values) for values in zip(*steps, strict=True))
    report.bar("reactive: a flash crowd has its memory after", ups[-1], UP_S, unit="s")
    most = STOP_AFTER_S + DOWN_S
    report.bar("reactive: when it is over that is free after", downs[-1], most, unit="s")


def best_shift(sessions: list[float], memory: list[float]) -> tuple[float, float]:
    """By how many seconds memory is behind, and how alike the curves are then (Pearson's r)."""
    shifts = range(int(SHIFT_S / SAMPLE_S) + 1)
    found = [
        (likeness(sessions[: len(sessions) - shift], memory[shift:]), shift) for shift in shifts
    ]
    best, shift = max(found)
    return shift * SAMPLE_S, best


def likeness(first: list[float], second: list[float]) -> float:
    means = mean(first), mean(second)
    pairs = [(a - means[0], b - means[1]) for a, b in zip(first, second, strict=True)]
    spread = (sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs)) ** 0.5
    return sum(a * b for a, b in pairs) / spread if spread else 0.0


def step_of(crowd: Crowd, done: Replay) -> tuple[float, float]:
    """How long after its app's sessions reached half of their most its instances' memory did; and
    after the last of them ended it was all free."""
    mine = [one for one in done.outcomes if one.app == crowd.app and _is_of(crowd, one.began)]
    times = [sample.at for sample in done.samples]
    held = [
        sum(size for one, size in sample.held.items() if done.apps.get(one) == crowd.app)
        for sample in done.samples
    ]
    began, ended = min(one.began for one in mine), max(one.ended for one in mine)
    last = bisect(times, ended)
    active = [sum(one.began <= at < one.ended for one in mine) for at in times]
    rise = next(at for at, count in zip(times, active, strict=True) if count >= max(active) / 2)
    window = [index for index, at in enumerate(times) if began <= at <= ended]
    peak = max((held[index] for index in window), default=0)
    if not peak:
        return SECONDS, SECONDS  # nobody was served
    full = next(times[index] for index in window if held[index] >= peak / 2)
    free = next((at for at, size in zip(times[last:], held[last:], strict=True) if not size), None)
    return max(0.0, full - rise), (free if free is not None else times[-1]) - ended


def _is_of(crowd: Crowd, began: float) -> bool:
    at = began / SECONDS * DAY_S
    return crowd.begins - 1 <= at <= crowd.ends + 3600


def draw(axes: Any, reactive: Replay, always_on: Replay) -> None:
    """Memory of instances on the left, sessions on the right."""
    beside = axes.twinx()
    for name, done, color in (
        ("always-on", always_on, "tab:orange"),
        ("reactive", reactive, "tab:blue"),
    ):
        times = [sample.at for sample in done.samples]
        held = [sample.instance_bytes / MIB for sample in done.samples]
        apps = f"{min(ALWAYS_ON, APPS) if name == 'always-on' else APPS:,} apps"
        axes.plot(times, held, label=f"memory, {name}, {apps}", color=color)
    times = [sample.at for sample in reactive.samples]
    sessions = [sample.sessions for sample in reactive.samples]
    beside.plot(times, sessions, label="sessions", color="tab:gray", linewidth=0.8)
    axes.set_xlabel(f"seconds (a day in {SECONDS:g})")
    axes.set_ylabel("memory of instances, MiB")
    beside.set_ylabel("sessions at the same time")
    axes.set_ylim(bottom=0)
    beside.set_ylim(bottom=0)
    lines = [*axes.get_lines(), *beside.get_lines()]
    axes.legend(lines, [line.get_label() for line in lines], loc="upper left", fontsize="small")


if __name__ == "__main__":
    raise SystemExit(main())
