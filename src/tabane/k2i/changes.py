"""An order's action on one process: what it is now, what it would become, and making it so."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import NamedTuple

from tabane.k2i import kernel
from tabane.k2i.kernel import Held
from tabane.k2i.orders import Action, Affinity, Found, Limit, Limits, Nice, Pause, Resume, Signal
from tabane.k2i.permission import Pair, Seen, check_cpus, new_limit, new_nice
from tabane.security.identity import Principal


class Change(NamedTuple):
    """`before` is so, `after` is to be; `make` does it and returns what it then is."""

    before: Found
    after: Found
    make: Callable[[], Found]


def plan(action: Action, held: Held, seen: Seen, who: Principal) -> Change:
    """Reads and refuses, but changes nothing. Raises `UsageError`, `Denied`, `NotFound`,
    `Unsupported`."""
    match action:
        case Nice():
            return _plan_nice(action, held, seen, who)
        case Affinity():
            return _plan_affinity(action, held)
        case Limits():
            return _plan_limits(action, held, who)
        case Signal(number):
            return _plan_signal(held, seen, number)
        case Pause():
            return _plan_signal(held, seen, signal.SIGSTOP)
        case Resume():
            return _plan_signal(held, seen, signal.SIGCONT)


def _plan_signal(held: Held, seen: Seen, number: int) -> Change:
    kernel.check_delivered(held.pid, seen.name, number)
    return Change(None, None, lambda: kernel.send_signal(held, number))


def _plan_nice(action: Nice, held: Held, seen: Seen, who: Principal) -> Change:
    wanted = Nice(new_nice(action, seen.nice, who))

    def make() -> int:
        kernel.set_nice(held, lambda nice: new_nice(wanted, nice, who))
        return kernel.nice_of(held)

    return Change(seen.nice, wanted.value, make)


def _plan_affinity(action: Affinity, held: Held) -> Change:
    cpus = check_cpus(action, kernel.online_cpus())

    def make() -> list[int]:
        kernel.set_affinity(held, cpus)
        return kernel.cpus_of(held)

    return Change(kernel.cpus_of(held), sorted(cpus), make)


def _plan_limits(action: Limits, held: Held, who: Principal) -> Change:
    names = list(action.limits)
    before = kernel.limits_of(held, names)

    def choose(name: str, now: Pair) -> Pair:
        return new_limit(name, action.limits[name], now, who)

    def make() -> dict[str, Limit]:
        kernel.set_limits(held, names, choose)
        return _named(kernel.limits_of(held, names))

    after = {name: choose(name, now) for name, now in before.items()}
    return Change(_named(before), _named(after), make)


def _named(limits: dict[str, Pair]) -> dict[str, Limit]:
    return {name: Limit(soft, hard) for name, (soft, hard) in limits.items()}
