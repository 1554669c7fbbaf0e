"""Where things are, in the same words in all commands.

A row of k2i's has `dc`, `node`, `app`, `class` and `instance`. The control API writes `node` as
`DC/NODE`, and tells of an app and of an instance in words of their own: here they are made alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]


def placed(row: Mapping[str, Any]) -> Row:
    """What the control API tells of an instance, an event, a wake or a node, as k2i would."""
    found: Row = dict(zip(("dc", "node"), place_of(row), strict=True))
    found |= {name: value for name, value in row.items() if name != "node"}
    if "id" in found:
        found |= {"instance": found.pop("id"), "class": found.pop("isolation", "container")}
    return found


def placed_app(app: Mapping[str, Any]) -> Row:
    """Likewise of an app: `app` is its namespace and name."""
    return {"app": f"{app['namespace']}/{app['name']}", **app}


def place_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """Data center and node; both are empty where there is none."""
    dc, _, node = row["node"].partition("/")
    return dc, node


def short(app: str) -> str:
    """An app in a column; those of the namespace `default` by their names alone."""
    return app.removeprefix("default/") or "-"
