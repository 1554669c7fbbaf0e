"""`tabane stop`."""

from __future__ import annotations

from typing import Any

from tabane.errors import NotFound, TabaneError
from tabane.tools.cli.common import Parser, app_key, complain, print_json, say
from tabane.tools.cli.finding import Found, look_for
from tabane.tools.cli.places import placed
from tabane.tools.client import Cluster


def stop(argv: list[str]) -> int:
    parser = Parser("stop", "Drain an instance and stop it; of an app: all its instances.")
    parser.add_argument("what", help="an instance id, or an app's name")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    cluster = Cluster(args.root)
    found = _find(cluster, args.what)
    told = [instance for instance in found.instances if _tell_to_stop(cluster, instance)]
    if args.json:
        print_json({"instances": [*map(placed, told)], "silent": found.silent})
    else:
        for instance in told:
            say(f"{instance['id']} on {instance['node']} is told to stop")
    if found.silent:
        nodes = ", ".join(found.silent)
        complain(f"stop: no answer from {nodes}: what runs of {args.what} there goes on")
    return 0 if told == found.instances and not found.silent else 1


def _find(cluster: Cluster, what: str) -> Found:
    """None of an app that has none: it is as it shall be. Raises `NotFound` for no app at all."""
    try:
        return look_for(cluster, what)
    except NotFound:
        if not _is_app(cluster, what):
            raise
        complain(f"stop: no instance of {what} runs, so there is nothing to stop")
        return Found([], [])


def _is_app(cluster: Cluster, name: str) -> bool:
    try:
        cluster.get(f"/api/v1/apps/{app_key(name)}")
    except NotFound:
        return False
    return True


def _tell_to_stop(cluster: Cluster, instance: dict[str, Any]) -> bool:
    try:
        cluster.post(f"/api/v1/instances/{instance['id']}/stop", node=instance["node"])
    except TabaneError as error:
        complain(f"stop: {error.message}")
        return False
    return True
