"""Up and down the ladder: one server with one engine, by Tabane, by hand and by a peer, in turn.

For `bench/reactive.py`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from classes import wait_tried
from reactive_apps import Tried
from report import percentile
from tabane.errors import TabaneError
from tabane.tools.cli import run
from tabane.units import shorten
from wake import REST_S, Hand, Tabane

COLD = int(os.environ.get("COLD", "20"))
SLOW = int(os.environ.get("SLOW", "5"))
THAWS = int(os.environ.get("THAWS", "20"))
RESTORES = int(os.environ.get("RESTORES", "12"))
WARM = int(os.environ.get("WARM", "100"))
MACHINES = int(os.environ.get("MACHINES", "4"))
PEERS = int(os.environ.get("PEERS", "5"))
WARM_UP = 2
RUNGS = ("warm", "thaw", "restore", "cold")
TABANE, HAND, PEER = "tabane", "engine by hand", "systemd + podman"
POLL_S = 0.01
DIRECTORIES = re.compile(r"/mnt/run/\S*/")
"""Of the run, which are gone after it."""
LONGEST = 240
"""Characters of a reason."""
PATIENCE_S = 60.0


class Ladder(Tabane):
    """A cluster of one node, with all apps deployed; `tried` says which."""

    def __init__(self, directory: Path, tried: list[Tried]) -> None:
        super().__init__(directory, {})
        self.drivers = wait_tried(self)
        rows = self.cluster.get("/api/v1/doctor")["drivers"]
        self.reasons = {row["driver"]: row["reason"] for row in rows}
        self.seen: list[dict[str, Any]] = []
        for each in tried:
            for name, text in each.texts.items() if each.engine in self.drivers else ():
                file = directory / f"{name}.toml"
                file.write_text(text)
                if run(["--root", str(directory), "deploy", str(file)]) != 0:
                    raise TabaneError(f"{name} could not be deployed")

    def can(self, each: Tried, rung: str) -> bool:
        """As its driver says of itself."""
        able = self.drivers[each.engine]["capabilities"]
        return bool(able.get({"thaw": "freeze", "restore": "restore"}[rung]))

    def measure(self, app: str, rung: str = "cold") -> float:
        """Wake it from that rung, and see in the wake record that it was that one."""
        if rung == "thaw":
            self.wait(lambda: self.state(app) == "frozen", f"{app} to be frozen")
        before = self.latest(app)
        took_ms = self.wake(app)
        if rung == "warm":
            return took_ms
        self.wait(lambda: self.latest(app) != before, f"a wake record of {app}")
        record = self.latest(app)
        if record["option"] != rung:
            why = record.get("note", "")
            raise TabaneError(f"{app} was woken by {record['option']}, not {rung}: {why}")
        self.seen.append(record)
        return took_ms

    def state(self, app: str) -> str:
        """Of its one instance; empty when there is none."""
        rows = self.cluster.get("/api/v1/instances")["instances"]
        return next((row["state"] for row in rows if row["app"] == f"default/{app}"), "")

    def latest(self, app: str) -> dict[str, Any]:
        records = self.cluster.get("/api/v1/wakes?limit=20")["records"]
        mine = [each for each in records if each["app"] == f"default/{app}"]
        return max(mine, key=lambda each: float(each["at"]), default={})

    def wait_saved(self, app: str) -> None:
        def is_saved() -> bool:
            rows = self.cluster.get("/api/v1/checkpoints")["checkpoints"]
            return any(row["app"] == f"default/{app}" for row in rows)

        self.wait(is_saved, f"a checkpoint of {app}")

    def wait(self, look: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not look():
            if time.monotonic() > deadline:
                raise TabaneError(f"{what}: it did not come within {PATIENCE_S:.0f} s")
            time.sleep(POLL_S)

    def wake_phases(self) -> dict[str, dict[str, float]]:
        """Median milliseconds of each phase, by app and rung."""
        found: dict[str, dict[str, float]] = {}
        groups = {(each["app"], each["option"]) for each in self.seen}
        for app, rung in sorted(groups):
            mine = [e["phases_us"] for e in self.seen if (e["app"], e["option"]) == (app, rung)]
            medians = {p: percentile([each.get(p, 0) for each in mine], 50) for p in mine[0]}
            name = f"{app.removeprefix('default/')} {rung}"
            found[name] = {phase: round(us / 1000, 3) for phase, us in medians.items()}
        return found


class Climb:
    """See the module's text. What fails is not tried again, and said in `why_not`."""

    def __init__(self, each: Tried, ladder: Ladder, hand: Hand, peer: Hand) -> None:
        self.each, self.ladder = each, ladder
        self.others = {HAND: hand}
        if each.isolation == "container":
            self.others[PEER] = peer
        self.samples: dict[tuple[str, str], list[float]] = {}
        """By rung and who."""
        self.why_not: dict[tuple[str, str], str] = {}

    def all(self) -> None:
        emulated = self.ladder.drivers[self.each.engine]["emulated"]
        self.cold(MACHINES if emulated else SLOW if self.each.server == "slow" else COLD)
        if self.each.engine == "wasmtime":
            for rung in ("warm", "thaw", "restore"):
                self.why_not[rung, HAND] = "by hand a CGI program ends with each request"
        self.kept(MACHINES if emulated else WARM)
        self.restored(MACHINES if emulated else RESTORES)

    def cold(self, times: int) -> None:
        for number in self.rounds("cold", self.each.name, times):
            self.own("cold", self.each.name, number)
            self.ladder.stop()

    def kept(self, times: int) -> None:
        """Warm, then frozen and thawed, one instance of each."""
        name = self.each.name
        self.ladder.wake(name)
        self.order("open", name, "warm", "thaw")
        for number in self.rounds("warm", name, times):
            self.own("warm", name, number)
        if self.ladder.can(self.each, "thaw"):
            for number in self.rounds("thaw", name, min(THAWS, times)):
                self.own("thaw", name, number)
        else:
            self.why_not["thaw", TABANE] = "its driver cannot freeze"
        self.order("close", name, "warm", "thaw")
        self.ladder.stop()

    def restored(self, times: int) -> None:
        name = self.each.saved
        if not self.ladder.can(self.each, "restore"):
            self.why_not["restore", TABANE] = "its driver cannot restore"
            return
        self.ladder.wake(name)
        self.ladder.wait_saved(name)
        self.ladder.stop()
        self.order("save", name, "restore")
        for number in self.rounds("restore", name, times):
            self.own("restore", name, number)
            self.ladder.stop()
        self.order("drop", name, "restore")

    def rounds(self, rung: str, name: str, times: int) -> Iterator[int]:
        """In each, the others have been asked for that rung."""
        line, rest_s = f"{rung} {name}", 0.0 if rung == "warm" else REST_S
        for number in range(-WARM_UP, times):
            for who, other in self.others.items():
                if who != PEER or rung == "warm" or number < PEERS:
                    self.attempt(rung, who, number, lambda o=other: o.measure(line, rest_s))
            yield number

    def own(self, rung: str, name: str, number: int) -> None:
        self.attempt(rung, TABANE, number, lambda: self.ladder.measure(name, rung))

    def order(self, what: str, name: str, *rungs: str) -> None:
        """What the others do before or after rungs."""
        for who, other in self.others.items():
            self.attempt(rungs[0], who, -1, lambda o=other: o.measure(f"{what} {name}"))
            for rung in rungs[1:]:
                if (why := self.why_not.get((rungs[0], who))) is not None:
                    self.why_not.setdefault((rung, who), why)

    def attempt(self, rung: str, who: str, number: int, measure: Callable[[], float]) -> None:
        """Keep what it gives, from number 0 on."""
        if (rung, who) in self.why_not:
            return
        try:
            took_ms = measure()
        except TabaneError as error:
            self.why_not[rung, who] = (
                f"failed: {shorten(DIRECTORIES.sub('.../', str(error)), LONGEST)}"
            )
            return
        if number >= 0:
            self.samples.setdefault((rung, who), []).append(took_ms)
