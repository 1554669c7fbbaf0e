"""The home of some of a data center's apps: performs what `tabane.gateway.activation` decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from msgspec.structs import replace

from tabane.clock import Clock, Timer
from tabane.gateway import activation
from tabane.gateway.activation import Activation, AppChanged, GatewayGone
from tabane.gateway.events import NOTHING_SAVED, SavedThere
from tabane.gateway.ledger import AppLedger
from tabane.gateway.messages import Broken, Demand, Report, ToGateway, ToHome
from tabane.model import App, AppName, Instance, InstanceId, NodeName, new_instance_id
from tabane.node.membership import GATEWAY_GRACE_S
from tabane.scheduler.placement import Choice, NodeView, place


class Performer(Protocol):
    """Carries the home's decisions to nodes and gateways, this node included."""

    def start_instance(
        self, node: NodeName, app: App, instance: InstanceId, *, resume: bool = False
    ) -> None: ...

    def freeze_instance(
        self, node: NodeName, instance: InstanceId, number: int, reason: str = ""
    ) -> None: ...

    def save_instance(
        self, node: NodeName, instance: InstanceId, number: int, *, ends: bool = False
    ) -> None: ...

    def thaw_instance(self, node: NodeName, instance: InstanceId) -> None: ...

    def stop_instance(self, node: NodeName, instance: InstanceId, reason: str) -> None: ...

    def release_instance(self, node: NodeName, instance: InstanceId) -> None: ...

    def tell_gateway(self, gateway: str, message: ToGateway) -> None: ...


class Home:
    """`app_of` gives an app as stored now, as of that `revision` of the store; `nodes` the views of
    this data center's live nodes."""

    def __init__(
        self,
        performer: Performer,
        clock: Clock,
        *,
        app_of: Callable[[AppName], App | None],
        nodes: Callable[[], list[NodeView]],
        revision: Callable[[], int] = lambda: 0,
        may_go_elsewhere: Callable[[App], bool] = lambda app: False,
    ) -> None:
        self._performer = performer
        self._clock = clock
        self._app_of = app_of
        self._nodes = nodes
        self._revision = revision
        self._may_go_elsewhere = may_go_elsewhere
        self._told: dict[str, int] = {}
        """Revisions of the store that others have."""
        self._early: set[AppName] = set()
        """Apps that this home has not heard of, and may be about to."""
        self._activation = Activation(self._place, new_instance_id)
        self._timer: Timer | None = None
        self._leaving: dict[str, Timer] = {}
        self._reported: set[str] = set()
        """Gateways that reported in their present session, maybe before we saw them join."""
        self._troubles: dict[AppName, str] = {}

    def handle(self, event: activation.Event) -> None:
        """Something happened; do what follows."""
        self._perform(self._activation.handle(event, self._clock.now()))

    def about(self, app: AppName, event: activation.Event) -> None:
        """The same for an event of an app that may be new here."""
        self._know(app)
        self.handle(event)

    def hear(self, gateway: str, message: ToHome) -> None:
        """A gateway said something."""
        match message:
            case Report(apps=reports):
                self._reported.add(gateway)
                for report in reports:
                    self._told[gateway] = report.demand.known
                    self._know(report.app)
            case Demand(app=app, known=known):
                self._told[gateway] = known
                self._know(app)
            case Broken(app=app, reason=reason):
                self._know(app)
                self._troubles[app] = reason
            case _:
                self._know(message.app)
        self._perform(self._activation.hear(gateway, message, self._clock.now()))

    def on_node_report(
        self,
        node: NodeName,
        instances: tuple[Instance, ...],
        asked_at: float,
        saved: SavedThere = NOTHING_SAVED,
    ) -> None:
        """All that a node has of this home's apps, as it was asked at `asked_at`."""
        for cohort in (*(one.cohort for one in instances), *(one.app for one in saved.away)):
            self._know(cohort)
        self.handle(activation.NodeReport(node, instances, asked_at, saved))

    def on_gateway(self, gateway: str, *, joined: bool) -> None:
        """A gateway's hub session came or went. Until it has reported in its next one, or its
        grace is over, it may hold slots that nobody here knows of."""
        if (timer := self._leaving.pop(gateway, None)) is not None:
            timer.cancel()
        if not joined:
            self._reported.discard(gateway)
            over = self._clock.now() + GATEWAY_GRACE_S
            self._leaving[gateway] = self._clock.call_at(over, lambda: self._on_gone(gateway))
        if gateway not in self._reported:
            self.handle(activation.GatewayJoined(gateway))

    def expect(self, gateways: Iterable[str]) -> None:
        """This home is new, and these gateways are not there: they may hold what the home before
        it granted them, or be about to start."""
        for gateway in gateways:
            self.on_gateway(gateway, joined=False)

    def _on_gone(self, gateway: str) -> None:
        self._told.pop(gateway, None)
        self._leaving.pop(gateway, None)
        self.handle(GatewayGone(gateway))

    def on_store(self) -> None:
        """The store's revision here is newer: of some apps it is known now that they are gone."""
        if not self._is_behind:
            early, self._early = self._early, set()
            for app in early:
                self.handle(AppChanged(app, self._app_of(app)))

    def forget(self, app: AppName) -> None:
        """Another node is this app's home now."""
        self._early.discard(app)
        self._troubles.pop(app, None)
        self._activation.forget(app)

    def apps(self) -> tuple[AppName, ...]:
        return tuple(self._activation.apps())

    def ledger(self, app: AppName) -> AppLedger | None:
        return self._activation.ledger(app)

    def trouble(self, app: AppName) -> str:
        """Why a session last broke off in an instance; empty when none did."""
        return self._troubles.get(app, "")

    def explain(self, app: App) -> Choice:
        """Where one more instance would go now, and why."""
        ledger = self._activation.ledger(app.cohort)
        return self._place(app, ledger.declines(self._clock.now()) if ledger is not None else {})

    def _place(self, app: App, declined: Mapping[NodeName, str]) -> Choice:
        ledger = self._activation.ledger(app.cohort)
        here: dict[NodeName, int] = {}
        for holding in ledger.instances.values() if ledger is not None else ():
            here[holding.node] = here.get(holding.node, 0) + 1
        saved = self._activation.nodes_with_copy(app)
        choice = place(app, self._nodes(), here, declined, saved)
        if choice.crowded and self._may_go_elsewhere(app):  # sooner than memory comes free here
            return replace(choice, crowded=False)
        return choice

    def close(self) -> None:
        for timer in (*self._leaving.values(), self._timer):
            if timer is not None:
                timer.cancel()

    def _know(self, app: AppName) -> None:
        """Activation learns of an app when something first happens to it here."""
        ledger = self._activation.ledger(app)
        if ledger is not None and (ledger.app is not None or ledger.is_early):
            return
        known = self._app_of(app)
        if known is None and self._is_behind:
            self._early.add(app)
            self._activation.expect(app)
        elif ledger is None:
            self.handle(AppChanged(app, known))

    @property
    def _is_behind(self) -> bool:
        return self._revision() < max(self._told.values(), default=0)

    def _perform(self, instructions: list[activation.Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case activation.Start(app=app, instance=instance, node=node, resume=resume):
                    self._performer.start_instance(node, app, instance, resume=resume)
                case activation.Freeze(instance=instance, node=node, number=number, reason=reason):
                    self._performer.freeze_instance(node, instance, number, reason)
                case activation.Save(instance=instance, node=node, number=number, ends=ends):
                    self._performer.save_instance(node, instance, number, ends=ends)
                case activation.Thaw(instance=instance, node=node):
                    self._performer.thaw_instance(node, instance)
                case activation.Stop(instance=instance, node=node, reason=reason):
                    self._performer.stop_instance(node, instance, reason)
                case activation.Release(instance=instance, node=node):
                    self._performer.release_instance(node, instance)
                case activation.Tell(gateway=gateway, message=message):
                    self._performer.tell_gateway(gateway, message)
        self._plan()

    def _plan(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due = self._activation.next_due()
        if due is None:
            self._timer = None
            return
        self._timer = self._clock.call_at(due, self._on_due)

    def _on_due(self) -> None:
        self.handle(activation.Tick())
