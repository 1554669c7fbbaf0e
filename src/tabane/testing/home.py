"""An app's home by hand: tells an `Activation` what happens and sorts what it decides.

After every event it checks that a second look at the same moment finds nothing more to do, and
that the next look planned is in the future: decisions are complete, and never a busy loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TypeVar

from msgspec.structs import replace

from tabane.gateway import activation
from tabane.gateway.activation import (
    Activation,
    Freeze,
    Instruction,
    Release,
    Start,
    Stop,
    Tell,
    Thaw,
)
from tabane.gateway.ledger import AppLedger
from tabane.gateway.messages import (
    AppReport,
    Demand,
    Grant,
    Held,
    Refuse,
    Report,
    Returned,
    Revoke,
    StartTrace,
    StillUsed,
    ToHome,
)
from tabane.model import App, Generation, Instance, InstanceId, NodeName, State
from tabane.scheduler.placement import Choice

NODE = NodeName("tokyo/tokyo-1")
FULL = ("n1: is full",)
Kind = TypeVar("Kind")


class Decided(list[Instruction]):
    """What was decided, sorted."""

    @property
    def starts(self) -> list[InstanceId]:
        return [one.instance for one in self if isinstance(one, Start)]

    @property
    def stops(self) -> dict[InstanceId, str]:
        """Reasons by instance."""
        return {one.instance: one.reason for one in self if isinstance(one, Stop)}

    @property
    def freezes(self) -> list[InstanceId]:
        return [one.instance for one in self if isinstance(one, Freeze)]

    @property
    def thaws(self) -> list[InstanceId]:
        return [one.instance for one in self if isinstance(one, Thaw)]

    @property
    def releases(self) -> list[InstanceId]:
        return [one.instance for one in self if isinstance(one, Release)]

    def told(self, kind: type[Kind]) -> list[tuple[str, Kind]]:
        """Messages of this kind, each with its gateway."""
        return [
            (one.gateway, one.message)
            for one in self
            if isinstance(one, Tell) and isinstance(one.message, kind)
        ]

    @property
    def grants(self) -> list[tuple[str, InstanceId, int]]:
        return [(gateway, grant.instance, grant.slots) for gateway, grant in self.told(Grant)]

    @property
    def revokes(self) -> list[tuple[str, InstanceId, float | None]]:
        return [
            (gateway, revoke.instance, revoke.unused_s) for gateway, revoke in self.told(Revoke)
        ]

    @property
    def refusals(self) -> list[tuple[str, str, int]]:
        return [(gateway, no.kind, no.sessions) for gateway, no in self.told(Refuse)]


class HandledHome:
    """One app and its home. `node` is where the next instance goes; None: nowhere, for want of
    memory if that is `crowded`."""

    def __init__(self, app: App | None = None, **reactive: object) -> None:
        self.now = 1_000.0
        self.node: NodeName | None = NODE
        self.crowded = False
        self.app = app or App(name="hello", image="host", port=8000, revision=1)
        self._answered: dict[str, int] = {}
        self.epoch = 7
        self.numbers = itertools.count(1)
        self.restart()
        self.deploy(**reactive)

    def restart(self) -> None:
        """All that was known is lost."""
        self.activation = Activation(
            lambda app, declined: self._place(declined),
            lambda: InstanceId(f"i{next(self.numbers)}"),
        )

    def _place(self, declined: Mapping[NodeName, str]) -> Choice:
        if self.node is None or self.node in declined:
            reasons = tuple(f"n1: {why}" for why in declined.values()) or FULL
            return Choice(None, reasons, self.crowded)
        return Choice(self.node, FULL)

    @property
    def ledger(self) -> AppLedger:
        ledger = self.activation.ledger(self.app.key)
        assert ledger is not None
        return ledger

    def handle(self, event: activation.Event) -> Decided:
        return self._settled(self.activation.handle(event, self.now))

    def hear(self, gateway: str, message: ToHome) -> Decided:
        return self._settled(self.activation.hear(gateway, message, self.now))

    def wait(self, seconds: float) -> Decided:
        """Let time pass, with a look whenever one is planned."""
        end, decided = self.now + seconds, Decided()
        while (due := self.activation.next_due()) is not None and due <= end:
            self.now = due
            decided += self.handle(activation.Tick())
        self.now = end
        return decided

    def _settled(self, out: list[Instruction]) -> Decided:
        again = self.activation.handle(activation.Tick(), self.now)
        assert not again, f"a second look found more to do: {again}"
        due = self.activation.next_due()
        assert due is None or due > self.now
        decided = Decided(out)
        for gateway, grant in decided.told(Grant):
            self._answered[gateway] = grant.answered
        for gateway, refuse in decided.told(Refuse):
            self._answered[gateway] = refuse.answered
        return decided

    # What happens

    def prove(self) -> None:
        """Its current revision is known to become ready."""
        self.ledger.proven = self.app.revision

    def deploy(self, **reactive: object) -> Decided:
        """The same revision with other limits."""
        limits = replace(self.app.reactive, **reactive)
        self.app = replace(self.app, reactive=limits)
        return self.handle(activation.AppChanged(self.app.key, self.app))

    def redeploy(self, **changes: object) -> Decided:
        """A new revision."""
        self.app = replace(self.app, revision=self.app.revision + 1, **changes)
        return self.handle(activation.AppChanged(self.app.key, self.app))

    def demand(
        self, gateway: str, waiting: int, *, waited_s: float = 0.0, seen: int | None = None
    ) -> Decided:
        """`seen` None: it saw all answers so far."""
        return self.hear(gateway, self.words_of(gateway, waiting, waited_s, seen))

    def words_of(
        self, gateway: str, waiting: int, waited_s: float = 0.0, seen: int | None = None
    ) -> Demand:
        seen = self._answered.get(gateway, 0) if seen is None else seen
        return Demand(self.app.key, waiting, waited_s, self.epoch, seen)

    def returned(self, gateway: str, instance: str, slots: int, unused_s: float = 0.0) -> Decided:
        return self.hear(gateway, Returned(self.app.key, InstanceId(instance), slots, unused_s))

    def still_used(self, gateway: str, instance: str, unused_s: float = 0.0) -> Decided:
        return self.hear(gateway, StillUsed(self.app.key, InstanceId(instance), unused_s))

    def report(self, gateway: str, waiting: int = 0, **held: int) -> Decided:
        """A gateway says how things stand, in a new epoch."""
        self.epoch += 1
        self._answered[gateway] = 0
        slots = tuple(Held(InstanceId(name), count, 0.0) for name, count in held.items())
        return self.hear(gateway, Report((AppReport(self.words_of(gateway, waiting), slots),)))

    def instance(
        self,
        instance: str,
        state: State = State.READY,
        revision: int | None = None,
        freezes: int = 0,
    ) -> Instance:
        number = InstanceId(instance)
        return Instance(
            id=number,
            app=self.app.key,
            revision=self.app.revision if revision is None else revision,
            node=NODE,
            generation=Generation("incarnation", number, 1),
            state=state,
            address="10.0.0.1",
            freezable=True,
            freezes=freezes,
        )

    def ready(
        self, instance: str, *, revision: int | None = None, trace: StartTrace | None = None
    ) -> Decided:
        found = self.instance(instance, revision=revision)
        return self.handle(activation.InstanceReady(found, trace))

    def ended(
        self, instance: str, reason: str = "exited with code 1", *, retry: bool = True
    ) -> Decided:
        """It failed."""
        return self._ended(instance, reason, failed=True, retry=retry)

    def declined(
        self, instance: str, reason: str = "200 starts wait", again_s: float = 1.0
    ) -> Decided:
        """Its node did not take it on."""
        return self._ended(instance, reason, failed=False, retry=True, again_s=again_s)

    def stopped(self, instance: str) -> Decided:
        """It ended because it was told to."""
        return self._ended(instance, "stopped", failed=False, retry=True)

    def _ended(
        self,
        instance: str,
        reason: str,
        *,
        failed: bool,
        retry: bool,
        again_s: float | None = None,
    ) -> Decided:
        number = InstanceId(instance)
        told = self.app.key, number, NODE, reason, failed, retry, again_s
        return self.handle(activation.InstanceEnded(*told))
