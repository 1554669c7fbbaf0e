"""Where things run: pure functions from a snapshot to a choice, with the reason.

`home_of` is rendezvous (highest random weight) hashing: every node computes the same home without
asking, and when a node goes only its own apps move. Thaler and Ravishankar, "Using name-based
mappings to increase hit rates", 1998.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Container, Iterable, Mapping

from tabane.model import App, AppName, NodeName, Value
from tabane.scheduler.engines import EngineView, explain_none, passed_over, pick_engine
from tabane.scheduler.quotas import Account, exceeded


class NodeView(Value, frozen=True):
    """What a node tells about itself for placement."""

    name: NodeName
    engines: tuple[EngineView, ...] = ()
    """Those that there are, the preferred first."""
    instances: int = 0
    memory_available_bytes: int | None = None
    """For more instances; None: not known."""
    kernel: str = ""
    """Id of the kernel that its instances share; nodes of one machine have the same."""
    accounts: Mapping[int, Account] = {}
    """Of users who may not have what they like there, by uid."""
    memory_idle_bytes: int = 0
    """What comes free for a start when idle instances leave."""


class Choice(Value, frozen=True):
    """The node picked, or None, and why: one sentence for each node that was looked at."""

    node: NodeName | None
    reasons: tuple[str, ...]
    crowded: bool = False
    """Nothing but memory is missing on one of them, which comes free when sessions end."""


def home_of(app: AppName, nodes: Iterable[NodeName]) -> NodeName | None:
    """The home of an app among the live nodes of a data center; None when there are none."""
    return max(nodes, key=lambda node: _weight(app, node), default=None)


def _weight(app: AppName, node: NodeName) -> bytes:
    return hashlib.blake2b(f"{app}\0{node}".encode(), digest_size=8).digest()


NONE: Mapping[NodeName, str] = {}


def place(
    app: App,
    nodes: Iterable[NodeView],
    here: Mapping[NodeName, int],
    declined: Mapping[NodeName, str] = NONE,
    saved: Container[NodeName] = (),
) -> Choice:
    """Pick a node for one more instance; `here` counts this app's instances by node, `declined`
    says why nodes that were asked lately did not take one on; `saved` are those that have a
    checkpoint which it can begin from.

    Feasible (data center, class, driver, owner's limits, memory), then where no idle instance has
    to leave for it, then the fewest instances of this app on its kernel, whose end would take them
    along, then on the node, then where it begins soonest, then the fewest in all.
    """
    nodes = tuple(nodes)
    beside = Counter[str]()
    for node in nodes:
        beside[node.kernel or node.name] += here.get(node.name, 0)
    feasible: list[NodeView] = []
    reasons, crowded = [], False
    for node in nodes:
        problem = declined.get(node.name) or _problem(app, node)
        full = "" if problem else _memory_problem(app, node)
        if problem or full:
            crowded = crowded or bool(full)
            reasons.append(f"{node.name}: {problem or full}")
        else:
            feasible.append(node)
            count = here.get(node.name, 0)
            engine = pick_engine(app, node.engines)
            why = f" ({passed})" if (passed := passed_over(app, node.engines)) else ""
            there = f"has {count} of this app, {node.instances} in all"
            there += ", and a checkpoint of it" if node.name in saved else ""
            there += ", idle ones leave for it" if _missing_bytes(app, node) else ""
            reasons.append(f"{node.name}: can run it with {engine}{why}, {there}")

    def crowd(node: NodeView) -> tuple[bool, int, int, bool, int, str]:
        return (
            _missing_bytes(app, node) > 0,
            beside[node.kernel or node.name],
            here.get(node.name, 0),
            node.name not in saved,
            node.instances,
            node.name,
        )

    best = min(feasible, key=crowd, default=None)
    return Choice(best.name if best is not None else None, tuple(reasons), crowded)


def _problem(app: App, node: NodeView) -> str:
    datacenter = node.name.partition("/")[0]
    if not app.placement.allows(datacenter):
        return f"may not run in {datacenter}"
    if app.pinned_to not in ("", node.name):
        return f"does not have the app's volumes, which are on {app.pinned_to}"
    engine = pick_engine(app, node.engines)
    if not engine:
        return explain_none(app, node.engines)
    if (account := node.accounts.get(app.owner)) and (reason := exceeded(app, account)):
        return reason
    return ""


def _memory_problem(app: App, node: NodeView) -> str:
    if _missing_bytes(app, node) <= node.memory_idle_bytes:
        return ""
    what = " for memory and disk" if _layer_in_memory(app, node) else ""
    available, idle = (node.memory_available_bytes or 0) >> 20, node.memory_idle_bytes >> 20
    beside = f", and {idle} that idle instances would free" if idle else ""
    wanted = _wanted_bytes(app, node) >> 20
    return f"has {available} MiB of memory available{beside}, {wanted} are needed{what}"


def _missing_bytes(app: App, node: NodeView) -> int:
    """Of the memory that one instance may take there; 0 when nothing is, or that is not known."""
    if node.memory_available_bytes is None:
        return 0
    return max(0, _wanted_bytes(app, node) - node.memory_available_bytes)


def _wanted_bytes(app: App, node: NodeView) -> int:
    limits = app.resources.with_layer() if _layer_in_memory(app, node) else app.resources
    return limits.memory_bytes


def _layer_in_memory(app: App, node: NodeView) -> bool:
    engine = pick_engine(app, node.engines)
    return any(each.layer_in_memory for each in node.engines if each.name == engine)


def floors(app: App, datacenters: Iterable[str], ready: Mapping[str, int]) -> dict[str, int]:
    """How the app's `min` is spread over the live data centers it may run in: first over those
    where instances are `ready`, as many as there are, so that none is started in place of another;
    the rest where the fewest are."""
    shares = {dc: 0 for dc in sorted(datacenters) if app.allows(dc)}
    for _ in range(app.reactive.min if shares else 0):
        kept = [dc for dc in shares if shares[dc] < ready.get(dc, 0)]
        shares[min(kept or shares, key=lambda dc: shares[dc])] += 1
    return shares
