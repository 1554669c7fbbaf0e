"""What `ps aux` takes in `tabane shell`, over three data centers of 600 processes each.

    make bench-shell

In turn, `RUNS` times each: the same `ps` over as many processes in a pid namespace of this machine
(plain), and in a new shell: first (as soon as a program there has begun), at once again, after a
pause (the view is too old, so that all nodes are asked before it begins), at once again. What a
shell costs in which nobody looks is measured too (start and end): what ps will read is read ahead.
Everything, nodes, server and tools, shares this machine's CPUs; in a real cluster the nodes have
their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from report import Report, percentile, summary
from tabane.clock import SYSTEM
from tabane.errors import TabaneError
from tabane.tools.cli.cluster import running_cluster
from tabane.tools.procfs.feed import FRESH_S

RUNS = int(os.environ.get("RUNS", "10"))
DATACENTERS = ["tokyo", "osaka", "ishikari"]
EACH = 600
TABANE = str(Path(sys.executable).with_name("tabane"))
STARTED = """
i=0; while [ $i -lt {} ]; do sleep 86400 >/dev/null 2>&1 & i=$((i+1)); done
echo started; read -r end
"""
MEASURE = f"""
import json, subprocess, sys, time
def measure():
    began = time.perf_counter()
    out = subprocess.run(["ps", "aux"], stdout=subprocess.PIPE, check=True).stdout
    return (time.perf_counter() - began) * 1000, out.count(b"\\n") - 1
found = [measure(), measure()]
time.sleep({FRESH_S} + 0.5)
print(json.dumps(found + [measure(), measure()]))
"""
"""Milliseconds and processes of four runs of ps."""
IN_SHELL = ("first", "second", "after a pause", "second after a pause")
START = "start and end"


def main() -> int:
    report = Report("shell", f"ps aux in tabane shell, 3 nodes x {EACH} processes (ms)")
    with tempfile.TemporaryDirectory(prefix="tabane-bench-") as scratch, ExitStack() as stack:
        root = Path(scratch)
        root.chmod(0o755)
        stack.enter_context(running_cluster(root, DATACENTERS, 1))
        for dc in DATACENTERS:
            node = json.loads((root / "nodes" / dc / f"{dc}-1" / "process.json").read_bytes())
            stack.enter_context(processes(enter(node["pid"]), EACH))
        plain = stack.enter_context(own_namespace())
        times, counts = measure_all(root, plain)
    for what, values in times.items():
        report.row(what=what, processes=counts.get(what, 0), **summary(values))
    base = percentile(times["plain"], 50)
    for what, bar in zip(IN_SHELL, (6, 2, 6, 2), strict=True):
        report.bar(f"{what} / plain", percentile(times[what], 50) / base, bar, unit="x")
    return report.finish()


def measure_all(root: Path, plain: Sequence[str]) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Milliseconds of each run, and of how many processes."""
    times: dict[str, list[float]] = {what: [] for what in ("plain", *IN_SHELL, START)}
    counts: dict[str, int] = {}
    program = [sys.executable, "-c", MEASURE]
    command = f"exec {sys.executable} - <<'END'\n{MEASURE}\nEND"
    shell = [TABANE, "--root", str(root), "shell", "-c"]
    for _ in range(RUNS):
        times[START].append(took_ms([*shell, "true"]))
        for ms, count in run([*plain, *program])[1:]:
            times["plain"].append(ms)
            counts["plain"] = count
        for what, (ms, count) in zip(IN_SHELL, run([*shell, command]), strict=True):
            times[what].append(ms)
            counts[what] = count
    return times, counts


def took_ms(argv: Sequence[str]) -> float:
    began = SYSTEM.now()
    subprocess.run(argv, check=True)
    return (SYSTEM.now() - began) * 1000


def run(argv: Sequence[str]) -> list[tuple[float, int]]:
    done = subprocess.run(argv, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise TabaneError(f"{argv[0]} ended with {done.returncode}")
    found: list[tuple[float, int]] = json.loads(done.stdout)
    return found


def enter(pid: int) -> list[str]:
    """Runs a command among a process's own."""
    return ["nsenter", "--target", str(pid), "--pid", "--mount", "--"]


@contextmanager
def processes(before: Sequence[str], count: int) -> Iterator[subprocess.Popen[str]]:
    """As many that do nothing; they end with their namespace."""
    pipe = subprocess.PIPE
    argv = [*before, "sh", "-c", STARTED.format(count)]
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout
        if process.stdout.readline() != "started\n":
            raise TabaneError(f"{before[0]} could not start {count} processes")
        yield process
        process.communicate("\n")


@contextmanager
def own_namespace() -> Iterator[list[str]]:
    """As many processes as all nodes have, by themselves; how to run something among them."""
    namespace = ["unshare", "--fork", "--pid", "--kill-child", "--mount-proc", "--"]
    with processes(namespace, EACH * len(DATACENTERS) + 60) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        yield enter(int(children.split()[0]))


if __name__ == "__main__":
    raise SystemExit(main())
