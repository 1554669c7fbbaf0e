"""k2i's process table beside ps, psutil and Glances, on the same processes.

    make bench-k2i
    RUNS=11 SECONDS=20 SIZES=600,2000,20000 make bench-k2i

With 600 processes on the machine, in turn: a snapshot of the table, `ps` with eight columns,
psutil with the fields of that and with those of the snapshot that it has, and over HTTP `/v1/proc`
(all 84 fields) and Glances' process list. Then at each size a watcher looks at the table once a
second; what counts is the CPU time of its thread. A size that the machine does not allow is
measured with as many as it does, and the row says so.
The processes that fill the machine up sleep, in a pid namespace of their own.
"""

from __future__ import annotations

import http.client
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from peers.native import GCC, SOURCES
from peers.processes import free_port, wait_for_port
from report import Report, percentile, summary
from tabane.errors import TabaneError
from tabane.k2i import ProcessTable

RUNS = int(os.environ.get("RUNS", "41"))
SECONDS = int(os.environ.get("SECONDS", "30"))
SIZES = [int(size) for size in os.environ.get("SIZES", "600,2000,6000,20000").split(",")]
WARM_UP = 3
SETTLE_S = 6.0
"""After which a process counts as grown up: young ones are read more often."""
PS = ("ps", "-eo", "pid,ppid,user,stat,pcpu,rss,nlwp,args")
PSUTIL = (
    *("pid", "ppid", "username", "status", "cpu_percent", "memory_info", "num_threads"),
    "cmdline",
)
"""What that `ps` shows."""
PSUTIL_ALL = (
    *PSUTIL,
    *("name", "uids", "gids", "terminal", "nice", "cpu_num", "cpu_times", "memory_percent"),
    "create_time",
)
"""What a record of the table has, as far as psutil has it: its scheduling, groups, faults and
instance are missing."""
SCRIPTS = Path(sys.executable).parent


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    report = Report("k2i", "A node's processes: snapshots and REST (ms), and watching them")
    with TemporaryDirectory(prefix="tabane-bench-") as scratch:
        program = compile_sleepers(Path(scratch))
        with machine_with(program, 600):
            times = compare()
        for what, values in times.items():
            report.row(what=what, processes=600, **summary(values))
        watched = {size: watch(program, size, report) for size in SIZES}
    ours, ps, ps_util = (percentile(times[what], 50) for what in ("snapshot", "ps", "psutil"))
    report.bar("snapshot/ps", ours / ps, 0.25, unit="of ps")
    report.bar("snapshot/psutil", ours / ps_util, 0.05, unit="of psutil")
    report.bar("v1 600 ms", percentile(times["GET /v1/proc"], 50), 15, unit="ms")
    if 600 in watched:
        report.bar("watch cpu %", watched[600][1], 1, unit="% of a core")
    return report.finish(lambda axes: draw(axes, list(watched.values())))


def compile_sleepers(scratch: Path) -> Path:
    program = scratch / "sleepers"
    subprocess.run([*GCC, "-o", program, SOURCES / "sleepers.c"], check=True)
    return program


@contextmanager
def machine_with(program: Path, processes: int) -> Iterator[int]:
    """The machine has so many processes in all; how many it really has is given."""
    more = max(0, processes - count())
    argv = ["unshare", "--pid", "--fork", "--kill-child", str(program), str(more)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        try:
            child.stdout.readline()
            time.sleep(SETTLE_S)
            yield count()
        finally:
            child.kill()
            child.stdout.read()  # it ends with the last of them


def count() -> int:
    return sum(path.name.isdigit() for path in Path("/proc").iterdir())


def compare() -> dict[str, list[float]]:
    """Milliseconds of each, after the warm-up."""
    with ExitStack() as stack:
        table = ProcessTable()
        stack.callback(table.close)
        k2i = stack.enter_context(serving("k2i", "--port"))
        glances = stack.enter_context(
            serving("glances", "-w", "--disable-webui", "-B", "127.0.0.1", "-p")
        )
        contenders: dict[str, Callable[[], Any]] = {
            "snapshot": table.processes,
            "snapshot as JSON": table.render,
            "ps": run_ps,
            "psutil, the fields of ps": lambda: run_psutil(PSUTIL),
            "psutil": lambda: run_psutil(PSUTIL_ALL),
            "GET /v1/proc": lambda: get(k2i, "/v1/proc"),
            "GET Glances processlist": lambda: get(glances, "/api/4/processlist"),
        }
        times: dict[str, list[float]] = {what: [] for what in contenders}
        for number in range(WARM_UP + RUNS):
            for what, run in contenders.items():
                began = time.perf_counter()
                run()
                if number >= WARM_UP:
                    times[what].append((time.perf_counter() - began) * 1000)
        return times


def run_ps() -> None:
    subprocess.run(PS, stdout=subprocess.DEVNULL, check=True)


def run_psutil(fields: Sequence[str]) -> list[dict[str, Any]]:
    return [process.info for process in psutil.process_iter(fields)]


@contextmanager
def serving(program: str, *argv: str) -> Iterator[http.client.HTTPConnection]:
    """A server, given its port as the last argument."""
    port = free_port()
    command = [SCRIPTS / program, *argv, str(port)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet) as server:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            wait_for_port(port)
            yield connection
        finally:
            connection.close()
            server.terminate()


def get(connection: http.client.HTTPConnection, path: str) -> bytes:
    """On a connection that stays open, unless it was idle for too long while others had a turn."""
    connection.request("GET", path)
    try:
        answer = connection.getresponse()
    except http.client.RemoteDisconnected:
        connection.close()
        return get(connection, path)
    body = answer.read()
    if answer.status != 200 or not body.startswith(b"["):
        raise TabaneError(f"{path} answered {answer.status}: {body[:200]!r}")
    return body


def watch(program: Path, size: int, report: Report) -> tuple[int, float]:
    """How many processes there were, and percent of a core for looking once a second."""
    with machine_with(program, size) as there:
        table = ProcessTable()
        table.processes()
        time.sleep(SETTLE_S)
        table.processes()
        used_ms: list[float] = []
        began, cpu = time.perf_counter(), time.thread_time()
        for second in range(1, SECONDS + 1):
            time.sleep(max(0.0, began + second - time.perf_counter()))
            before = time.thread_time()
            found = len(table.processes())
            used_ms.append((time.thread_time() - before) * 1000)
        percent = 100 * (time.thread_time() - cpu) / (time.perf_counter() - began)
        table.close()
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    report.row(
        what="a look each second, CPU ms",
        processes=found,
        **summary(used_ms),
        percent=percent,
        us_each=percent * 10_000 / there,
        asked_for=size,
        open_files=limit,
    )
    return there, percent


def draw(axes: Any, watched: list[tuple[int, float]]) -> None:
    axes.plot(*zip(*watched, strict=True), marker="o")
    axes.set_xlabel("processes")
    axes.set_ylabel("% of a core for one look a second")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)


if __name__ == "__main__":
    raise SystemExit(main())
