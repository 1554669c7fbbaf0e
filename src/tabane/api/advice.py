"""What is allowed and yet hardly meant: said at a deploy, and by `show`. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from tabane.model import App
from tabane.scheduler.placement import NodeView, place


def advise(app: App, datacenters: Sequence[str]) -> list[str]:
    """A sentence for each thing in `app` that its author may want to know; `datacenters` are those
    of the cluster."""
    about_placement = _about_placement(app, datacenters)
    return [*about_placement, *_about_starting(app), *_about_security(app)]


def doubt(app: App, nodes: Sequence[NodeView]) -> list[str]:
    """A sentence for each kind of the app's callers for whom none of these nodes can run it now,
    with what is in the way on each. That it may run on none is `advise`'s to say."""
    if not any(app.placement.allows(node.name.partition("/")[0]) for node in nodes):
        return []
    said = []
    for cohort in app.cohorts():
        choice = place(cohort, nodes, {})
        if choice.node is None:
            whom = f" for {cohort.trust} callers" if cohort.trust else ""
            said.append(f"no node can run it now{whom} ({_grouped(choice.reasons)})")
    return said


def _grouped(reasons: Sequence[str]) -> str:
    """Nodes with the same reason together."""
    nodes: dict[str, list[str]] = {}
    for reason in reasons:
        node, _, why = reason.partition(": ")
        nodes.setdefault(why, []).append(node)
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in nodes.items())


def _about_placement(app: App, datacenters: Sequence[str]) -> list[str]:
    unknown = [dc for dc in app.placement.datacenters if dc != "*" and dc not in datacenters]
    if not unknown:
        return []
    there = f"there is no data center {', '.join(unknown)} (there are: {', '.join(datacenters)})"
    runs = any(map(app.placement.allows, datacenters))
    return [f"placement.datacenters: {there}" + ("" if runs else ", so it can run nowhere")]


def _about_starting(app: App) -> list[str]:
    if app.takes_sessions or app.reactive.min:
        return []
    return ["it has no port and its min is 0, so nothing ever starts it: set min"]


def _about_security(app: App) -> list[str]:
    if "CAP_SYS_ADMIN" not in app.security.capabilities:
        return []
    return ["security.capabilities: with CAP_SYS_ADMIN it can undo the masks over /proc and /sys"]
