"""Activation decides, for the apps whose home is here, what runs: plain functions without IO.

`Activation.handle(event, now)` and `hear(gateway, message, now)` take what happened, enter it in
the app's books (`ledger`) and return what to do (`decisions`). Gateways say how many sessions wait
(`Demand`); free slots are granted, the first come first; when there are none, the other gateways
are asked for slots they do not use, or for the next that comes free; only then are instances
started, one for each `concurrency` sessions, never above `max`. Grants are counted, so an instance
is idle exactly when no slot of it is held by anyone: it is then stopped without a doubt, and its
address freed.

Setbacks (`setbacks`) are starts that fail and instances that end by themselves soon after they were
ready: growing pauses let one trial through at a time. Who waits for a second start that fails is
refused with the reason; who comes in a pause waits for its end, or is refused at once when that is
too late. Instances that were started before a setback and then fail too do not count again.

Of the first instance of a revision on a node, a checkpoint is made when no session uses it for a
moment (`Save`): as idle as one that is frozen, so that no session is in the middle of anything, and
no connection is kept to it. A session that comes all the same is granted its slot, and answered
when the dump is done, in less than a start takes.

One that is *put away* (`checkpoint_after`) ends once it is saved as it is. Its slots are granted
again only when its node has said that it goes on after all; when it has said that it ended, the
next instance that is needed is that very one, on that very node (`Start.resume`), and another only
where that cannot be.

A new revision first gets one ready instance; then those of the old one are drained.

Messages may be lost when a connection breaks. A gateway then reports how things stand, and a node
(`NodeReport`) what it runs; until all gateways have, nothing is stopped.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable

from msgspec.structs import replace

from tabane.gateway.decisions import Decisions
from tabane.gateway.events import (
    AppChanged,
    Event,
    FloorChanged,
    GatewayGone,
    GatewayJoined,
    InstanceAwake,
    InstanceEnded,
    InstanceReady,
    NodeReport,
    StillStarting,
    StopAsked,
    Tick,
)
from tabane.gateway.instructions import (
    Freeze,
    Instruction,
    Release,
    Save,
    Start,
    Stop,
    Tell,
    Thaw,
)
from tabane.gateway.ledger import AppLedger, Away, Holding, proven_at
from tabane.gateway.lowering import LOWER_S, LowerAsked, Lowering
from tabane.gateway.messages import (
    Broken,
    Demand,
    Report,
    Returned,
    Revoke,
    StartTrace,
    StillUsed,
    ToHome,
)
from tabane.gateway.place import Place
from tabane.lifecycle import STANDING
from tabane.model import App, AppName, Instance, InstanceId, NodeName, State

__all__ = [
    "Activation",
    "AppChanged",
    "Event",
    "FloorChanged",
    "Freeze",
    "GatewayGone",
    "GatewayJoined",
    "InstanceAwake",
    "InstanceEnded",
    "InstanceReady",
    "Instruction",
    "LowerAsked",
    "NodeReport",
    "Place",
    "Release",
    "Save",
    "Start",
    "StillStarting",
    "Stop",
    "StopAsked",
    "Tell",
    "Thaw",
    "Tick",
]

SUSPECT_S = 1.0
"""An instance that a gateway could not reach gets no sessions for so long; one that broke off an
answer, those that no other has room for."""
REST_S = 60.0
"""An app at rest for so long is forgotten until it is heard of again: what was said to gateways has
reached them, or they have reported since. So a home's memory follows what is used."""
SPARE_TIMERS = 64
"""Outdated entries among the timers are cleared away when they are more than the apps and these."""


class Activation:
    """The home of some apps. `place` and `new_id` are given, so that decisions are repeatable."""

    def __init__(self, place: Place, new_id: Callable[[], InstanceId]) -> None:
        self._place = place
        self._new_id = new_id
        self._apps: dict[AppName, AppLedger] = {}
        self._proven: dict[AppName, int] = {}
        """Of apps that were forgotten at rest, as in their books."""
        self._silent: set[str] = set()
        """Gateways that have not reported yet, and so may hold slots nobody here knows of."""
        self._copies: dict[NodeName, set[tuple[AppName, int]]] = {}
        """What a node has checkpoints of, from which others begin: app and revision."""
        self._timers: list[tuple[float, AppName]] = []
        self._out: list[Instruction] = []

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """What follows from `event` at `now` (monotonic seconds)."""
        self._run_due(now)
        match event:
            case AppChanged():
                self._on_app(event, now)
            case FloorChanged(key=key, floor=floor):
                self._ledger(key).floor = floor
                self._settle(key, now)
            case InstanceReady():
                self._enter_ready(event.instance, event.trace, now)
                self._settle(event.instance.cohort, now)
            case InstanceEnded():
                self._on_ended(event, now)
            case InstanceAwake():
                self._on_awake(event, now)
            case StillStarting():
                self._ledger(event.app).note_doing(event.instance, event.doing)
            case NodeReport():
                self._on_node_report(event, now)
            case GatewayJoined(gateway=gateway):
                self._silent.add(gateway)
            case GatewayGone(gateway=gateway):
                self._on_gateway_gone(gateway, now)
            case StopAsked():
                self._on_stop_asked(event, now)
            case LowerAsked():
                self._on_lower_asked(event, now)
            case Tick():
                pass
        return self._take()

    def hear(self, gateway: str, message: ToHome, now: float) -> list[Instruction]:
        """The same for what a gateway said."""
        self._run_due(now)
        match message:
            case Demand(app=key):
                self._ledger(key).on_demand(gateway, message, now)
                self._settle(key, now)
            case Returned():
                self._on_returned(gateway, message, now)
            case StillUsed():
                self._on_still_used(gateway, message, now)
            case Broken():
                self._on_broken(message, now)
            case Report():
                self._on_report(gateway, message, now)
        return self._take()

    def next_due(self) -> float | None:
        """When `Tick` has something to do: after the last `now`; None when nothing is planned."""
        return self._timers[0][0] if self._timers else None

    def ledger(self, key: AppName) -> AppLedger | None:
        """For those who show it; not to be changed."""
        return self._apps.get(key)

    def apps(self) -> Iterable[AppName]:
        return tuple(self._apps)

    def expect(self, key: AppName) -> None:
        """The app is not known here yet; `AppChanged` will say what it is, or that it is gone."""
        self._ledger(key).is_early = True

    def forget(self, key: AppName) -> None:
        """Another node is this app's home now, or it is no more."""
        self._apps.pop(key, None)
        self._proven.pop(key, None)

    def _take(self) -> list[Instruction]:
        out, self._out = self._out, []
        return out

    def _ledger(self, key: AppName) -> AppLedger:
        ledger = self._apps.get(key)
        if ledger is None:
            ledger = self._apps[key] = AppLedger(key, proven=self._proven.pop(key, -1))
        return ledger

    # What people want

    def _on_app(self, event: AppChanged, now: float) -> None:
        ledger = self._ledger(event.key)
        if event.app is None:
            ledger.floor = 0
        elif event.app.revision != ledger.revision:
            ledger.setbacks.forgive()
            ledger.unsaved = ""
        ledger.set_app(event.app)
        self._settle(event.key, now)

    def _on_stop_asked(self, event: StopAsked, now: float) -> None:
        ledger = self._ledger(event.app)
        decisions = self._decisions(ledger, now)
        if (holding := ledger.instances.get(event.instance)) is not None:
            if event.hung:
                end = InstanceEnded(event.app, holding.id, holding.node, event.reason, failed=True)
                self._learn(ledger, holding, end, now)
            decisions.drain(holding, event.reason)
        self._perform(ledger, decisions, now)

    # What nodes say

    def _on_lower_asked(self, event: LowerAsked, now: float) -> None:
        if (holding := self._ledger(event.app).instances.get(event.instance)) is not None:
            holding.lowering = Lowering(event, now + LOWER_S)
        self._settle(event.app, now)

    def _enter_ready(self, instance: Instance, trace: StartTrace | None, now: float) -> None:
        ledger = self._ledger(instance.cohort)
        holding = ledger.holding(instance.id, instance.node, now)
        ledger.set_instance(holding, instance)
        holding.is_saving = False
        if trace is not None and (trace.note or trace.option == "restore"):
            ledger.unsaved = trace.note
            self._note_copy(instance.app, instance.revision, instance.node, is_there=not trace.note)
        if trace is not None and holding.note:
            trace = replace(trace, note="; ".join(filter(None, (holding.note, trace.note))))
        if instance.savable:
            holding.save_at = min(holding.save_at, now)
        if holding.state in (State.FROZEN, State.CHECKPOINTING):
            holding.state = State.READY
        elif holding.state is not State.READY:
            holding.doubtful = holding.state is not State.STARTING
            holding.state, holding.trace = State.READY, trace
            holding.born, holding.last_used = now, max(holding.last_used, now)
            holding.drain_until = now + holding.drain_timeout_s
            ledger.proven = max(ledger.proven, holding.revision)
            if not holding.is_leaving:
                ledger.setbacks.on_ready(holding.setbacks_before)

    def _on_awake(self, event: InstanceAwake, now: float) -> None:
        ledger = self._ledger(event.app)
        holding = ledger.instances.get(event.instance)
        if not event.used:
            ledger.unsaved = event.reason
        if holding is not None and event.ends:
            holding.away_at = now + event.again_s if event.again_s is not None else math.inf
        elif holding is not None and event.again_s is not None:
            holding.save_at = now + event.again_s
        if holding is not None and event.saved:
            self._note_copy(event.app, holding.revision, holding.node, is_there=True)
        if holding is not None and holding.freezes == event.number:
            holding.is_saving = False
            if event.used:
                holding.last_used = max(holding.last_used, now)
            if holding.state in (State.FROZEN, State.CHECKPOINTING):
                holding.state = State.READY
        self._settle(event.app, now)

    def _on_ended(self, event: InstanceEnded, now: float) -> None:
        ledger = self._ledger(event.app)
        holding = ledger.holding(event.instance, event.node, now)
        holding.node = event.node
        decisions = self._decisions(ledger, now)
        failed_starts = ledger.setbacks.failed_starts
        if event.again_s is not None:
            ledger.declined[event.node] = now + event.again_s, event.reason
        ledger.away.pop(event.instance, None)
        if event.kept_after_s is not None:
            ledger.put_away(holding, event.kept_after_s, event.reason, now)
        elif holding.was_away and holding.state is State.STARTING:
            ledger.lost = f"{holding.id} was put away, and is lost: {event.reason}"
        else:
            self._learn(ledger, holding, event, now)
        self._enter_end(ledger, holding)
        if ledger.setbacks.failed_starts > failed_starts:
            decisions.refuse_failed()
        self._perform(ledger, decisions, now)

    def _learn(self, ledger: AppLedger, holding: Holding, event: InstanceEnded, now: float) -> None:
        """What an end tells of the app: a setback, that starts work, or nothing."""
        setbacks, was_ready = ledger.setbacks, holding.state is State.READY
        if not event.failed or (was_ready and now >= proven_at(holding)):
            if holding.born > setbacks.at:
                setbacks.forgive()
            return
        is_news = holding.setbacks_before == setbacks.total
        if holding.is_leaving or holding.revision != ledger.revision or not is_news:
            return
        if was_ready:
            setbacks.add_early_end(event.reason, now)
        else:
            setbacks.add_failed_start(event.reason, now, retry=event.retry)

    def _on_node_report(self, report: NodeReport, now: float) -> None:
        named = {instance.id for instance in report.instances}
        self._copies[report.node] = {*report.saved.copies}
        for ledger in self._apps.values():
            for holding in ledger.instances.values():
                there = holding.node == report.node and holding.began < report.asked_at
                if there and holding.id not in named:
                    self._enter_end(ledger, holding)
        for instance in report.instances:
            self._enter_found(instance, now, report.asked_at)
        self._enter_away(report, now)
        for key in list(self._apps):
            self._settle(key, now)

    def _enter_away(self, report: NodeReport, now: float) -> None:
        """What is put away on a node; what had been before it was asked, and is not named, is
        not any more."""
        found = {each.instance: each for each in report.saved.away}
        for ledger in self._apps.values():
            for away in [*ledger.away.values()]:
                there = away.node == report.node and away.since < report.asked_at
                if there and away.id not in found:
                    del ledger.away[away.id]
        for each in found.values():
            ledger = self._ledger(each.app)
            holding = ledger.instances.get(each.instance)
            runs = holding is not None and holding.state not in (State.ABSENT, State.UNKNOWN)
            if each.instance in ledger.away or runs:
                continue
            used = now - each.age_s
            away = Away(each.instance, report.node, each.revision, now, used)
            ledger.away[each.instance] = away

    def _note_copy(self, app: AppName, revision: int, node: NodeName, *, is_there: bool) -> None:
        there = self._copies.setdefault(node, set())
        (there.add if is_there else there.discard)((app, revision))

    def nodes_with_copy(self, app: App) -> frozenset[NodeName]:
        """Where there is a checkpoint that an instance of `app` can begin from."""
        kept = (app.key, app.revision)
        return frozenset(node for node, there in self._copies.items() if kept in there)

    def _enter_found(self, instance: Instance, now: float, asked_at: float) -> None:
        """A node has it; it may be new here. What it was told since it was asked, to freeze or to
        thaw, it had not heard of."""
        ledger = self._ledger(instance.cohort)
        holding = ledger.holding(instance.id, instance.node, now)
        if instance.state in STANDING:
            if holding.turned_at < asked_at:
                self._enter_ready(instance, None, now)
                holding.freezes = max(holding.freezes, instance.freezes)
                if instance.state is State.CHECKPOINTING:
                    holding.state, holding.is_called = State.CHECKPOINTING, False
                elif instance.state is not State.READY:
                    holding.state = State.FROZEN
            return
        ledger.set_instance(holding, instance)
        if instance.state not in (State.PREPARING, State.STARTING, State.STOPPING):
            self._enter_end(ledger, holding)
        elif holding.state in (State.UNKNOWN, State.ABSENT):
            stops = instance.state is State.STOPPING
            holding.state = State.STOPPING if stops else State.STARTING

    def _enter_end(self, ledger: AppLedger, holding: Holding) -> None:
        """It is no more; gateways give back what they hold of it."""
        holding.state = State.ABSENT
        for gateway in holding.granted:
            self._out.append(Tell(gateway, Revoke(ledger.key, holding.id, None)))

    # What gateways say

    def _on_gateway_gone(self, gateway: str, now: float) -> None:
        self._silent.discard(gateway)
        for key, ledger in list(self._apps.items()):
            ledger.drop_gateway(gateway)
            self._settle(key, now)

    def _on_returned(self, gateway: str, message: Returned, now: float) -> None:
        holding = self._ledger(message.app).instances.get(message.instance)
        if holding is not None:
            holding.give_back(gateway, message.slots, now - message.unused_s)
        self._settle(message.app, now)

    def _on_still_used(self, gateway: str, message: StillUsed, now: float) -> None:
        holding = self._ledger(message.app).instances.get(message.instance)
        if holding is not None:
            holding.asked.discard(gateway)
            holding.lowering = None
            holding.last_used = max(holding.last_used, now - message.unused_s)
        self._settle(message.app, now)

    def _on_broken(self, message: Broken, now: float) -> None:
        holding = self._ledger(message.app).instances.get(message.instance)
        if holding is not None:
            holding.reached = message.reached
            holding.suspect_until = now + SUSPECT_S
        self._settle(message.app, now)

    def _on_report(self, gateway: str, report: Report, now: float) -> None:
        self._silent.discard(gateway)
        for ledger in self._apps.values():
            ledger.drop_gateway(gateway)
        for entry in report.apps:
            ledger = self._ledger(entry.app)
            ledger.on_demand(gateway, entry.demand, now)
            for held in entry.held:
                holding = ledger.holding(held.instance, NodeName(""), now)
                holding.give(gateway, held.slots, now - held.unused_s)
                if holding.is_leaving:
                    self._out.append(Tell(gateway, Revoke(entry.app, held.instance, None)))
        for key in list(self._apps):
            self._settle(key, now)

    # Decisions

    def _decisions(self, ledger: AppLedger, now: float) -> Decisions:
        partial = bool(self._silent)
        return Decisions(ledger, now, partial=partial, place=self._place, new_id=self._new_id)

    def _settle(self, key: AppName, now: float) -> None:
        ledger = self._ledger(key)
        self._perform(ledger, self._decisions(ledger, now), now)

    def _perform(self, ledger: AppLedger, decisions: Decisions, now: float) -> None:
        """Decide what is left to decide, and when to look again."""
        decisions.settle()
        self._out += decisions.out
        empty = not (ledger.instances or ledger.away or ledger.floor or ledger.is_early)
        if ledger.app is None and empty:
            self._apps.pop(ledger.key, None)
            return
        rests_until = self._rests_until(ledger, now)
        if rests_until is not None and rests_until <= now:
            del self._apps[ledger.key]
            self._proven[ledger.key] = ledger.proven
            return
        moments = (*decisions.moments(), *((rests_until,) if rests_until is not None else ()))
        due = min((at for at in moments if at > now), default=None)
        if due is not None and (ledger.due is None or due < ledger.due):
            ledger.due = due
            heapq.heappush(self._timers, (due, ledger.key))

    def _rests_until(self, ledger: AppLedger, now: float) -> float | None:
        """When it will be forgotten, if it stays at rest; None while it is not, or may not be."""
        if self._silent or not ledger.at_rest():
            ledger.rests_since = None
            return None
        if ledger.rests_since is None:
            ledger.rests_since = now
        return ledger.rests_since + REST_S

    def _run_due(self, now: float) -> None:
        """Look again at the apps whose time has come. A later moment than planned is found out
        then; an earlier one makes the entry planned before it outdated."""
        while self._timers and self._timers[0][0] <= now:
            at, key = heapq.heappop(self._timers)
            ledger = self._apps.get(key)
            if ledger is not None and ledger.due == at:
                ledger.due = None
                self._settle(key, now)
        if len(self._timers) > 2 * len(self._apps) + SPARE_TIMERS:
            planned = ((ledger.due, key) for key, ledger in self._apps.items())
            self._timers = [(due, key) for due, key in planned if due is not None]
            heapq.heapify(self._timers)
