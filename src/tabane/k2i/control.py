"""Orders obeyed: each target is found, checked, done, and every step of it is in the audit log.

What is known of instances is the node's (`Instances`); how orders are checked, repeated, tried
without effect and written down is the same for both.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from msgspec.structs import replace

from tabane.clock import SYSTEM, Clock
from tabane.errors import NotFound, SystemFault, TabaneError
from tabane.k2i.changes import plan
from tabane.k2i.kernel import Alone, Surroundings, hold, look
from tabane.k2i.ledger import Audit, Ledger
from tabane.k2i.orders import (
    Gpid,
    InstanceAction,
    InstanceOrder,
    InstanceOutcome,
    InstanceTarget,
    Order,
    Outcome,
    Signal,
)
from tabane.k2i.permission import (
    Here,
    check_address,
    check_confinement,
    check_identity,
    check_instance,
    check_instance_order,
    check_order,
    check_permission,
)
from tabane.k2i.repeats import Repeats
from tabane.model import Resources
from tabane.security.identity import Principal
from tabane.supervise import Supervisor


class SeenInstance(NamedTuple):
    """An instance as it is just now. `owner` is the uid of who deployed its app, which `declared`
    these limits; `now` as in `InstanceOutcome`, for the order's action."""

    app: str
    owner: int
    declared: Resources
    now: dict[str, float]


class Instances(Protocol):
    """The instances of a node."""

    def look(self, target: InstanceTarget, action: InstanceAction) -> SeenInstance:
        """Raises `NotFound`, `Stale` for another generation, `Conflict` when it is not in a state
        for this, and `Unsupported` when its driver cannot."""

    def do(self, target: InstanceTarget, action: InstanceAction) -> Awaitable[None]: ...


class Control:
    """What one node does to its processes and instances. An order that makes no sense or may not be
    given is refused as a whole; else each process has an `Outcome` of its own, in the order of the
    targets."""

    def __init__(
        self,
        here: Here,
        audit: Audit,
        tasks: Supervisor,
        *,
        surroundings: Surroundings | None = None,
        instances: Instances | None = None,
        on_change: Callable[[int], None] = lambda _: None,
        clock: Clock = SYSTEM,
    ) -> None:
        """`on_change` is told the pid of each process that was changed, from any thread."""
        self.here = here
        self._audit = audit
        self._surroundings = surroundings or Alone()
        self._instances = instances
        self._on_change = on_change
        self._clock = clock
        self._repeats = Repeats(tasks, clock)

    # Processes

    async def obey(self, order: Order, who: Principal) -> tuple[Outcome, ...]:
        """Raises `UsageError`, `Denied`, `Conflict` and `Busy`; then nothing was done."""
        await self.check(order, who)
        ledger = Ledger(self._audit, self._clock, order, who)

        async def obey() -> tuple[Outcome, ...]:
            return await asyncio.to_thread(self._obey, order, who, ledger)

        if order.key and not order.dry_run:
            return await self._repeats.once(order, who, obey, size=len(order.targets))
        return await obey()

    async def check(self, order: Order, who: Principal) -> None:
        """Refuse what makes no sense or may not be given, and write that down. Raises `UsageError`,
        `Denied`."""
        try:
            check_order(order, who)
        except TabaneError as error:
            ledger = Ledger(self._audit, self._clock, order, who)
            await asyncio.to_thread(ledger.refuse, len(order.targets), error)
            raise

    def _obey(self, order: Order, who: Principal, ledger: Ledger) -> tuple[Outcome, ...]:
        """This process itself comes last: it may not be there to do more."""
        targets = order.targets
        own_last = sorted(range(len(targets)), key=lambda index: targets[index].pid == os.getpid())
        found = {index: self._obey_one(order, targets[index], who, ledger) for index in own_last}
        ledger.sync()
        outcomes = (found[index] for index in range(len(targets)))
        return tuple(
            replace(outcome, message=with_problem(outcome.message, ledger)) for outcome in outcomes
        )

    def _obey_one(self, order: Order, target: Gpid, who: Principal, ledger: Ledger) -> Outcome:
        name, begun = "", False
        try:
            check_address(target, self.here)
            with hold(target.pid) as held:
                seen = look(held, self._surroundings)
                name = seen.name
                check_identity(target, seen)
                check_permission(order, target, seen, who)
                change = plan(order.action, held, seen, who)
                if order.dry_run:
                    ledger.tell(target, "would", name=name)
                    return Outcome(target, before=change.before, after=change.after)
                ledger.tell(target, "doing", name=name)
                begun = True
                if isinstance(order.action, Signal):
                    self._surroundings.on_signal(target.pid, order.action.number)
                try:
                    after = change.make()
                finally:
                    self._on_change(target.pid)
        except (TabaneError, OSError) as error:
            problem = error if isinstance(error, TabaneError) else SystemFault(f"{target}: {error}")
            what = "failed" if begun else "refused"
            ledger.tell(target, what, name=name, reason=problem.message)
            return Outcome(target, problem.code, problem.message)
        ledger.tell(target, "done", name=name)
        return Outcome(target, before=change.before, after=after)

    # Instances

    async def obey_instance(self, order: InstanceOrder, who: Principal) -> InstanceOutcome:
        """Raises `UsageError` (with `Denied`, `NotFound`, `Stale`, `Conflict`), `Unsupported` and
        `Busy`."""
        ledger = Ledger(self._audit, self._clock, order, who)

        async def obey() -> InstanceOutcome:
            try:
                return await self._obey_instance(order, who, ledger)
            finally:
                await asyncio.to_thread(ledger.sync)

        if order.key and not order.dry_run:
            return await self._repeats.once(order, who, obey)
        return await obey()

    async def _obey_instance(
        self, order: InstanceOrder, who: Principal, ledger: Ledger
    ) -> InstanceOutcome:
        target, action, name, begun = order.target, order.action, "", False
        try:
            check_instance_order(order, who)
            if self._instances is None or target.node != self.here.place:
                raise NotFound(f"{target} is not here: this is {self.here.place or 'no cluster'}")
            seen = self._instances.look(target, action)
            name = seen.app
            check_instance(target, seen.owner, who)
            after = check_confinement(action, seen.declared, who)
            if order.dry_run:
                ledger.tell(target, "would", name=name)
                return InstanceOutcome(target, seen.now, seen.now | after)
            ledger.tell(target, "doing", name=name)
            begun = True
            await self._instances.do(target, action)
            now = self._instances.look(target, action).now
        except (TabaneError, OSError) as error:
            what = "failed" if begun else "refused"
            ledger.tell(target, what, name=name, reason=str(error))
            if isinstance(error, OSError):
                raise SystemFault(f"{target}: {error}") from error
            raise
        ledger.tell(target, "done", name=name)
        return InstanceOutcome(target, seen.now, now, with_problem("", ledger))


def with_problem(message: str, ledger: Ledger) -> str:
    return "; ".join(filter(None, (message, ledger.problem)))
