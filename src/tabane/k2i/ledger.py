"""What the audit log is told of one order: before each thing is done, and what came of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from msgspec.structs import replace

from tabane.clock import Clock
from tabane.errors import TabaneError
from tabane.k2i.orders import Gpid, InstanceOrder, InstanceTarget, Order, describe
from tabane.security.audit import Line
from tabane.security.identity import Principal

log = logging.getLogger(__name__)


class Audit(Protocol):
    """As `tabane.security.audit.AuditLog`."""

    def add(self, line: Line) -> None: ...

    def sync(self) -> None: ...


class Ledger:
    """A full disk does not disarm who wants to end the program that fills it: what the audit log
    does not take goes to the node's own log, and `problem` says so."""

    def __init__(
        self,
        audit: Audit,
        clock: Clock,
        order: Order | InstanceOrder,
        who: Principal,
    ) -> None:
        self.problem = ""
        self._audit = audit
        self._clock = clock
        self._line = Line(
            0.0,
            who.kind,
            who.uid,
            who.pid,
            describe(order.action),
            "",
            dry_run=order.dry_run,
            force=isinstance(order, Order) and order.force,
            key=order.key,
            via=who.via,
        )

    def tell(
        self, target: Gpid | InstanceTarget, outcome: str, *, name: str = "", reason: str = ""
    ) -> None:
        """`name` is of the process, or the app's."""
        if isinstance(target, Gpid):
            incarnation, start_ticks = target.incarnation, target.start_ticks
        else:
            incarnation, start_ticks = target.generation.incarnation, 0
        self._add(
            target=str(target),
            process=name,
            incarnation=incarnation,
            start_ticks=start_ticks,
            outcome=outcome,
            reason=reason,
        )

    def refuse(self, targets: int, error: TabaneError) -> None:
        """The order as a whole. Blocks, as `sync`."""
        self._add(target=f"{targets} targets", outcome="refused", reason=error.message)
        self.sync()

    def sync(self) -> None:
        """Have it all on disk."""
        self._attempt(self._audit.sync, "")

    def _add(self, **fields: str | int) -> None:
        line = replace(self._line, at=self._clock.wall(), **fields)
        self._attempt(lambda: self._audit.add(line), line)

    def _attempt(self, write: Callable[[], None], line: Line | str) -> None:
        try:
            write()
        except OSError as error:
            self.problem = f"the audit log cannot be written: {error.strerror}"
            log.error("%s: %s", self.problem, line)
