"""What may be asked of processes: values only, for those who send orders and those who obey them.

A process is named by its `Gpid`. The kernel gives a pid away again once its process is gone, so the
pid alone names nobody: the incarnation of its node and its start time belong to it, and whoever
obeys an order checks all three.
"""

from __future__ import annotations

import re
import resource
import signal
from collections.abc import Iterable

from tabane.errors import UsageError
from tabane.model import Generation, NodeName, Value
from tabane.units import shorten

MAX_PID = 1 << 22
"""The largest a 64-bit kernel gives (PID_MAX_LIMIT)."""
MAX_TARGETS = 1024
"""Of one order, so that it and its answer fit into a message each. Who has more sends several."""
UNLIMITED = -1
RESOURCES = {
    name.removeprefix("RLIMIT_").lower(): number
    for name, number in vars(resource).items()
    if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE"
}
"""What can be limited, and the kernel's number of it."""
MAX_KEY = 128
"""Characters of an idempotency key."""
MOST_TEXT = 1000
"""Characters of what `describe` says."""

_REAL_TIME = re.compile(r"(RTMIN(?=\+)|RTMAX(?=-))([+-][0-9]{1,2})")
_NAME = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"
_GPID = re.compile(rf"(?:({_NAME})/({_NAME}):)?([0-9]{{1,10}})")


class Gpid(Value, frozen=True):
    """One process of the cluster, for ever. Outside of a cluster `dc` and `node` are empty."""

    dc: str
    node: str
    incarnation: str
    """Of its node: which start of the host OS. Empty when it is yet to be looked up."""
    pid: int
    start_ticks: int
    """When it was started, in clock ticks since its machine was; 0 when it is yet to be looked
    up."""

    @property
    def place(self) -> NodeName:
        """`dc/node`, or empty outside of a cluster."""
        return NodeName(f"{self.dc}/{self.node}" if self.node else "")

    @property
    def is_safe(self) -> bool:
        """Whether it says which process, not only which number."""
        return bool(self.incarnation and self.start_ticks)

    def __str__(self) -> str:
        """`tokyo/tokyo-1:4242`, which `parse_gpid` reads; outside of a cluster `4242`."""
        return f"{self.place}:{self.pid}" if self.node else str(self.pid)


def parse_gpid(text: str) -> Gpid:
    """The process that people write as `dc/node:pid` or `pid`: where to look, not `is_safe` yet.
    Raises `UsageError`."""
    found = _GPID.fullmatch(text)
    if not found or not 0 < int(found[3]) <= MAX_PID:
        problem = f"{shorten(text)} is no process: write DATACENTER/NODE:PID, or PID"
        raise UsageError(f"{problem} (1 to {MAX_PID})")
    return Gpid(found[1] or "", found[2] or "", "", int(found[3]), 0)


def parse_signal(text: str) -> int:
    """The number of a signal: `TERM`, `SIGTERM`, `15`, `RTMIN+3`, `0`. Raises `UsageError`."""
    name = text.upper().removeprefix("SIG")
    number = int(name) if re.fullmatch("[0-9]{1,3}", name) else _signal_named(name)
    if number != 0 and number not in signal.valid_signals():
        raise UsageError(f"{shorten(text)} is no signal: write its name or number, as TERM or 15")
    return number


def _signal_named(name: str) -> int:
    """-1 when there is none."""
    found = _REAL_TIME.fullmatch(name)
    base = signal.Signals.__members__.get(f"SIG{found[1] if found else name}", -1)
    number = int(base) + int(found[2] if found else 0)
    return number if number > 0 else -1


class Signal(Value, frozen=True, tag="signal"):
    """Send a signal. 0 sends none: it only asks whether one could be sent."""

    number: int


class Nice(Value, frozen=True, tag="nice"):
    """Set the nice value of all threads, -20 to 19. `relative`: to so much more than the first
    thread has."""

    value: int
    relative: bool = False


class Affinity(Value, frozen=True, tag="affinity"):
    """Let all threads run on these CPUs only."""

    cpus: tuple[int, ...]


class Limit(Value, frozen=True):
    """Of one resource; `UNLIMITED` is -1. None leaves that limit as it is."""

    soft: int | None = None
    hard: int | None = None


class Limits(Value, frozen=True, tag="limits"):
    """Set resource limits, by name as in `prlimit`: `nofile`, `core`, `as`, ..."""

    limits: dict[str, Limit]


class Pause(Value, frozen=True, tag="pause"):
    """Stop it (SIGSTOP) until `Resume`."""


class Resume(Value, frozen=True, tag="resume"):
    """Let it go on (SIGCONT)."""


class Confine(Value, frozen=True, tag="confine"):
    """Set limits of its cgroup. `cpu` counts whole CPUs; None leaves that limit as it is."""

    cpu: float | None = None
    memory_bytes: int | None = None
    pids: int | None = None


def wanted(action: Confine) -> dict[str, float]:
    """The limits that are to be set, by name."""
    every = {"cpu": action.cpu, "memory_bytes": action.memory_bytes, "pids": action.pids}
    return {name: value for name, value in every.items() if value is not None}


InstanceAction = Pause | Resume | Confine
"""Here `Pause` and `Resume` mean the freezer."""
Action = Signal | Nice | Affinity | Limits | Pause | Resume


def name_of(action: Action | InstanceAction) -> str:
    """`signal`, `nice`, `affinity`, `limits`, `pause`, `resume` or `confine`."""
    return str(action.__struct_config__.tag)


def describe(action: Action | InstanceAction) -> str:
    """As people read it in the audit log: `signal 15`, `nice +5`, `limits nofile=10:20`. What would
    be very long makes no sense, and is cut."""
    text = _describe(action)
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}..."


def _describe(action: Action | InstanceAction) -> str:
    name = name_of(action)
    match action:
        case Signal(number):
            return f"{name} {number}"
        case Nice(value, relative):
            return f"{name} {value:+d}" if relative else f"{name} {value}"
        case Affinity(cpus):
            return f"{name} {_ranges(cpus)}"
        case Limits(limits):
            pairs = (f"{key}={_word(it.soft)}:{_word(it.hard)}" for key, it in limits.items())
            return f"{name} {' '.join(pairs)}"
        case Confine():
            return f"{name} {' '.join(f'{key}={value}' for key, value in wanted(action).items())}"
    return name


def _ranges(cpus: Iterable[int]) -> str:
    """`0-3,8`, as the kernel writes it."""
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1][1:] = [cpu]
        else:
            runs.append([cpu])
    return ",".join("-".join(map(str, run)) for run in runs)


def _word(limit: int | None) -> str:
    return "" if limit is None else "unlimited" if limit == UNLIMITED else str(limit)


class Order(Value, frozen=True):
    """One action on some processes, on whichever nodes they are.

    `dry_run`: check all, do nothing. `force`: also what is protected, for root. With a `key`, the
    same order again has the first one's answer instead of a second effect.
    """

    targets: tuple[Gpid, ...]
    action: Action
    dry_run: bool = False
    force: bool = False
    key: str = ""


Found = int | list[int] | dict[str, Limit] | None
"""A nice value, CPUs, limits; None where there is nothing to tell."""


class Outcome(Value, frozen=True):
    """What became of one target. `error` is the code of an error in `tabane.errors`, empty when it
    was done (or, in a dry run, would be); `message` its sentence. `before` and `after`: what the
    action changed, of the process's first thread."""

    target: Gpid
    error: str = ""
    message: str = ""
    before: Found = None
    after: Found = None

    @property
    def ok(self) -> bool:
        return not self.error


class InstanceTarget(Value, frozen=True):
    """One life of one instance. `node` is `dc/node`."""

    node: NodeName
    generation: Generation

    def __str__(self) -> str:
        return f"{self.node}:{self.generation.instance}"


class InstanceOrder(Value, frozen=True):
    """One action on an instance as a whole. See `Order`."""

    target: InstanceTarget
    action: InstanceAction
    dry_run: bool = False
    key: str = ""


class InstanceOutcome(Value, frozen=True):
    """`before` and `after` by name: `cpu`, `memory_bytes`, `pids`, or `paused` as 0 or 1."""

    target: InstanceTarget
    before: dict[str, float]
    after: dict[str, float]
    message: str = ""
