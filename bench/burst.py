"""From no instance to a hundred in one burst, and what that means for the wakes of others.

    make bench-burst

A session is a TCP connection to an echo server that takes one at a time, so a hundred of them at
once are a hundred instances. In each round:

- by hand: the engine alone, its bundles and links made before, as many at once as there are
  processors and two more, which is about what Tabane finds by itself;
- a burst through Tabane, links and all: until the last session has its first byte. In its middle
  come, one after the other, wakes of other apps (`other`), and further sessions of the app itself
  (`same`): these wait for their turn behind the burst, as everybody would without a fair order;
- the same wakes of others without a burst (`alone`).

BURST, PROBES and ROUNDS change how many. A whole run takes about two minutes.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from report import Report, percentile, summary
from tabane.errors import TabaneError
from wake import Hand, Tabane

BURST = int(os.environ.get("BURST", "100"))
PROBES = int(os.environ.get("PROBES", "8"))
ROUNDS = int(os.environ.get("ROUNDS", "5"))
PARALLEL = len(os.sched_getaffinity(0)) + 2
ENGINE = "crun"
BURST_PORT, OTHER_PORT = 7100, 7200
TIMEOUT_S = 60.0
LONGER, SLOWER, FAIRER = 2.5, 6.0, 0.25
"""What is allowed: of the burst's time by hand, which makes no links and starts for nobody else
meanwhile; of a wake alone; and of what a session waits behind the burst. All of medians."""
APP = """\
name = "{name}"
image = "host"
driver = "{engine}"
command = ["busybox", "nc", "-ll", "-p", "7000", "-e", "cat"]
port = 7000

[resources]
memory = "16MiB"
disk = "1MiB"
pids = 16

[reactive]
concurrency = 1
max = {most}
start_timeout = "60s"
stop_timeout = "1s"
stop_after = "1h"

[[tcp]]
port = {port}
target = 7000
"""


@dataclass
class Times:
    """Milliseconds."""

    hand: list[float] = field(default_factory=list)
    burst: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    """Of each session of the bursts."""
    other: list[float] = field(default_factory=list)
    same: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)


class Sessions:
    """Connections that stay open until `close`."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._open: list[asyncio.StreamWriter] = []
        self.answered = 0
        self._changed = asyncio.Event()

    async def first_byte(self, port: int) -> float:
        began = time.perf_counter()
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await asyncio.open_connection(self._address, port)
            self._open.append(writer)
            writer.write(b"x")
            if not await reader.read(1):
                raise TabaneError(f"a session at port {port} was closed: it found no slot in time")
        self.answered += 1
        self._changed.set()
        return (time.perf_counter() - began) * 1000

    async def wait_answered(self, count: int) -> None:
        while self.answered < count:
            self._changed.clear()
            await self._changed.wait()

    async def close(self) -> None:
        for writer in self._open:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in self._open))


async def measure_burst(address: str, times: Times) -> None:
    """One burst; at equal steps of it, a wake of another app and a session of its own."""
    sessions = Sessions(address)
    began = time.perf_counter()
    coming = [asyncio.ensure_future(sessions.first_byte(BURST_PORT)) for _ in range(BURST)]
    others, same = [], []
    for number in range(PROBES):
        await sessions.wait_answered((number + 1) * BURST // (2 * PROBES + 2))
        others.append(asyncio.ensure_future(sessions.first_byte(OTHER_PORT + number)))
        same.append(asyncio.ensure_future(sessions.first_byte(BURST_PORT)))
    times.first += await gather(coming)
    times.burst.append((time.perf_counter() - began) * 1000)
    times.other += await gather(others)
    times.same += await gather(same)
    await sessions.close()


async def measure_alone(address: str, times: Times) -> None:
    sessions = Sessions(address)
    for number in range(PROBES):
        times.alone.append(await sessions.first_byte(OTHER_PORT + number))
    await sessions.close()


async def gather(coming: Iterable[Awaitable[float]]) -> list[float]:
    return list(await asyncio.gather(*coming))


def main() -> int:
    apps = {"burst": app("burst", BURST + PROBES, BURST_PORT)}
    apps |= {f"other-{n}": app(f"other-{n}", 1, OTHER_PORT + n) for n in range(PROBES)}
    times = Times()
    with tempfile.TemporaryDirectory(prefix="tabane-bench-") as scratch:
        places = [Path(scratch, name) for name in ("hand", "tabane")]
        for place in (Path(scratch), *places):
            place.mkdir(exist_ok=True)
            place.chmod(0o755)
        hand = Hand(places[0], {"burst": apps["burst"]}, "burst_by_hand.py")
        tabane = Tabane(places[1], apps)
        try:
            for _ in range(ROUNDS):
                times.hand.append(hand.measure(f"burst {BURST} {PARALLEL}"))
                asyncio.run(measure_alone(tabane.address, times))
                tabane.stop()
                asyncio.run(measure_burst(tabane.address, times))
                tabane.stop()
        finally:
            hand.close()
            tabane.close()
    return tell(times)


def app(name: str, most: int, port: int) -> str:
    return APP.format(name=name, engine=ENGINE, most=most, port=port)


def tell(times: Times) -> int:
    report = Report("burst", f"{BURST} instances in a burst, and wakes of others in it (ms)")
    for what, values in (
        (f"{BURST} by hand, {PARALLEL} at once", times.hand),
        (f"{BURST} through Tabane", times.burst),
        ("a session of the burst", times.first),
        ("one that came behind it", times.same),
        ("another app's wake in it", times.other),
        ("another app's wake alone", times.alone),
    ):
        report.row(what=what, **summary(values))
    whole, by_hand = percentile(times.burst, 50), percentile(times.hand, 50)
    report.row(what="starts/s by hand", p50=BURST / by_hand * 1000)
    report.row(what="starts/s through Tabane", p50=BURST / whole * 1000)
    other, alone, same = (percentile(v, 50) for v in (times.other, times.alone, times.same))
    report.bar("burst, of by hand", whole / by_hand, LONGER, unit="times")
    report.bar("wake in a burst, of alone", other / alone, SLOWER, unit="times")
    report.bar("wake in a burst, of waiting in line", other / same, FAIRER, unit="times")
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
