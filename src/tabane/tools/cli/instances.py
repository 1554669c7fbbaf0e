"""`tabane stop`, `logs`, `exec`."""

from __future__ import annotations

import base64
import sys
from typing import Any

from tabane.errors import NotFound, UsageError
from tabane.node.logfile import parse_line
from tabane.tools.cli.common import Parser, app_key
from tabane.tools.client import Cluster


def stop(argv: list[str]) -> int:
    parser = Parser("stop", "Drain an instance and stop it; of an app: all its instances.")
    parser.add_argument("what", help="an instance id, or an app's name")
    args = parser.parse_args(argv)
    cluster = Cluster(args.root)
    for instance in _find(cluster, args.what):
        cluster.post(f"/api/v1/instances/{instance['id']}/stop", node=instance["node"])
        print(f"{instance['id']} on {instance['node']} is told to stop")
    return 0


def logs(argv: list[str]) -> int:
    parser = Parser("logs", "What an instance wrote; also after its end, by its id.")
    parser.add_argument("what", help="an instance id, or an app's name")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until it ends")
    parser.add_argument("-n", "--tail", type=int, default=0, metavar="N", help="the last N lines")
    parser.add_argument("-t", "--timestamps", action="store_true")
    args = parser.parse_args(argv)
    if args.tail < 0:
        raise UsageError("logs: --tail counts lines from the end: give 1 or more")
    cluster = Cluster(args.root)
    found = _find(cluster, args.what, ended=True)
    if args.follow and len(found) > 1:
        names = ", ".join(instance["id"] for instance in found)
        raise UsageError(f"logs: -f follows one instance: choose one of {names}")
    for instance in found:
        follow = str(args.follow).lower()
        path = f"/api/v1/instances/{instance['id']}/log?tail={args.tail}&follow={follow}"
        for line in cluster.stream(path, node=instance["node"]):
            _print_line(line, args.timestamps)
    return 0


def _print_line(line: bytes, timestamps: bool) -> None:
    parsed = parse_line(line)
    if parsed is None:
        return
    stamp, stream, whole, text = parsed
    out = sys.stderr if stream == "stderr" else sys.stdout
    head = f"{stamp} ".encode() if timestamps else b""
    out.buffer.write(head + text + (b"\n" if whole else b""))
    out.flush()


def execute(argv: list[str]) -> int:
    parser = Parser("exec", "Run a command inside an instance.")
    parser.add_argument("instance", help="an instance id, or the name of an app with one instance")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("command", nargs="+", help="after --")
    args = parser.parse_args(argv)
    cluster = Cluster(args.root)
    found = _find(cluster, args.instance)
    if len(found) > 1:
        names = ", ".join(instance["id"] for instance in found)
        raise UsageError(f"exec: {args.instance} has {len(found)} instances: choose one of {names}")
    body = {"argv": args.command, "timeout_s": args.timeout}
    path = f"/api/v1/instances/{found[0]['id']}/exec"
    answer = cluster.post(path, body, node=found[0]["node"])
    sys.stdout.buffer.write(base64.b64decode(answer["stdout"]))
    sys.stderr.buffer.write(base64.b64decode(answer["stderr"]))
    code: int = answer["code"]
    return code


globals()["exec"] = execute


def _find(cluster: Cluster, what: str, *, ended: bool = False) -> list[dict[str, Any]]:
    """Instances by id or by app; `ended`: also those of which only the log is left."""
    running = cluster.get("/api/v1/instances")["instances"]
    found = [i for i in running if what == i["id"] or app_key(what) == i["app"]]
    if not found and ended:
        found = _find_ended(cluster, what)
    if not found:
        raise NotFound(f"no instance is called {what}, and no app of that name has one now")
    return found


def _find_ended(cluster: Cluster, what: str) -> list[dict[str, Any]]:
    """From the events, which outlive the instances."""
    events = cluster.get("/api/v1/events?limit=2000")["records"]
    nodes = {
        event["instance"]: event["node"]
        for event in events
        if what == event["instance"] or app_key(what) == event["app"]
    }
    return [{"id": instance, "node": node} for instance, node in list(nodes.items())[-1:]]
