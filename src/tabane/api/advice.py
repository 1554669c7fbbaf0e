"""What is allowed and yet hardly meant: said at a deploy, and by `show`. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from tabane.model import App


def advise(app: App, datacenters: Sequence[str]) -> list[str]:
    """A sentence for each thing in `app` that its author may want to know; `datacenters` are those
    of the cluster."""
    about_placement = _about_placement(app, datacenters)
    return [*about_placement, *_about_starting(app), *_about_security(app)]


def _about_placement(app: App, datacenters: Sequence[str]) -> list[str]:
    unknown = [dc for dc in app.placement.datacenters if dc != "*" and dc not in datacenters]
    if not unknown:
        return []
    there = f"there is no data center {', '.join(unknown)} (there are: {', '.join(datacenters)})"
    runs = any(map(app.placement.allows, datacenters))
    return [f"placement.datacenters: {there}" + ("" if runs else ", so it can run nowhere")]


def _about_starting(app: App) -> list[str]:
    if app.port is not None or app.reactive.min:
        return []
    return ["it has no port and its min is 0, so nothing ever starts it: set min"]


def _about_security(app: App) -> list[str]:
    if "CAP_SYS_ADMIN" not in app.security.capabilities:
        return []
    return ["security.capabilities: with CAP_SYS_ADMIN it can undo the masks over /proc and /sys"]
