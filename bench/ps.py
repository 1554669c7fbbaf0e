"""What `tabane ps` takes, from exec to exit, for a cluster of three data centers.

    make bench-ps

In turn, 50 times each: `tabane ps`, `python -c pass` of the same interpreter, and this machine's
own `ps aux`. The difference of the medians of the first two is what Tabane adds. Modules come from
bytecode, as in an installation that was used before: it is kept in a scratch directory and written
in the rounds of the warm-up.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import Report, percentile, summary
from tabane.errors import TabaneError
from tabane.tools.cli.cluster import running_cluster

RUNS = int(os.environ.get("RUNS", "50"))
WARM_UP = 5
DATACENTERS = ["tokyo", "osaka", "ishikari"]
TABANE = str(Path(sys.executable).with_name("tabane"))
COMMANDS = {
    "tabane ps": (TABANE, "ps"),
    "python -c pass": (sys.executable, "-c", "pass"),
    "ps aux": ("ps", "aux"),
}
PYTHON_SETTINGS = ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED", "PYTHONPATH")


def main() -> int:
    report = Report("ps", "tabane ps of three data centers, exec to exit (ms)")
    with tempfile.TemporaryDirectory(prefix="tabane-bench-") as scratch:
        root = Path(scratch)
        root.chmod(0o755)
        with running_cluster(root, DATACENTERS, 1):
            times = measure_all(environment_of(root))
    for what, values in times.items():
        report.row(what=what, **summary(values))
    tabane, python = (percentile(times[what], 50) for what in ("tabane ps", "python -c pass"))
    report.bar("ps added ms", tabane - python, 100, unit="ms")
    return report.finish()


def environment_of(root: Path) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if name not in PYTHON_SETTINGS}
    return kept | {"TABANE_ROOT": str(root), "PYTHONPYCACHEPREFIX": str(root / "bytecode")}


def measure_all(environment: dict[str, str]) -> dict[str, list[float]]:
    """Milliseconds of each run, after the warm-up."""
    times: dict[str, list[float]] = {what: [] for what in COMMANDS}
    for number in range(WARM_UP + RUNS):
        for what, argv in COMMANDS.items():
            took_ms = measure(argv, environment)
            if number >= WARM_UP:
                times[what].append(took_ms)
    return times


def measure(argv: tuple[str, ...], environment: dict[str, str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(argv, env=environment, stdout=subprocess.DEVNULL, check=False)
    took_ms = (time.perf_counter() - began) * 1000
    if done.returncode:
        raise TabaneError(f"{' '.join(argv)} ended with {done.returncode}")
    return took_ms


if __name__ == "__main__":
    raise SystemExit(main())
