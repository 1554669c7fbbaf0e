"""From a request to its first byte: a cold static server, through Tabane and by hand, in one run.

    make bench-wake

For each engine in turn, 50 times, alternating: Tabane's wake (a client connects to the
gateway of a cluster of one node and waits for the first byte) and the engine by hand (the same
bundle, prepared beforehand, `ENGINE run` until the port has given its first byte). The difference
of the medians is what Tabane adds.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

from report import Report, percentile, summary
from tabane.errors import TabaneError
from tabane.network.uplink import set_up_network, tear_down_network
from tabane.node.local import NodeSpec, start_node, stop_node
from tabane.tools.cli import run
from tabane.tools.cli.cluster import start_cluster, stop_cluster
from tabane.tools.client import Cluster

WAKES = int(os.environ.get("WAKES", "50"))
WARM_UP = 3
REST_S = 0.15
"""After each, so that all find the machine alike: links of the one before are removed and made
anew, and a processor that has just done the same is faster at it."""
ENGINES = {"runc": "container", "crun": "container", "runsc": "sandbox"}
"""And the class of each."""
BARS = {"runc": 60.0, "crun": 25.0, "runsc": 300.0}
ADDED_MS, ADDED_SHARE = 5.0, 0.1
"""What Tabane may add: so much, or that part of the engine's own time, whichever is more."""
APP = """\
name = "{engine}"
class = "{isolation}"
image = "host"
driver = "{engine}"
command = ["busybox", "httpd", "-f", "-p", "8000", "-h", "/usr/share/common-licenses"]
port = 8000
hosts = ["{engine}.test"]

[resources]
memory = "64MiB"
pids = 64

[reactive]
stop_after = "1h"
"""
REQUEST = "GET /GPL-3 HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"


class Hand:
    """The engine by hand, in a node of its own. `apps`: app files by name; `program`: of this
    directory, the node's."""

    def __init__(
        self, directory: Path, apps: dict[str, str], program: str = "wake_by_hand.py"
    ) -> None:
        self.network = set_up_network("bh" + os.urandom(2).hex())
        for name, text in apps.items():
            (directory / f"{name}.toml").write_text(text)
        cgroup = f"/tabane/{self.network.cluster}/hand"
        script = Path(__file__).with_name(program)
        argv = (sys.executable, str(script), str(directory), cgroup)
        (directory / "run").mkdir()
        spec = NodeSpec("hand", 1, argv, directory / "log", cgroup, directory=directory)
        self.node = start_node(self.network, spec)
        self.sock = self._connect(directory / "hand.sock")
        self.file = self.sock.makefile("rw")

    def _connect(self, path: Path) -> socket.socket:
        deadline = time.monotonic() + 20
        while True:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(str(path))
                return sock
            except OSError:
                sock.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def measure(self, app: str, rest_s: float = REST_S) -> float:
        self.file.write(app + "\n")
        self.file.flush()
        answer = self.file.readline().strip()
        time.sleep(rest_s)
        try:
            return float(answer)
        except ValueError:
            raise TabaneError(f"{app} failed by hand: {answer or 'its node has ended'}") from None

    def close(self) -> None:
        self.file.close()
        self.sock.close()
        stop_node(self.network, self.node)
        tear_down_network(self.network)


class Tabane:
    """A cluster of one node. `apps`: app files by name."""

    def __init__(self, directory: Path, apps: dict[str, str]) -> None:
        self.root = directory
        self.apps = apps
        start_cluster(directory, ["tokyo"], 1, 1, "")
        self.cluster = Cluster(directory)
        self.address = self.cluster.config["nodes"][0]["address"]
        for name, text in apps.items():
            file = directory / f"{name}.toml"
            file.write_text(text)
            assert run(["--root", str(directory), "deploy", str(file)]) == 0

    def measure(self, app: str) -> float:
        """Wake it, and stop it again."""
        took_ms = self.wake(app)
        self.stop()
        return took_ms

    def wake(self, app: str) -> float:
        request = REQUEST.format(host=f"{app}.test").encode()
        began = time.perf_counter()
        with socket.create_connection((self.address, 80)) as sock:
            sock.sendall(request)
            answer = sock.recv(4096)
            took_ms = (time.perf_counter() - began) * 1000
            if not answer.startswith(b"HTTP/1.1 200"):
                raise TabaneError(f"the wake failed: {answer.decode(errors='replace')}")
            while sock.recv(1 << 16):
                pass
        return took_ms

    def stop(self) -> None:
        for instance in self.cluster.get("/api/v1/instances")["instances"]:
            self.cluster.post(f"/api/v1/instances/{instance['id']}/stop", {})
        while self.cluster.get("/api/v1/instances")["instances"]:
            time.sleep(0.02)
        time.sleep(REST_S)

    def phases(self) -> dict[str, dict[str, float]]:
        """Median microseconds by phase, from Tabane's own wake records."""
        records = self.cluster.get("/api/v1/wakes?limit=2000")["records"]
        found: dict[str, dict[str, float]] = {}
        for app in self.apps:
            mine = [r["phases_us"] for r in records if r["app"] == f"default/{app}"][WARM_UP:]
            found[app] = {p: percentile([r[p] for r in mine], 50) / 1000 for p in mine[0]}
        return found

    def close(self) -> None:
        stop_cluster(self.root)


def main() -> int:
    report = Report("wake", "Cold wake of a static server, request to first byte (ms)")
    with tempfile.TemporaryDirectory(prefix="tabane-bench-") as scratch:
        places = [Path(scratch, name) for name in ("hand", "tabane")]
        for place in (Path(scratch), *places):
            place.mkdir(exist_ok=True)
            place.chmod(0o755)
        apps = {e: APP.format(engine=e, isolation=isolation) for e, isolation in ENGINES.items()}
        hand, tabane = Hand(places[0], apps), Tabane(places[1], apps)
        try:
            times = {e: ([], []) for e in ENGINES}
            for number in range(WARM_UP + WAKES):
                for engine in ENGINES:
                    pair = (hand.measure(engine), tabane.measure(engine))
                    for values, value in zip(times[engine], pair, strict=True):
                        if number >= WARM_UP:
                            values.append(value)
            phases = tabane.phases()
        finally:
            hand.close()
            tabane.close()
    for engine in ENGINES:
        by_hand, whole = times[engine]
        report.row(engine=engine, what="by hand", **summary(by_hand))
        report.row(engine=engine, what="tabane", **summary(whole))
        added = percentile(whole, 50) - percentile(by_hand, 50)
        most = max(ADDED_MS, ADDED_SHARE * percentile(by_hand, 50))
        report.bar(f"{engine} added ms", added, most, unit="ms")
        report.bar(f"{engine} wake ms", percentile(whole, 50), BARS[engine], unit="ms")
        ratio = percentile(whole, 99) / percentile(whole, 50)
        report.bar(f"{engine} p99/median", ratio, 3, unit="ratio")
        print(f"{engine} phases, median ms: {json.dumps(phases[engine])}")
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
