"""The kinds of collectors there are: one table, name -> import string, loaded when first asked for.

Others come from installed packages, by the entry point group `tabane.collectors`: the entry point's
name is the kind, and what it names is called with a `Setting` and returns a `Collector`. Those run
in a process of their own (see `tabane.k2i.collectors.apart`), ours as tasks. A kind that cannot
work here stays listed with its reason.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from tabane.errors import NotFound
from tabane.k2i.collectors.api import Collector, Maker, Setting
from tabane.model import Value

GROUP = "tabane.collectors"
COLLECTORS = {
    "command": "tabane.k2i.collectors.command:make",
    "nginx": "tabane.k2i.collectors.nginx:make",
    "redis": "tabane.k2i.collectors.redis:make",
}


class Kind(Value, frozen=True):
    """A kind as it is listed. `source`: `tabane`, or the package it comes from. `reason` says what
    is wrong, or is empty."""

    kind: str
    source: str
    works: bool
    reason: str = ""


def make(setting: Setting) -> Collector:
    """The collector that a user asks for. Raises `NotFound` for a kind that is not there."""
    kind = setting.collect.kind
    if kind in COLLECTORS:
        return load(COLLECTORS[kind])(setting)
    if kind not in plugins():
        known = ", ".join([*COLLECTORS, *sorted(plugins())])
        raise NotFound(f"there is no collector of kind {kind!r} (known: {known})")
    from tabane.k2i.collectors.apart import Apart

    return Apart(setting.collect)


def load(path: str) -> Maker:
    """What an import string, `module:name`, names."""
    module, _, attribute = path.partition(":")
    return cast(Maker, getattr(import_module(module), attribute))


def plugins() -> dict[str, EntryPoint]:
    """What installed packages bring, by kind; nothing of them is loaded."""
    found = entry_points(group=GROUP)
    return {point.name: point for point in found if point.name not in COLLECTORS}


async def list_kinds() -> list[Kind]:
    """All kinds. A plugin is tried in a process of its own, for its import may do anything."""
    from tabane.k2i.collectors.apart import find_trouble

    kinds = [Kind(name, "tabane", True) for name in COLLECTORS]
    for point in entry_points(group=GROUP):
        source = point.dist.name if point.dist is not None else point.value
        taken = f"the kind {point.name} is Tabane's own: its package must choose another name"
        reason = taken if point.name in COLLECTORS else await find_trouble(point.name)
        kinds.append(Kind(point.name, source, not reason, reason))
    return kinds
