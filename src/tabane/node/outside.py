"""What runs for a local cluster outside of its nodes' namespaces: the collector of process events,
which the kernel tells only there. Its name is in `ROOT/collector.json`.

All functions block, for some milliseconds. Nothing here stops a cluster from running: without a
collector its nodes find births and deaths by looking, and say so.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import msgspec

from tabane.model import Value
from tabane.network.processes import end_process
from tabane.node import config as places
from tabane.runtimes.process import is_same

log = logging.getLogger(__name__)

END_S = 5.0


class Outsider(Value, frozen=True):
    """A process, as the machine sees it."""

    pid: int
    start_ticks: int


def start_collector(root: Path) -> None:
    """Start the cluster's collector unless it runs. Where it cannot, its log says why."""
    known = _load(root)
    if known is not None and is_same(known.pid, known.start_ticks):
        return
    argv = (sys.executable, "-m", "tabane.k2i.event_collector", str(places.event_socket(root)))
    with (root / "collector.log").open("ab") as output:
        entry = subprocess.Popen(
            ("setsid", "--fork", *argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            cwd="/",
        )
    assert entry.stdout is not None
    with entry.stdout as said:
        line = said.readline().decode(errors="replace").strip()
    entry.wait()
    word, _, numbers = line.partition(" ")
    if word != "ready":
        log.warning("process events are not collected: %s", line or "the collector ended")
        return
    pid, ticks = map(int, numbers.split())
    places.save(root / "collector.json", Outsider(pid, ticks))


def stop_collector(root: Path) -> None:
    """End it. Idempotent."""
    known = _load(root)
    if known is not None:
        end_process(known.pid, known.start_ticks, term_timeout_s=END_S)
    for path in (root / "collector.json", places.event_socket(root)):
        path.unlink(missing_ok=True)


def _load(root: Path) -> Outsider | None:
    path = root / "collector.json"
    return msgspec.json.decode(path.read_bytes(), type=Outsider) if path.exists() else None
