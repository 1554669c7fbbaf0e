"""Which instances a word on the command line means."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from tabane.errors import NotFound, Unreachable, UsageError
from tabane.tools.cli.asking import Filters, check_place, filters_of, is_in
from tabane.tools.cli.common import NAME, app_key
from tabane.tools.client import Cluster

SHORTEST_ID = 4
"""Of an instance's id, what may stand for it, if no other begins like that."""


def ids(instances: Sequence[dict[str, Any]]) -> str:
    return ", ".join(instance["id"] for instance in instances)


def find_only(cluster: Cluster, what: str, place: Filters) -> dict[str, Any]:
    """The instance in that place, where none may be chosen. Raises `UsageError` when there are
    several, `NotFound` when there is none."""
    candidates = find_in(cluster, what, place)
    if len(candidates) > 1:
        named = ", ".join(f"{one['id']} ({one['node']})" for one in candidates)
        raise UsageError(f"{what} has {len(candidates)} instances, so name one of {named}")
    return candidates[0]


def find_in(cluster: Cluster, what: str, place: Filters) -> list[dict[str, Any]]:
    """Those in a data center or node; all, if neither is named. Raises `NotFound` when there is
    none."""
    check_place(cluster.nodes, place)
    found = find(cluster, what)
    there = [one for one in found if is_in(one["node"], place)]
    if not there:
        nodes = ", ".join(dict.fromkeys(one["node"] for one in found))
        raise NotFound(f"{what} has no instance on {place.node or place.dc}, only on {nodes}")
    return there


def place_of(args: argparse.Namespace) -> Filters:
    """Which data center or node is meant by `--dc` and `--node`. Raises `UsageError`."""
    return filters_of(argparse.Namespace(dc=args.dc, node=args.node))


def nearness(instance: dict[str, Any], here: str) -> tuple[object, ...]:
    """The least is chosen by who asks the node `here`, always the same of the same: one that is
    ready, on this node, in its data center, the node's oldest."""
    node, dc = instance["node"], here.partition("/")[0]
    return (
        instance["state"] != "ready",
        node != here,
        node.partition("/")[0] != dc,
        node,
        instance["created_at"],
        instance["id"],
    )


class Found(NamedTuple):
    """`silent`: nodes that did not answer, and may have more of an app's instances."""

    instances: list[dict[str, Any]]
    silent: list[str]


def find(cluster: Cluster, what: str, *, ended: bool = False) -> list[dict[str, Any]]:
    """The instances of `look_for`."""
    return look_for(cluster, what, ended=ended).instances


def look_for(cluster: Cluster, what: str, *, ended: bool = False) -> Found:
    """Instances by app, by id, or by an id's beginning; `ended`: also one of which only the log is
    left. Raises `NotFound` when there is none, or `Unreachable` when that cannot be told."""
    if not NAME.fullmatch(what):
        raise UsageError(f"{what!r} is neither an instance's id nor an app's name")
    answer = cluster.get("/api/v1/instances")
    found = _matching(answer["instances"], what)
    silent = answer["silent"]
    if not found and ended:
        found, silent = _find_ended(cluster, what)
    if not found and silent:
        raise Unreachable(f"{what} is not on the nodes that answered ({', '.join(silent)} did not)")
    if not found:
        raise NotFound(_explain_absence(cluster, what))
    return Found(found, silent if found[0]["app"] == app_key(what) else [])


def _matching(instances: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """Raises `UsageError` when several ids begin like that."""
    whole = [i for i in instances if what == i["id"] or app_key(what) == i["app"]]
    begun = [i for i in instances if len(what) >= SHORTEST_ID and i["id"].startswith(what)]
    if not whole and len(begun) > 1:
        raise UsageError(f"{what} is the beginning of several: write more of {ids(begun)}")
    return whole or begun


def _explain_absence(cluster: Cluster, what: str) -> str:
    try:
        answer = cluster.get(f"/api/v1/apps/{app_key(what)}")
    except NotFound:
        return f"no instance is called {what}, and there is no app of that name"
    problems = [home["reason"] for home in answer.get("homes", ()) if home.get("reason")]
    if problems:
        return f"the app {what} has no instance: {problems[0]} (`tabane show {what}` says more)"
    hint = f"send it a request, or keep one running: `tabane scale {what} --min 1`"
    return f"the app {what} is at rest, no instance of it runs: {hint}"


def _find_ended(cluster: Cluster, what: str) -> tuple[list[dict[str, Any]], list[str]]:
    """From the events, which outlive the instances; and who did not tell theirs."""
    answer = cluster.get("/api/v1/events?limit=2000")
    told = (event for event in answer["records"] if not event.get("part"))
    ended = {event["instance"]: event | {"id": event["instance"]} for event in told}
    return _matching(list(ended.values()), what)[-1:], answer["silent"]
