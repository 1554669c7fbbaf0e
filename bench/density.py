"""Density: what 10,000 deployed apps cost a node, and 500 frozen instances.

One cluster of one node with 3 gateways has the few apps, another one has the many; both are there
at the same time, so that their wakes alternate. Memory is the resident set (RSS) of all of a
cluster's processes, each counted in full: what two share counts twice. Counts are set by the
environment: APPS, WAKES, FROZEN.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import Report, percentile, summary
from tabane.errors import TabaneError
from tabane.tools.cli.cluster import start_cluster, stop_cluster
from tabane.tools.client import Cluster

APPS = int(os.environ.get("APPS", "10000"))
WAKES = int(os.environ.get("WAKES", "40"))
FROZEN = int(os.environ.get("FROZEN", "500"))
FEW = 10
GATEWAYS = 3
IDLE_S = 10.0
SETTLE_S = 2.0
"""After something was done, until what follows from it is done, too."""
FREEZE_GIVE_UP_S = 120.0
KIB_AN_APP, DEPLOY_S, WAKE_RATIO, THAW_MS = 4.0, 60.0, 1.1, 3.0
IDLE_PERCENT = 1.0
"""Of one core, what so many apps, or so many frozen instances, may take while nobody asks."""
GROWTH_KIB = 0.5
"""An app, of what a second round of deploying and removing all of them may leave behind."""
APP = """\
name = "{name}"
class = "container"
image = "host"
driver = "crun"
command = ["busybox", "httpd", "-f", "-p", "8000", "-h", "/usr/share/common-licenses"]
port = 8000
hosts = ["{name}.test"]

[resources]
memory = "64MiB"
pids = 64

[reactive]
{reactive}
"""
REST = 'stop_after = "1h"'
FREEZES = 'freeze_after = "1s"\nstop_after = "2h"'
REQUEST = "GET /GPL-3 HTTP/1.1\r\nHost: {name}.test\r\nConnection: close\r\n\r\n"


class Place:
    """A cluster of one node, and what can be seen of its processes."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        root.chmod(0o755)
        self.root = root
        start_cluster(root, ["tokyo"], 1, GATEWAYS, "")
        self.cluster = Cluster(root)
        self.address = self.cluster.config["nodes"][0]["address"]

    def command(self, *argv: str) -> float:
        """Run `tabane`; returns how long it took, s."""
        began = time.perf_counter()
        program = Path(sys.executable).with_name("tabane")
        subprocess.run([program, "--root", self.root, *argv], check=True)
        return time.perf_counter() - began

    def deploy(self, names: list[str], reactive: str = REST) -> float:
        """From a directory of as many files; returns how long it took, s."""
        with tempfile.TemporaryDirectory(dir=self.root) as directory:
            for name in names:
                text = APP.format(name=name, reactive=reactive)
                Path(directory, f"{name}.toml").write_text(text)
            return self.command("deploy", directory)

    def ask(self, name: str) -> float:
        """A request to an app, from its connection to the first byte; ms."""
        request = REQUEST.format(name=name).encode()
        began = time.perf_counter()
        with socket.create_connection((self.address, 80)) as sock:
            sock.sendall(request)
            answer = sock.recv(4096)
            took_ms = (time.perf_counter() - began) * 1000
            if not answer.startswith(b"HTTP/1.1 200"):
                raise TabaneError(f"{name} was not woken: {answer.decode(errors='replace')}")
            while sock.recv(1 << 16):
                pass
        return took_ms

    def wake(self, name: str) -> float:
        """Wake an app that has no instance, and stop that again; ms."""
        took_ms = self.ask(name)
        for instance in self.instances():
            self.cluster.post(f"/api/v1/instances/{instance['id']}/stop", {})
        while self.instances():
            time.sleep(0.02)
        time.sleep(0.15)  # the pool of links is filled again
        return took_ms

    def instances(self) -> list[dict[str, object]]:
        found: list[dict[str, object]] = self.cluster.get("/api/v1/instances")["instances"]
        return found

    def wait_frozen(self, count: int) -> None:
        give_up = time.monotonic() + FREEZE_GIVE_UP_S
        while sum(instance["state"] == "frozen" for instance in self.instances()) < count:
            if time.monotonic() > give_up:
                raise TabaneError(f"not all of {count} instances were frozen in time")
            time.sleep(0.5)

    def parts(self) -> dict[int, str]:
        """The cluster's own processes: pid, and which it is."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                argv = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            modules = [word for word in argv if word.startswith("tabane.")]
            if modules and any(word.startswith(f"{self.root}/") for word in argv):
                found[int(path.name)] = modules[0].rpartition(".")[2]
        return found

    def rss_kib(self) -> dict[str, float]:
        """By part; those of a name added up."""
        time.sleep(SETTLE_S)
        return self._add_up(rss_kib)

    def idle_percent(self) -> dict[str, float]:
        """What they take of a core while nothing is asked of them."""
        time.sleep(SETTLE_S)
        before = self._add_up(cpu_s)
        time.sleep(IDLE_S)
        after = self._add_up(cpu_s)
        return {part: 100 * (after[part] - before[part]) / IDLE_S for part in after}

    def descriptors(self) -> dict[str, float]:
        return self._add_up(lambda pid: len([*Path(f"/proc/{pid}/fd").iterdir()]))

    def _add_up(self, look) -> dict[str, float]:
        found: dict[str, float] = {}
        for pid, part in self.parts().items():
            found[part] = found.get(part, 0) + look(pid)
        return found

    def close(self) -> None:
        stop_cluster(self.root)


def rss_kib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return float(status.partition("VmRSS:")[2].split()[0])


def in_use_kib(cgroup: str) -> float:
    """All that the kernel counts as an instance's."""
    v1 = Path(f"/sys/fs/cgroup/memory{cgroup}/memory.usage_in_bytes")
    file = v1 if v1.exists() else Path(f"/sys/fs/cgroup{cgroup}/memory.current")
    return int(file.read_text()) / 1024


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def added(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """With their sum, `all`."""
    parts = {part: after[part] - before.get(part, 0) for part in sorted(after)}
    return {"all": sum(parts.values()), **parts}


def measure_apps(report: Report, few: Place, many: Place, names: list[str]) -> None:
    """The many are deployed and removed twice; between, they are woken."""
    first, few_names = names[:FEW], [f"few-{number}" for number in range(FEW)]
    few.deploy(few_names)
    many.deploy(first)
    for pair in zip(few_names, first, strict=True):
        few.wake(pair[0]), many.wake(pair[1])
    before, before_idle = many.rss_kib(), many.idle_percent()
    took_s = many.deploy(names)
    after = many.rss_kib()
    with_all, with_few = added(before, after), sum(before_idle.values())
    idle = sum(many.idle_percent().values()) - with_few
    for part, kib in with_all.items():
        report.row(what=f"{APPS} apps: memory of {part}", n=1, p50=kib / APPS, unit="KiB an app")
    measure_wakes(report, few, many, few_names, names)
    woken = added(before, many.rss_kib())["all"]
    report.row(what=f"the same when {WAKES} were woken", n=1, p50=woken / APPS, unit="KiB an app")
    times_s = [took_s]
    left = []
    for last in (False, True):
        took = many.command("rm", *names)
        left.append(added(before, many.rss_kib())["all"])
        report.row(what=f"removing {APPS} apps", n=1, p50=took, unit="s")
        if not last:
            times_s.append(many.deploy(names))
    report.row(what=f"deploying {APPS} apps", **summary(times_s), unit="s")
    for which, kib in zip(("once", "twice"), left, strict=True):
        report.row(what=f"removed {which}: left", n=1, p50=kib / APPS, unit="KiB an app")
    report.bar("memory an app", with_all["all"] / APPS, KIB_AN_APP, unit="KiB")
    report.bar(f"deploy {APPS} apps", max(times_s), DEPLOY_S, unit="s")
    report.bar(f"idle: {APPS} apps take", idle, IDLE_PERCENT, unit="% of a core")
    report.bar("a second round leaves", (left[1] - left[0]) / APPS, GROWTH_KIB, unit="KiB an app")


def measure_wakes(
    report: Report, few: Place, many: Place, few_names: list[str], names: list[str]
) -> None:
    few_ms, many_ms = [], []
    for name in random.sample(names, WAKES):
        few_ms.append(few.wake(random.choice(few_names)))
        many_ms.append(many.wake(name))
    report.row(what=f"wake with {FEW} apps", **summary(few_ms), unit="ms")
    report.row(what=f"wake with {APPS} apps", **summary(many_ms), unit="ms")
    ratio = percentile(many_ms, 50) / percentile(few_ms, 50)
    report.bar(f"wake with {APPS} apps / with {FEW}", ratio, WAKE_RATIO, unit="ratio")


def measure_frozen(report: Report, place: Place) -> None:
    """As many containers as there are apps, all frozen, and woken at random, one after the other;
    what the same request takes just after that is what it costs when nothing is frozen."""
    names = [f"ice-{number}" for number in range(FROZEN)]
    place.deploy(names, FREEZES)
    before, fds = place.rss_kib(), place.descriptors()
    idle_before = sum(place.idle_percent().values())
    began = time.perf_counter()
    for name in names:
        place.ask(name)
    report.row(what=f"starting {FROZEN} containers", n=1, p50=time.perf_counter() - began, unit="s")
    place.wait_frozen(FROZEN)
    for part, kib in added(before, place.rss_kib()).items():
        what = f"{FROZEN} frozen: memory of {part}"
        report.row(what=what, n=1, p50=kib / FROZEN, unit="KiB each")
    for part, count in added(fds, place.descriptors()).items():
        what = f"{FROZEN} frozen: open files of {part}"
        report.row(what=what, n=1, p50=count / FROZEN, unit="each")
    own = [in_use_kib(str(instance["cgroup"])) for instance in place.instances()]
    report.row(what="a frozen container's own memory", **summary(own), unit="KiB")
    idle = sum(place.idle_percent().values()) - idle_before
    thawed_ms, warm_ms = [], []
    for name in random.sample(names, FROZEN):
        thawed_ms.append(place.ask(name))
        warm_ms.append(place.ask(name))
    report.row(what="thaw, to the first byte", **summary(thawed_ms), unit="ms")
    report.row(what="the same when it runs", **summary(warm_ms), unit="ms")
    thaw_ms = percentile(thawed_ms, 50) - percentile(warm_ms, 50)
    report.bar(f"{FROZEN} frozen: thaw added", thaw_ms, THAW_MS, unit="ms")
    report.bar(f"{FROZEN} frozen: idle", idle, IDLE_PERCENT, unit="% of a core")


def main() -> int:
    report = Report("density", f"{APPS} apps and {FROZEN} frozen containers on one node")
    with tempfile.TemporaryDirectory(prefix="tabane-bench-") as scratch:
        Path(scratch).chmod(0o755)
        places: list[Place] = []
        try:
            places = [Place(Path(scratch, name)) for name in ("few", "many")]
            measure_apps(report, *places, [f"app-{number}" for number in range(APPS)])
            measure_frozen(report, places[0])
        finally:
            for place in places:
                place.close()
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
