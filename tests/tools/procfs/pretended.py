"""A cluster's shell over a pretended cluster, as a program of its own: it forks, and must be alone.

    python pretended.py NODES PROCESSES [--silent NODE] [--orders FILE] -- ARGV...

Orders are written to FILE, one line of JSON each, and done to the pretended processes.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from tabane.errors import Denied
from tabane.tools.procfs.calls import Order
from tabane.tools.procfs.numbers import Key
from tabane.tools.procfs.pretend import Pretend, Proc
from tabane.tools.procfs.serving import ClusterShell
from tabane.tools.procfs.session import Plan, run
from tabane.tools.procfs.supervisor import Caller

WORDS = b"strange (name) \x1b[31m\xff\n) S 1"
DCS = ("tokyo", "osaka", "ishikari")


class Obeying:
    """Does what it is told, as root; other users are refused."""

    def __init__(self, source: Pretend, file: str) -> None:
        self._source = source
        self._file = file

    def carry(self, key: Key, order: Order, caller: Caller) -> dict[str, Any]:
        line = {"node": key.node, "pid": key.pid, "start": key.start, "verb": order.verb}
        with Path(self._file).open("a") as file:
            file.write(json.dumps(line | order.body | {"uid": caller.uid}) + "\n")
        if caller.uid:
            raise Denied("only root may do that")
        machine = self._source[key.node]
        if order.verb == "signal" and order.body["signal"] in (9, 15):
            del machine.processes[key.pid]
        elif order.verb == "nice":
            machine.processes[key.pid].nice = order.body["nice"]
        return {"before": {"nofile": {"soft": 1024, "hard": -1}}, "after": None}


def make_source(nodes: int, processes: int) -> Pretend:
    source = Pretend({f"{DCS[n]}/{DCS[n]}-1": processes for n in range(nodes)})
    for machine in source.machines.values():
        machine.users |= {12345: "remoteuser"}
        machine.add(Proc(9001, name=b"worker", cmdline=b"worker\0--big\0", uid=12345, utime=50_000))
        machine.add(Proc(9002, ppid=9001, name=WORDS[:15], cmdline=WORDS + b"\0", pgrp=9001))
        machine.uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return source


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("nodes", type=int)
    parser.add_argument("processes", type=int)
    parser.add_argument("--orders", default=os.devnull)
    parser.add_argument("argv", nargs="+")
    args = parser.parse_args()
    source = make_source(args.nodes, args.processes)
    shell = ClusterShell(source, Obeying(source, args.orders), secret=True)
    shell.feed.fetch()
    return run(Plan(args.argv, dict(os.environ), shell.overlays), shell.serve).code


if __name__ == "__main__":
    raise SystemExit(main())
