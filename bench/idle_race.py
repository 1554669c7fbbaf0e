"""Requests that meet an idle stop: none may be lost.

    make bench-idle-race

A cluster of one node runs an app that is stopped when it is idle for `STOP_AFTER_S`; a client sends
a request, waits about that long (with jitter, so that requests come before, while and after it is
stopped), and sends the next, `ROUNDS` times. A request is lost when it has no answer or one that is
not 200.
"""

from __future__ import annotations

import http.client
import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from report import Report, percentile
from tabane.errors import TabaneError
from tabane.tools.cli import run
from tabane.tools.cli.cluster import running_cluster
from tabane.tools.client import Cluster

ROUNDS = int(os.environ.get("ROUNDS", "1000"))
STOP_AFTER_S = 0.1
"""It is stopped up to 0.1 s later: gateways are not asked more often than that."""
JITTER = (0.9, 3.3)
LEAST_STOPPED_SHARE = 0.5
"""Of the rounds: with fewer stops nothing was raced for."""
APP = """\
name = "naps"
image = "host"
command = ["busybox", "httpd", "-f", "-p", "8000", "-h", "/usr/share/common-licenses"]
port = 8000
hosts = ["naps.test"]

[resources]
memory = "64MiB"
pids = 64

[reactive]
stop_after = "100ms"
"""


def request(address: str) -> tuple[str, float]:
    """What became of one request, in a word, and how many milliseconds it took."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection(address, 80, timeout=30)
    try:
        connection.request("GET", "/GPL-3", headers={"Host": "naps.test"})
        response = connection.getresponse()
        response.read()
        outcome = str(response.status)
    except (OSError, http.client.HTTPException) as error:
        outcome = type(error).__name__
    finally:
        connection.close()
    return outcome, (time.perf_counter() - began) * 1000


def race(address: str) -> tuple[Counter[str], list[float]]:
    chance = random.Random(ROUNDS)
    outcomes: Counter[str] = Counter()
    times_ms = []
    for _ in range(ROUNDS):
        outcome, took_ms = request(address)
        outcomes[outcome] += 1
        times_ms.append(took_ms)
        time.sleep(STOP_AFTER_S * chance.uniform(*JITTER))
    return outcomes, times_ms


def count_stops(cluster: Cluster) -> int:
    """The instances that ended, among the latest events."""
    events = cluster.get("/api/v1/events?limit=2000")["records"]
    return sum(event["state"] == "absent" for event in events)


def main() -> int:
    report = Report("idle_race", f"{ROUNDS} requests around the moment of an idle stop")
    with tempfile.TemporaryDirectory(prefix="tabane-bench-") as scratch:
        root = Path(scratch)
        root.chmod(0o755)
        with running_cluster(root, ["here"], 1):
            cluster = Cluster(root)
            (root / "naps.toml").write_text(APP)
            if run(["--root", str(root), "deploy", str(root / "naps.toml")]):
                raise TabaneError("the app was not stored")
            outcomes, times_ms = race(cluster.config["nodes"][0]["address"])
            stops = count_stops(cluster)
    for outcome, count in outcomes.most_common():
        report.row(outcome=outcome, requests=count)
    print(f"median {percentile(times_ms, 50):.1f} ms, p99 {percentile(times_ms, 99):.1f} ms")
    report.bar("lost requests", ROUNDS - outcomes["200"], 0, unit="requests")
    most = ROUNDS * LEAST_STOPPED_SHARE
    report.bar("idle stops", min(stops, ROUNDS), most, unit="stops", better="higher")
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
