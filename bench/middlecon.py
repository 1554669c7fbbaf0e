"""middlecon beside its peers, and beside the least that a hub and its members can do.

    make bench-middlecon

A sender tells N members 64 bytes and knows that all have acknowledged; every contender does that in
the best way it has (docs/decisions/bench-peers.md). All take turns within one run, and whoever's
turn it is not is stopped, so that noise hits all alike. Ratios are those of medians. For a look at
a part of it, which then is only printed (this one takes a minute):

    ONLY=native,unix PEERS=nats ROUNDS=3 SIZES=10,100 make bench-middlecon

ONLY names rows (the names are those of `PARTS`), PEERS modules of `peers/` (empty for none).
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers import contenders, page
from peers.contenders import C_PEERS, PEERS, Contender, driver, missing, sender_apart
from peers.native import compile_all
from peers.processes import PYTHON, Failed, Process
from report import RESULTS, Report, percentile

ROUNDS = int(os.environ.get("ROUNDS", "8"))
TURN_COUNT = 1000
TURN_MS = 200
"""With 10 members; with 1,000 it is twice that, so that a turn has more than a few."""
SIZES = [int(size) for size in os.environ.get("SIZES", "10,100,1000").split(",")]
LARGE = max(SIZES)
SPREAD = ("nats", "redis", "mqtt0", "zeromq")
PROCESSES = 50
CALLERS = (1, 64)
CAST_MEMBERS = 100
BURSTS = (1, 64)
KILLS = 30
QUIET_SESSIONS = 5000
PAGE = Path(__file__).parent.parent / "docs" / "middlecon-bench.md"

Times = dict[tuple[str, int], list[int]]
"""Contender and size -> nanoseconds of each."""


@dataclass
class Bench:
    """What all parts share."""

    scratch: Path
    programs: Path
    report: Report
    only: frozenset[str]
    peers: tuple[str, ...]
    ours: dict[str, Contender] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def wants(self, *parts: str) -> bool:
        return not self.only.isdisjoint(parts)

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)
        print(sentence, file=sys.stderr, flush=True)

    def rows(self, job: str, times: Times, floor: str | None = None, **more: float) -> None:
        """One row for each contender and size."""
        for (name, size), found in times.items():
            p50 = percentile(found, 50)
            columns = {"p50_us": p50 / 1000, "p99_us": percentile(found, 99) / 1000}
            if floor is not None and (floor, size) in times:
                columns["of_floor"] = p50 / median(times, floor, size)
            self.report.row(job=job, contender=name, N=size, n=len(found), **columns, **more)

    def bar(
        self,
        what: str,
        value: float,
        bar: float,
        unit: str = "ratio",
        better: Any = "lower",
    ) -> None:
        self.report.bar(what, value, bar, unit=unit, better=better)

    def stretch(self, against: str, value: float, goal: float) -> None:
        """How far the bar beyond the bar is."""
        job = f"stretch goal, against {against}"
        self.report.row(job=job, contender=contenders.OURS, value=value, goal=goal)


def median(times: Times, name: str, size: int) -> float:
    return percentile(times[name, size], 50)


def ratio(times: Times, ours: str, other: str, size: int) -> float:
    return median(times, ours, size) / median(times, other, size)


def best(times: Times, names: Sequence[str], size: int) -> str | None:
    """The fastest of those that were measured."""
    there = [name for name in names if (name, size) in times]
    return min(there, key=lambda name: median(times, name, size), default=None)


# One sender, N members


def measure(
    bench: Bench,
    wanted: dict[Contender, list[int]],
    order: str,
    programs: Callable[[Contender, int], list[tuple[str, ...]] | None] = lambda _, __: None,
) -> Times:
    """All contenders in turn, each at the sizes it is wanted at."""
    times: Times = {}
    with ExitStack() as servers:
        there = [c for c in wanted if enter(bench, servers, c, c.serving(bench.scratch))]
        for size in sorted({size for sizes in wanted.values() for size in sizes}):
            with ExitStack() as stack:
                drivers = {}
                for c in [c for c in there if size in wanted[c]]:
                    opening = c.driven(bench.scratch, size, programs(c, size))
                    if driver := enter(bench, stack, c, opening):
                        drivers[c] = driver
                take_turns(bench, drivers, order, size, times)
    return times


def enter(
    bench: Bench, stack: ExitStack, contender: Contender, opening: AbstractContextManager[Any]
) -> Any:
    """What `opening` gives. A peer that fails there is left out, and said to be: None."""
    try:
        return stack.enter_context(opening)
    except Failed as error:
        give_up(bench, contender, error)
        return None


def give_up(bench: Bench, contender: Contender, error: Failed) -> None:
    if contender.name in bench.ours:
        raise error
    bench.note(f"{contender.name} was given up: {str(error).splitlines()[-1]}")


def take_turns(
    bench: Bench, drivers: dict[Contender, Process], order: str, size: int, times: Times
) -> None:
    for number in range(ROUNDS):
        waiting = list(drivers)
        first = number % max(len(waiting), 1)
        milliseconds = TURN_MS + size // 5
        for contender in waiting[first:] + waiting[:first]:
            try:
                found = contender.order(drivers[contender], f"{order} {TURN_COUNT} {milliseconds}")
            except Failed as error:
                give_up(bench, contender, error)
                del drivers[contender]
            else:
                times.setdefault((contender.name, size), []).extend(found)


def measure_say(bench: Bench) -> None:
    """Everything about `say` whose members are in one process with the sender."""
    floor, ours, pure = contenders.FLOOR, contenders.OURS, contenders.C_PURE
    wanted: dict[str, set[int]] = {}

    def want(part: str, sizes: Sequence[int], *names: str) -> None:
        for name in names if bench.wants(part) else ():
            wanted.setdefault(name, set()).update(sizes)

    in_c = contenders.C_NATIVE if contenders.has_native() else pure
    python_peers = [PEERS[peer] for peer in bench.peers]
    c_peers = [C_PEERS[peer][0] for peer in bench.peers if peer in C_PEERS]
    want("clients", SIZES, floor, ours, *python_peers)
    want("native", SIZES, floor, pure, in_c)
    want("nats", [LARGE], ours, PEERS["nats"])
    want("c", SIZES, floor, in_c, *c_peers)
    want("unix", SIZES, ours, contenders.OURS_UNIX, in_c, contenders.C_UNIX)
    want("hubs", [LARGE], ours, contenders.OURS_HUBS)
    all_of_them = {**bench.ours, **peers_by_name(bench)}
    plan = {
        all_of_them[name]: sorted(sizes) for name, sizes in wanted.items() if name in all_of_them
    }
    times = measure(bench, plan, "say")
    bench.rows("say", times, floor)
    say_bars(bench, times, in_c, c_peers)


def peers_by_name(bench: Bench) -> dict[str, Contender]:
    found = [contenders.in_python(peer) for peer in bench.peers]
    found += [contenders.in_c(peer, bench.programs) for peer in bench.peers if peer in C_PEERS]
    return {contender.name: contender for contender in found}


def say_bars(bench: Bench, times: Times, in_c: str, c_peers: list[str]) -> None:
    floor, ours, nats = contenders.FLOOR, contenders.OURS, PEERS["nats"]

    def worst(one: str, other: str) -> float:
        return max(ratio(times, one, other, size) for size in SIZES)

    if bench.wants("clients"):
        what = "hub with our public Python client as members, against the floor (C hub, C members)"
        bench.bar(what, worst(ours, floor), 3)
        bench.stretch("the floor", worst(ours, floor), 1.8)
    if bench.wants("native"):
        what = "members in C speaking our protocol, against the floor"
        bench.bar(f"hub alone, {what}", worst(contenders.C_PURE, floor), 1.3)
        if contenders.has_native():
            what = f"hub alone with the optional C module, {what}"
            bench.bar(what, worst(contenders.C_NATIVE, floor), 1.1)
    if bench.wants("nats") and (nats, LARGE) in times:
        what = f"against NATS with nats-py members, N = {LARGE}"
        bench.bar(what, ratio(times, nats, ours, LARGE), 3, "times", "higher")
        bench.stretch("NATS", ratio(times, nats, ours, LARGE), 6)
    if bench.wants("c"):
        c_bar(bench, times, in_c, c_peers)
    if bench.wants("unix"):
        unix_bar(bench, times, in_c)
    if bench.wants("hubs"):
        what = f"1 hub against 3 hubs in 3 data centers (0 delay), N = {LARGE}"
        bench.bar(what, ratio(times, contenders.OURS_HUBS, ours, LARGE), 1.5)


def c_bar(bench: Bench, times: Times, in_c: str, peers: list[str]) -> None:
    """The worst of all sizes."""
    faster = {}
    for size in SIZES:
        if (peer := best(times, peers, size)) is not None:
            faster[size] = ratio(times, peer, in_c, size)
            row = {"N": size, "value": faster[size]}
            bench.report.row(job="C on both sides: times faster than", contender=peer, **row)
    if faster:
        what = "members in C on both sides, against the best peer"
        bench.bar(what, min(faster.values()), 1.5, "times", "higher")


def unix_bar(bench: Bench, times: Times, in_c: str) -> None:
    """The worst of all sizes, with members in C, whose own time is the least."""
    pairs = {contenders.OURS: contenders.OURS_UNIX, in_c: contenders.C_UNIX}
    found = {
        (tcp, size): ratio(times, unix, tcp, size) for tcp, unix in pairs.items() for size in SIZES
    }
    for (tcp, size), value in found.items():
        bench.report.row(job="unix socket, of TCP", contender=tcp, N=size, value=value)
    worst = max(value for (tcp, _), value in found.items() if tcp == in_c)
    bench.bar("over unix sockets, against our own TCP", worst, 0.65)


# Members in many processes


def measure_spread(bench: Bench) -> None:
    known = peers_by_name(bench)
    plan = {bench.ours[contenders.OURS]: [LARGE]}
    plan |= {known[PEERS[peer]]: [LARGE] for peer in bench.peers if peer in SPREAD}
    modules = {contenders.OURS: "ours"} | {PEERS[peer]: peer for peer in bench.peers}
    times = measure(
        bench,
        plan,
        "say",
        lambda c, size: sender_apart(modules[c.name], c.url, size, PROCESSES),
    )
    bench.rows(f"say, members in {PROCESSES} processes", times)
    rival = best(times, [name for name, _ in times if name != contenders.OURS], LARGE)
    if rival is not None:
        what = f"members spread over {PROCESSES} processes, N = {LARGE}"
        bench.bar(what, ratio(times, contenders.OURS, rival, LARGE), 1)


# Calls and casts


def measure_call(bench: Bench) -> None:
    known = peers_by_name(bench)
    plan = {bench.ours[contenders.OURS]: list(CALLERS)}
    plan |= {known[PEERS[p]]: list(CALLERS) for p in bench.peers if p in ("nats", "mqtt0")}
    modules = {contenders.OURS: "ours"} | {PEERS[peer]: peer for peer in bench.peers}

    def programs(contender: Contender, callers: int) -> list[tuple[str, ...]]:
        peer, url = modules[contender.name], contender.url
        return [driver(peer, "answerer", url, 1), driver(peer, "callers", url, callers)]

    times = measure(bench, plan, "call", programs)
    rates = {key: rate(found, key[1]) for key, found in times.items()}
    for (name, callers), found in times.items():
        one = {(name, callers): found}
        bench.rows("call, N callers", one, calls_per_s=rates[name, callers])
    others = {name for name, _ in rates} - {contenders.OURS}
    if others:
        worst = min(
            rates[contenders.OURS, callers] / rates[other, callers]
            for other in others
            for callers in CALLERS
        )
        bench.bar("`call` round trips/s, 1 caller and 64 callers", worst, 1, "ratio", "higher")


def rate(found: list[int], at_once: int) -> float:
    """How many a second, when so many follow each other without a pause side by side."""
    return at_once * len(found) / (sum(found) / 1e9)


def measure_cast(bench: Bench) -> None:
    known = peers_by_name(bench)
    in_c = contenders.C_NATIVE if contenders.has_native() else contenders.C_PURE
    names = [contenders.OURS, in_c, PEERS["nats"], C_PEERS["nats"][0]]
    all_of_them = {**bench.ours, **known}
    plan = {all_of_them[name]: [CAST_MEMBERS] for name in names if name in all_of_them}
    ratios = []
    for burst in BURSTS:
        times = measure(bench, plan, f"cast {burst}")
        per_s = {name: burst * size / median(times, name, size) * 1e9 for name, size in times}
        for (name, size), found in times.items():
            job = f"cast, {burst} at a time"
            bench.rows(job, {(name, size): found}, deliveries_per_s=per_s[name])
        if PEERS["nats"] in per_s:
            ratios.append(per_s[contenders.OURS] / per_s[PEERS["nats"]])
    if ratios:
        what = f"`cast` to {CAST_MEMBERS} members, deliveries/s, each message routed by itself"
        bench.bar(what, min(ratios), 1, "ratio", "higher")


# One killed, thousands quiet


def measure_kill(bench: Bench) -> None:
    ours = bench.ours[contenders.OURS]
    with ours.serving(bench.scratch):
        argv = (*PYTHON, "peers.killed", ours.url, str(KILLS))
        with ours.driven(bench.scratch, KILLS, [argv]) as killer:
            found = ours.order(killer, f"kill {KILLS}")
    bench.rows("kill, until the receipt", {(ours.name, 10): found})
    what = "a member killed during `say`: receipt names it after"
    bench.bar(what, percentile(found, 50) / 1e6, 5, "ms")


def measure_memory(bench: Bench) -> None:
    """How much a server's resident memory grows, for each session that does nothing."""
    known = peers_by_name(bench)
    own = contenders.C_NATIVE if contenders.has_native() else contenders.C_PURE
    names = [own, *(C_PEERS[peer][0] for peer in bench.peers if peer in ("nats", "redis", "mqtt0"))]
    for name in names:
        contender = {**bench.ours, **known}[name]
        kib = quiet_kib(bench, contender)
        bench.report.row(job="memory of a quiet session", contender=name, N=QUIET_SESSIONS, KiB=kib)
        if name == own:
            what = f"memory of a quiet session at {QUIET_SESSIONS:,} sessions"
            bench.bar(what, kib, 6, "KiB")


def quiet_kib(bench: Bench, contender: Contender) -> float:
    with contender.serving(bench.scratch):
        server = contender.processes[0].first
        before = server.rss_kib()
        with contender.driven(bench.scratch, QUIET_SESSIONS - 1):
            return (server.rss_kib() - before) / QUIET_SESSIONS


PARTS: dict[Callable[[Bench], None], tuple[str, ...]] = {
    measure_say: ("clients", "native", "nats", "c", "unix", "hubs"),
    measure_spread: ("spread",),
    measure_call: ("call",),
    measure_cast: ("cast",),
    measure_kill: ("kill",),
    measure_memory: ("memory",),
}
ALL = frozenset(part for parts in PARTS.values() for part in parts)


def draw(report: Report, axes: Any) -> None:
    """The medians of `say`, all contenders and sizes."""
    rows = [row for row in report.rows if row["job"] == "say"]
    for size in sorted({row["N"] for row in rows}):
        mine = [row for row in rows if row["N"] == size]
        names = [row["contender"] for row in mine]
        axes.plot([row["p50_us"] for row in mine], names, "o", label=f"N = {size}")
    axes.set_xscale("log")
    axes.set_xlabel("µs, median of a say to N members")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    if rows:
        axes.legend()


def chosen(variable: str, known: Collection[str]) -> list[str]:
    """The names in an environment variable; all, if it is not set."""
    names = list(filter(None, os.environ.get(variable, ",".join(known)).split(",")))
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"{variable} takes {', '.join(sorted(known))}, not {', '.join(unknown)}")
    return names


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    only = frozenset(chosen("ONLY", ALL))
    asked = chosen("PEERS", PEERS)
    is_whole = only == ALL and not {"PEERS", "SIZES", "ROUNDS"} & os.environ.keys()
    with tempfile.TemporaryDirectory(prefix="tabane-bench-") as name:
        scratch = Path(name)
        report = Report(
            "middlecon",
            "A say to N members, and all acknowledged",
            results=RESULTS if is_whole else scratch,
        )
        bench = Bench(scratch, compile_all(scratch / "native"), report, only, ())
        bench.ours = {c.name: c for c in contenders.ours_all(bench.programs)}
        for peer in asked:
            if (why := missing(peer)) is not None:
                bench.note(why)
        bench.peers = tuple(peer for peer in asked if missing(peer) is None)
        for part, names in PARTS.items():
            if bench.wants(*names):
                part(bench)
        code = report.finish(lambda axes: draw(report, axes))
        if is_whole:
            PAGE.write_text(page.write(report, bench.notes))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
