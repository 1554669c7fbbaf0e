"""Which instances a word on the command line means."""

from __future__ import annotations

from typing import Any

from tabane.errors import NotFound, Unreachable, UsageError
from tabane.tools.cli.common import NAME, app_key
from tabane.tools.client import Cluster

SHORTEST_ID = 4
"""Of an instance's id, what may stand for it, if no other begins like that."""


def ids(instances: list[dict[str, Any]]) -> str:
    return ", ".join(instance["id"] for instance in instances)


def find_one(cluster: Cluster, command: str, what: str) -> dict[str, Any]:
    """Raises `UsageError` when there are several."""
    found = find(cluster, what)
    if len(found) > 1:
        raise UsageError(f"{command}: {what} has {len(found)} instances: {ids(found)}")
    return found[0]


def find(cluster: Cluster, what: str, *, ended: bool = False) -> list[dict[str, Any]]:
    """Instances by app, by id, or by an id's beginning; `ended`: also one of which only the log is
    left."""
    if not NAME.fullmatch(what):
        raise NotFound(f"{what!r} is neither an instance's id nor an app's name")
    answer = cluster.get("/api/v1/instances")
    found = _matching(answer["instances"], what)
    silent = answer["silent"]
    if not found and ended:
        found, silent = _find_ended(cluster, what)
    if not found and silent:
        raise Unreachable(f"{what} is not on the nodes that answered ({', '.join(silent)} did not)")
    if not found:
        raise NotFound(_explain_absence(cluster, what))
    return found


def _matching(instances: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """Raises `UsageError` when several ids begin like that."""
    whole = [i for i in instances if what == i["id"] or app_key(what) == i["app"]]
    begun = [i for i in instances if len(what) >= SHORTEST_ID and i["id"].startswith(what)]
    if not whole and len(begun) > 1:
        raise UsageError(f"{what} is the beginning of several: write more of {ids(begun)}")
    return whole or begun


def _explain_absence(cluster: Cluster, what: str) -> str:
    try:
        cluster.get(f"/api/v1/apps/{app_key(what)}")
    except NotFound:
        return f"no instance is called {what}, and there is no app of that name"
    return f"the app {what} is at rest: no instance of it runs now"


def _find_ended(cluster: Cluster, what: str) -> tuple[list[dict[str, Any]], list[str]]:
    """From the events, which outlive the instances; and who did not tell theirs."""
    answer = cluster.get("/api/v1/events?limit=2000")
    ended = {event["instance"]: event | {"id": event["instance"]} for event in answer["records"]}
    return _matching(list(ended.values()), what)[-1:], answer["silent"]
