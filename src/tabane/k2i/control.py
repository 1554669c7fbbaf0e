"""Orders obeyed: each target is found, checked, done, and every step of it is in the audit log."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Protocol

from msgspec.structs import replace

from tabane.clock import SYSTEM, Clock
from tabane.errors import TabaneError
from tabane.k2i.changes import plan
from tabane.k2i.kernel import Alone, Surroundings, hold, look
from tabane.k2i.orders import Gpid, Order, Outcome, describe
from tabane.k2i.permission import (
    Here,
    check_address,
    check_identity,
    check_order,
    check_permission,
)
from tabane.k2i.repeats import Repeats
from tabane.model import NodeName
from tabane.security.audit import Line
from tabane.security.identity import Principal
from tabane.supervise import Supervisor

NOBODY = NodeName("")
log = logging.getLogger(__name__)


class Audit(Protocol):
    """As `tabane.security.audit.AuditLog`."""

    def add(self, line: Line) -> None: ...

    def sync(self) -> None: ...


class Control:
    """What one node does to its processes. An order that makes no sense or may not be given is
    refused as a whole; else each target has an `Outcome` of its own, in the order of the targets.

    A full disk does not disarm who wants to end the program that fills it: what the audit log does
    not take is done all the same, goes to the node's own log, and the outcome says so.
    """

    def __init__(
        self,
        here: Here,
        audit: Audit,
        tasks: Supervisor,
        *,
        surroundings: Surroundings | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        self.here = here
        self._audit = audit
        self._surroundings = surroundings or Alone()
        self._clock = clock
        self._repeats = Repeats(tasks, clock)

    async def obey(
        self, order: Order, who: Principal, *, via: NodeName = NOBODY
    ) -> tuple[Outcome, ...]:
        """`via` is the node that passed it on. Raises `UsageError`, `Denied`, `Conflict` and
        `Busy`; then nothing was done."""
        ledger = Ledger(self._audit, self._clock, order, who, via)
        try:
            check_order(order, who)
        except TabaneError as error:
            await asyncio.to_thread(ledger.refuse, error)
            raise
        if order.key and not order.dry_run:
            return await self._repeats.once(order, who, lambda: self._obey(ledger))
        return await self._obey(ledger)

    async def _obey(self, ledger: Ledger) -> tuple[Outcome, ...]:
        return await asyncio.to_thread(self._obey_all, ledger)

    def _obey_all(self, ledger: Ledger) -> tuple[Outcome, ...]:
        """This process itself comes last: it may not be there to do more."""
        targets = ledger.order.targets
        own_last = sorted(range(len(targets)), key=lambda index: targets[index].pid == os.getpid())
        found = {index: self._obey_one(ledger, targets[index]) for index in own_last}
        problem = ledger.sync()
        outcomes = (found[index] for index in range(len(targets)))
        return tuple(_with_note(outcome, problem) for outcome in outcomes)

    def _obey_one(self, ledger: Ledger, target: Gpid) -> Outcome:
        order, who, name, begun = ledger.order, ledger.who, "", False
        try:
            check_address(target, self.here)
            with hold(target.pid) as held:
                seen = look(held, self._surroundings)
                name = seen.name
                check_identity(target, seen)
                check_permission(order, target, seen, who)
                change = plan(order.action, held, seen, who)
                if order.dry_run:
                    ledger.tell(target, "would", name)
                    return Outcome(target, before=change.before, after=change.after)
                ledger.tell(target, "doing", name)
                begun = True
                after = change.make()
        except TabaneError as error:
            ledger.tell(target, "failed" if begun else "refused", name, error.message)
            return Outcome(target, error.code, error.message)
        ledger.tell(target, "done", name)
        return Outcome(target, before=change.before, after=after)


class Ledger:
    """What the audit log is told of one order."""

    def __init__(
        self, audit: Audit, clock: Clock, order: Order, who: Principal, via: NodeName
    ) -> None:
        self.order = order
        self.who = who
        self._audit = audit
        self._clock = clock
        self._via = via
        self._problem = ""

    def refuse(self, error: TabaneError) -> None:
        """The order as a whole."""
        line = self._line(f"{len(self.order.targets)} processes", "refused")
        self._attempt(lambda: self._audit.add(replace(line, reason=error.message)), line)
        self.sync()

    def tell(self, target: Gpid, outcome: str, name: str, reason: str = "") -> None:
        line = replace(
            self._line(str(target), outcome),
            process=name,
            incarnation=target.incarnation,
            start_ticks=target.start_ticks,
            reason=reason,
        )
        self._attempt(lambda: self._audit.add(line), line)

    def sync(self) -> str:
        """Have it all on disk; returns what is wrong with that."""
        self._attempt(self._audit.sync, None)
        return self._problem

    def _line(self, target: str, outcome: str) -> Line:
        order, who = self.order, self.who
        return Line(
            self._clock.wall(),
            who.kind,
            who.uid,
            who.pid,
            describe(order.action),
            target,
            outcome=outcome,
            dry_run=order.dry_run,
            force=order.force,
            key=order.key,
            via=self._via,
        )

    def _attempt(self, write: Callable[[], None], line: Line | None) -> None:
        try:
            write()
        except OSError as error:
            self._problem = f"the audit log cannot be written: {error.strerror}"
            log.error("%s: %s", self._problem, line)


def _with_note(outcome: Outcome, problem: str) -> Outcome:
    if not problem:
        return outcome
    return replace(outcome, message=f"{outcome.message}; {problem}".removeprefix("; "))
