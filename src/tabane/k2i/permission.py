"""Who may do what to which process: decided on values, without looking at anything.

The rules are the kernel's own, for the user who asks: kill(2), setpriority(2),
sched_setaffinity(2), prlimit(2), capabilities(7). Root may do everything to everybody, and the
owner of an app what its processes' users may. Besides, as in no kernel, what a node cannot do
without is protected from a slip of the hand: only root touches it, and only with `force`.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from typing import NamedTuple

from tabane.errors import Denied, NotFound, Stale, UsageError
from tabane.k2i.orders import (
    MAX_KEY,
    MAX_TARGETS,
    RESOURCES,
    UNLIMITED,
    Action,
    Affinity,
    Confine,
    Gpid,
    InstanceAction,
    InstanceOrder,
    InstanceTarget,
    Limit,
    Limits,
    Nice,
    Order,
    Pause,
    Signal,
    wanted,
)
from tabane.model import NodeName, Resources
from tabane.security.identity import Principal
from tabane.units import shorten

KINDS = ("peer", "token", "member")
"""Of principals who said who they are."""
BEST_NICE, WORST_NICE = -20, 19
MAX_STEP = WORST_NICE - BEST_NICE
MAX_LIMIT = (1 << 63) - 1
FORCE_HINT = 'only with `--force` (in REST: "force": true)'
CONFINEMENTS = {"cpu": (0.01, 8192), "memory_bytes": (1 << 20, 1 << 60), "pids": (1, 1 << 22)}
"""The least and the most that an instance's cgroup can be given."""
Pair = tuple[int, int]
"""A soft and a hard limit."""


class Here(NamedTuple):
    """The node that obeys. `place` is empty outside of a cluster."""

    place: NodeName
    incarnation: str


class Seen(NamedTuple):
    """A process, as it was just now. Ids are real, effective, saved."""

    pid: int
    start_ticks: int
    name: str
    state: str
    ppid: int
    nice: int
    uids: tuple[int, int, int]
    gids: tuple[int, int, int]
    has_capabilities: bool = False
    owner: int = -1
    """uid of who deployed the app whose instance it belongs to; -1 outside of instances."""
    protected: str = ""
    """What it is, when the node cannot do without it: `a kernel thread`."""


def check_order(order: Order, who: Principal) -> None:
    """Whether it makes sense, whatever its targets are. Raises `UsageError`, `Denied`."""
    check_principal(who)
    check_key(order.key)
    if order.force and not who.is_root:
        raise Denied("force is for root")
    if not 0 < len(order.targets) <= MAX_TARGETS:
        raise UsageError(f"targets: {len(order.targets)} is not from 1 to {MAX_TARGETS}")
    check_action(order.action)


def check_principal(who: Principal) -> None:
    if who.kind not in KINDS:
        raise Denied("processes are controlled only over a unix socket, or with a cluster's token")


def check_key(key: str) -> None:
    if len(key) > MAX_KEY:
        raise UsageError(f"idempotency_key: it has more than {MAX_KEY} characters")


def check_action(action: Action) -> None:
    """Whether the kernel knows such a thing. Raises `UsageError`."""
    match action:
        case Signal(number) if number != 0 and number not in signal.valid_signals():
            raise UsageError(f"signal: there is no signal {number}")
        case Nice(value, relative=False) if not BEST_NICE <= value <= WORST_NICE:
            raise UsageError(f"nice: {value} is not from {BEST_NICE} to {WORST_NICE}")
        case Nice(value) if abs(value) > MAX_STEP:
            raise UsageError(f"nice: {value:+d} is more than there is room for ({MAX_STEP})")
        case Limits(limits) if not limits or not limits.keys() <= RESOURCES.keys():
            strange = min(limits.keys() - RESOURCES.keys(), default="")
            raise UsageError(f"limits: {shorten(strange)} is no resource ({', '.join(RESOURCES)})")
        case Limits(limits):
            for name, limit in limits.items():
                _check_limit(name, limit)


def _check_limit(name: str, limit: Limit) -> None:
    for value in (limit.soft, limit.hard):
        if value is not None and not UNLIMITED <= value <= MAX_LIMIT:
            raise UsageError(f"limits: {name}: {value} is not from {UNLIMITED} to {MAX_LIMIT}")


def check_instance_order(order: InstanceOrder, who: Principal) -> None:
    """As `check_order`."""
    check_principal(who)
    check_key(order.key)
    if isinstance(order.action, Confine):
        limits = wanted(order.action)
        if not limits:
            raise UsageError("limits: say at least one of cpu, memory_bytes and pids")
        for name, value in limits.items():
            low, high = CONFINEMENTS[name]
            if not low <= value <= high:
                raise UsageError(f"limits: {name}: {value} is not from {low} to {high}")


def check_instance(target: InstanceTarget, owner: int, who: Principal) -> None:
    """Raises `Denied`."""
    if not who.is_root and not (who.kind == "peer" and who.uid == owner >= 0):
        raise Denied(f"{target} is an instance of another user's app (uid {owner})")


def check_confinement(
    action: InstanceAction, declared: Resources, who: Principal
) -> dict[str, float]:
    """What the action will have changed. Only root gives an instance more than its app declares:
    else `Denied`."""
    if not isinstance(action, Confine):
        return {"paused": float(isinstance(action, Pause))}
    limits = wanted(action)
    for name, value in limits.items():
        most = getattr(declared, name)
        if value > most and not who.is_root:
            raise Denied(f"limits: {name}: the app declares {most}: only root may give {value}")
    return limits


def check_address(target: Gpid, here: Here) -> None:
    """Whether it is for this node, as it was started last. Raises `UsageError`, `NotFound`,
    `Stale`."""
    if not target.is_safe:
        raise UsageError(f"{target}: say also its node's incarnation and its start_ticks")
    if target.place != here.place:
        raise NotFound(f"{target} is not here: this is {here.place or 'outside of a cluster'}")
    if target.incarnation != here.incarnation:
        where = here.place or "this machine"
        raise Stale(f"{target} is gone: {where} was started anew since, and all its processes")


def check_identity(target: Gpid, seen: Seen) -> None:
    """Whether it is the very process that is meant, and lives. Raises `Stale`, `NotFound`."""
    if seen.start_ticks != target.start_ticks:
        raise Stale(f"{target} is gone: its pid was given to another process, {seen.name!r}")
    if seen.state in "ZX":
        who = f"{target} ({seen.name!r})"
        raise NotFound(f"{who} has ended, and only waits for its parent {seen.ppid} to notice")


def check_permission(order: Order, target: Gpid, seen: Seen, who: Principal) -> None:
    """Raises `Denied`."""
    asks_only = order.action == Signal(0)
    if seen.protected and not asks_only and not (order.force and who.is_root):
        hint = FORCE_HINT if who.is_root else "only root may touch it"
        raise Denied(f"{target} ({seen.name!r}) is {seen.protected}: {hint}")
    if not who.is_root and not _is_own(order.action, seen, who):
        whose = f"another user's process (uid {seen.uids[0]})"
        if who.uid in seen.uids:
            whose = "not only yours: it has capabilities, or other ids too"
        raise Denied(f"{target} ({seen.name!r}) is {whose}")


def _is_own(action: Action, seen: Seen, who: Principal) -> bool:
    real, effective, saved = seen.uids
    if who.uid < 0:
        return False
    if who.uid == seen.owner:
        return True
    if isinstance(action, Nice | Affinity):
        return who.uid in (real, effective) and not seen.has_capabilities
    if isinstance(action, Limits):
        return set(seen.uids) == {who.uid} and set(seen.gids) == {who.gid}
    return who.uid in (real, saved)


def new_nice(action: Nice, nice: int, who: Principal) -> int:
    """The nice value of a thread that has `nice` now. Raises `Denied`."""
    chosen = min(max(action.value + nice * action.relative, BEST_NICE), WORST_NICE)
    if chosen < nice and not who.is_root:
        raise Denied(f"only root may lower a nice value ({nice} to {chosen})")
    return chosen


def new_limit(name: str, limit: Limit, now: Pair, who: Principal) -> Pair:
    """The soft and hard limit of one that has `now`. Raises `UsageError`, `Denied`."""
    soft = now[0] if limit.soft is None else limit.soft
    hard = now[1] if limit.hard is None else limit.hard
    if is_above(soft, hard):
        raise UsageError(f"{name}: its soft limit {soft} would be above its hard limit {hard}")
    if is_above(hard, now[1]) and not who.is_root:
        raise Denied(f"{name}: only root may raise a hard limit ({now[1]} to {hard})")
    return soft, hard


def is_above(limit: int, other: int) -> bool:
    """Of resource limits, where `UNLIMITED` is more than any number."""
    return other != UNLIMITED and (limit == UNLIMITED or limit > other)


def check_cpus(action: Affinity, online: Iterable[int]) -> frozenset[int]:
    """Raises `UsageError` for none, and for one that the node has not."""
    there, chosen = frozenset(online), frozenset(action.cpus)
    if not chosen or not chosen <= there:
        strange = ", ".join(map(str, sorted(chosen - there))) or "none"
        known = ", ".join(map(str, sorted(there)))
        raise UsageError(f"CPUs: {strange} cannot be used here (there are {known})")
    return chosen
