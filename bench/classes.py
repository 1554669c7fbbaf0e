"""The classes side by side: one HTTP app in each that works here, beside the bare engines.

    make bench-classes

For each engine in turn, 30 times, alternating: Tabane's wake (from a client's connection to the
gateway of a cluster of one node to the first byte of the answer) and the engine by hand (from its
start to the first byte). One instance of each is then looked at, and asked again and again: its
memory, which is its share of what its processes have resident, and how many of the host kernel's
system calls its processes can make. The Linux classes run busybox's web server from the same image;
`unikernel` runs a CGI program in C and a component in Python, each with a fresh instance for every
request, so that what it takes warm is instantiation to first byte, and the gateway. Machines are
emulated where KVM does not work, and the table says so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from report import Report, percentile, summary
from tabane.testing.reach import calls, reachable
from wake import ADDED_MS, ADDED_SHARE, Hand, Tabane

WAKES = int(os.environ.get("WAKES", "30"))
WARM_UP = 2
WARM = 50
LOAD_S = 3
CONNECTIONS = 4
EXAMPLES = Path(__file__).parents[1] / "examples"
ENGINES = {
    "crun": "container",
    "runc": "container",
    "containerd": "container",
    "runsc": "sandbox",
    "wasmtime": "unikernel",
    "wasmtime-component": "unikernel",
    "qemu-microvm": "microvm",
    "qemu": "vm",
}
"""Names of rows, and the class of each."""
APP = """\
name = "{name}"
class = "{isolation}"
driver = "{driver}"
image = "{image}"
{command}
port = 8080
hosts = ["{name}.test"]
allow_emulation = true

[resources]
memory = "128MiB"
pids = 64

[reactive]
stop_after = "1h"
start_timeout = "1m"
"""
COMMAND = 'command = ["/bin/busybox", "httpd", "-f", "-p", "8080", "-h", "/srv"]'


def make_apps(place: Path) -> dict[str, str]:
    """App files by name; their images are made below `place`."""
    tree = place / "image"
    for name in ("bin", "srv", "etc", "tmp"):
        (tree / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin/busybox")
    (tree / "srv/index.html").write_text("hello\n")
    (tree / "srv/GPL-3").write_text("hello\n")
    images = {
        "wasmtime": f"wasm:{make_example('wasm-c', 'hello.wasm', place)}",
        "wasmtime-component": f"wasm:{make_example('wasm-python', 'hello.wasm', place)}",
    }
    return {
        name: APP.format(
            name=name,
            isolation=isolation,
            driver=name.removesuffix("-component"),
            image=images.get(name, f"rootfs:{tree}"),
            command="" if name in images else COMMAND,
        )
        for name, isolation in ENGINES.items()
    }


def make_example(name: str, made: str, place: Path) -> Path:
    """An example's program, built in a copy of its directory."""
    copy = place / name
    shutil.copytree(EXAMPLES / name, copy, ignore=shutil.ignore_patterns("*.wasm", "__pycache__"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(("make", "-s", "-C", str(copy)), check=True, env=os.environ | {"PATH": path})
    return copy / made


def working(tabane: Tabane) -> dict[str, dict[str, Any]]:
    """The drivers that work here, by name."""
    rows = tabane.cluster.get("/api/v1/doctor")["drivers"]
    return {row["driver"]: row for row in rows if row["works"]}


def look(tabane: Tabane, name: str) -> dict[str, Any]:
    """One instance of it: its memory, the system calls it can make, and then how fast it answers
    when it is there: one request after the other, and as many as it can."""
    tabane.wake(name)
    (instance,) = tabane.cluster.get("/api/v1/instances")["instances"]
    pids = processes(instance["cgroup"])
    assert pids, f"{name} has no process in {instance['cgroup']}"
    found: dict[str, Any] = {
        "rss_mib": sum(of_each(pids, proportional_kib)) / 1024,
        "processes": len(pids),
        "host calls": max(of_each(pids, lambda pid: len(reachable(pid)))),
        "warm ms": percentile([tabane.wake(name) for _ in range(WARM)], 50),
        "requests/s": load(tabane.address, f"{name}.test"),
    }
    tabane.stop()
    return found


def processes(cgroup: str) -> list[int]:
    """Of a cgroup and those below it, as this namespace sees them."""
    place = Path("/sys/fs/cgroup/pids", cgroup.lstrip("/"))
    if not place.exists():
        place = Path("/sys/fs/cgroup", cgroup.lstrip("/"))
    files = (place / "cgroup.procs", *place.glob("*/cgroup.procs"))
    return [int(pid) for file in files for pid in file.read_text().split()]


def of_each(pids: list[int], tell: Callable[[int], int]) -> list[int]:
    """What is told of those that are still there: some serve one request and end."""
    found = []
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            found.append(tell(pid))
    return found


def proportional_kib(pid: int) -> int:
    """Its share of the memory that it and others have resident (proc_pid_smaps_rollup(5))."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1])


def load(address: str, host: str) -> float:
    """Requests a second, warm, through the gateway."""
    options = ("-t1", f"-c{CONNECTIONS}", f"-d{LOAD_S}s", "-H", f"Host: {host}")
    argv = ("wrk", *options, f"http://{address}/GPL-3")
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    found = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    assert found is not None and "Non-2xx" not in done.stdout, done.stdout
    return float(found[1])


def measure(hand: Hand, tabane: Tabane, names: list[str]) -> dict[str, tuple[list[float], ...]]:
    """Milliseconds by hand and through Tabane, alternating."""
    times: dict[str, tuple[list[float], ...]] = {name: ([], []) for name in names}
    for number in range(WARM_UP + WAKES):
        for name in names:
            pair = hand.measure(name), tabane.measure(name)
            if number >= WARM_UP:
                for values, value in zip(times[name], pair, strict=True):
                    values.append(value)
    return times


def main() -> int:
    report = Report("classes", "The classes: cold wake of an HTTP app, request to first byte (ms)")
    with tempfile.TemporaryDirectory(prefix="tabane-bench-") as scratch:
        places = [Path(scratch, name) for name in ("apps", "hand", "tabane")]
        for place in (Path(scratch), *places):
            place.mkdir(exist_ok=True)
            place.chmod(0o755)
        apps = make_apps(places[0])
        tabane, hand = Tabane(places[2], apps), Hand(places[1], apps)
        try:
            drivers = wait_tried(tabane)
            names = [name for name in ENGINES if name.removesuffix("-component") in drivers]
            times = measure(hand, tabane, names)
            looks = {name: look(tabane, name) for name in names}
        finally:
            hand.close()
            tabane.close()
    for name in names:
        by_hand, whole = times[name]
        emulated = " (emulated)" if drivers[name.removesuffix("-component")]["emulated"] else ""
        row = {"class": ENGINES[name], "engine": f"{name}{emulated}"}
        report.row(**row, what="by hand", **summary(by_hand))
        report.row(**row, what="tabane", **summary(whole), **looks[name])
        added = percentile(whole, 50) - percentile(by_hand, 50)
        most = max(ADDED_MS, ADDED_SHARE * percentile(by_hand, 50))
        report.bar(f"{name} added ms", added, most, unit="ms")
        if name == "wasmtime":
            report.bar("wasmtime fresh instance ms", looks[name]["warm ms"], 5, unit="ms")
    print(f"of {len(calls())} system calls of the kernel")
    return report.finish()


def wait_tried(tabane: Tabane) -> dict[str, dict[str, Any]]:
    """The drivers that work, once all have been tried: machines take some time to boot."""
    while "still being tried" in json.dumps(tabane.cluster.get("/api/v1/doctor")["drivers"]):
        time.sleep(0.2)
    return working(tabane)


if __name__ == "__main__":
    raise SystemExit(main())
