"""Activation decides, for the apps whose home is here, what runs: plain functions without IO.

`Activation.handle(event, now)` takes what happened and returns what to do. Gateways say how many
sessions wait (`Demand`); free slots are granted, the first come first; when there are none, slots
that other gateways hold unused are asked back; only then are instances started, one for each
`concurrency` sessions, never above `max`. Grants are counted, so an instance is idle exactly when
no slot of it is held by anyone: it is then stopped without a doubt, and its address freed.

Failures before `ready` count: the first is tried again, after the second the waiting sessions are
refused with the reason, and a growing pause lets one trial through at a time.

A new revision first gets one ready instance; then those of the old one are drained.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

from tabane.gateway.ledger import AppLedger, Holding
from tabane.gateway.messages import (
    Broken,
    Demand,
    Refuse,
    Report,
    Returned,
    Revoke,
    StartTrace,
    StillUsed,
    ToGateway,
    ToHome,
)
from tabane.model import App, AppName, Instance, InstanceId, NodeName, State, Value

RETRY_S = 0.1
"""Pause before the second trial of an app whose first start failed."""
BACKOFF_FIRST_S = 0.5
BACKOFF_LAST_S = 30.0
HEALTHY_S = 10.0
"""An instance that ran this long and then died does not count as one more failed start."""
RECLAIM_S = 0.1
"""How long starts wait for other gateways' unused slots, and how rarely these are asked."""
SUSPECT_S = 1.0
"""An instance that a gateway could not reach gets no sessions for so long."""
DRAIN_TIMEOUT_S = 30.0
"""Sessions still open on a draining instance after this are cut."""


class AppChanged(Value, frozen=True):
    """The app as stored now, or None when it was removed."""

    key: AppName
    app: App | None


class FloorChanged(Value, frozen=True):
    """This data center's share of the app's `min`."""

    key: AppName
    floor: int


class InstanceReady(Value, frozen=True):
    instance: Instance
    trace: StartTrace | None = None


class InstanceEnded(Value, frozen=True):
    """It is gone, on purpose or not. `retry` False: a new start would end the same way at once."""

    app: AppName
    instance: InstanceId
    node: NodeName
    reason: str
    failed: bool
    retry: bool = True


class GatewayJoined(Value, frozen=True):
    """It is there, and will report. Until it has, nothing counts as idle."""

    gateway: str


class GatewayGone(Value, frozen=True):
    gateway: str


class StopAsked(Value, frozen=True):
    """A person wants this instance stopped (its sessions are drained first)."""

    app: AppName
    instance: InstanceId


class Tick(Value, frozen=True):
    pass


Event = (
    AppChanged
    | FloorChanged
    | InstanceReady
    | InstanceEnded
    | GatewayJoined
    | GatewayGone
    | StopAsked
    | Tick
)


class Start(Value, frozen=True):
    app: App
    instance: InstanceId
    node: NodeName


class Stop(Value, frozen=True):
    app: AppName
    instance: InstanceId
    node: NodeName
    reason: str


class Release(Value, frozen=True):
    """No gateway can reach the ended instance any more: its address may be used again."""

    app: AppName
    instance: InstanceId
    node: NodeName


class Tell(Value, frozen=True):
    gateway: str
    message: ToGateway


Instruction = Start | Stop | Release | Tell
Place = Callable[[App], NodeName | None]
"""Picks the node for one more instance; None when no node of this data center can run it."""


class Activation:
    """The home of some apps. `place` and `new_id` are given, so that decisions are repeatable."""

    def __init__(self, place: Place, new_id: Callable[[], InstanceId]) -> None:
        self._place = place
        self._new_id = new_id
        self._apps: dict[AppName, AppLedger] = {}
        self._silent: set[str] = set()
        """Gateways that have not reported yet, and so may hold slots nobody here knows of."""
        self._timers: list[tuple[float, AppName]] = []
        self._out: list[Instruction] = []

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """What follows from `event` at `now` (monotonic seconds)."""
        match event:
            case AppChanged(key=key):
                self._on_app(event, now)
            case FloorChanged(key=key, floor=floor):
                self._ledger(key).floor = floor
                self._settle(key, now)
            case InstanceReady():
                self._on_ready(event, now)
            case InstanceEnded(app=key):
                self._on_ended(event, now)
            case GatewayJoined(gateway=gateway):
                self._silent.add(gateway)
            case GatewayGone(gateway=gateway):
                self._on_gateway_gone(gateway, now)
            case StopAsked(app=key, instance=instance_id):
                self._drain(self._ledger(key), instance_id, now, "stopped by request")
                self._settle(key, now)
            case Tick():
                self._on_tick(now)
        return self._take()

    def hear(self, gateway: str, message: ToHome, now: float) -> list[Instruction]:
        """The same for what a gateway said."""
        match message:
            case Demand(app=key):
                self._ledger(key).set_demand(gateway, message.waiting, message.granted_seen, now)
                self._settle(key, now)
            case Returned(app=key):
                self._on_returned(gateway, message, now)
            case StillUsed(app=key):
                self._on_still_used(gateway, message, now)
            case Broken():
                self._on_broken(message, now)
            case Report():
                self._on_report(gateway, message, now)
        return self._take()

    def next_due(self) -> float | None:
        """When `Tick` has something to do; None when nothing is planned."""
        return self._timers[0][0] if self._timers else None

    def ledger(self, key: AppName) -> AppLedger | None:
        """For those who show it; not to be changed."""
        return self._apps.get(key)

    def apps(self) -> Iterable[AppName]:
        return tuple(self._apps)

    def forget(self, key: AppName) -> None:
        """Another node is this app's home now."""
        self._apps.pop(key, None)

    def _take(self) -> list[Instruction]:
        out, self._out = self._out, []
        return out

    def _ledger(self, key: AppName) -> AppLedger:
        ledger = self._apps.get(key)
        if ledger is None:
            ledger = self._apps[key] = AppLedger(key)
        return ledger

    # Events

    def _on_app(self, event: AppChanged, now: float) -> None:
        ledger = self._ledger(event.key)
        if event.app is not None and event.app.revision != ledger.revision:
            ledger.failures, ledger.blocked_until, ledger.reason = 0, 0.0, ""
        ledger.app = event.app
        self._settle(event.key, now)

    def _on_ready(self, event: InstanceReady, now: float) -> None:
        instance = event.instance
        ledger = self._ledger(instance.app)
        holding = ledger.instances.get(instance.id)
        if holding is None:
            holding = ledger.instances[instance.id] = Holding(instance.id, instance.node)
        if holding.state is State.STARTING:
            holding.became_ready(instance, event.trace, now)
            ledger.blocked_until = 0.0
        self._settle(instance.app, now)

    def _on_ended(self, event: InstanceEnded, now: float) -> None:
        ledger = self._ledger(event.app)
        holding = ledger.instances.setdefault(event.instance, Holding(event.instance, event.node))
        if event.failed:
            self._count_failure(ledger, holding, event, now)
        holding.ended = True
        holding.state = State.ABSENT
        for gateway in holding.granted:
            self._out.append(Tell(gateway, Revoke(event.app, event.instance, None)))
        self._settle(event.app, now)

    def _count_failure(
        self, ledger: AppLedger, holding: Holding, event: InstanceEnded, now: float
    ) -> None:
        if holding.state is not State.STARTING and now > holding.born + HEALTHY_S:
            ledger.failures = 0
        ledger.failures += 1
        ledger.reason = event.reason
        if ledger.failures == 1 and event.retry:
            ledger.blocked_until = now + RETRY_S
            return
        growth = min(ledger.failures, 10)
        ledger.blocked_until = now + min(BACKOFF_FIRST_S * 2 ** (growth - 1), BACKOFF_LAST_S)
        self._refuse(ledger, now)

    def _on_gateway_gone(self, gateway: str, now: float) -> None:
        self._silent.discard(gateway)
        for key, ledger in list(self._apps.items()):
            ledger.drop_gateway(gateway)
            self._settle(key, now)

    def _on_returned(self, gateway: str, message: Returned, now: float) -> None:
        ledger = self._ledger(message.app)
        ledger.reclaiming.discard((gateway, message.instance))
        holding = ledger.instances.get(message.instance)
        if holding is not None:
            holding.give_back(gateway, message.slots, now - message.unused_s)
        self._settle(message.app, now)

    def _on_still_used(self, gateway: str, message: StillUsed, now: float) -> None:
        ledger = self._ledger(message.app)
        ledger.reclaiming.discard((gateway, message.instance))
        holding = ledger.instances.get(message.instance)
        if holding is not None:
            holding.used_at(now - message.unused_s)
        self._settle(message.app, now)

    def _on_broken(self, message: Broken, now: float) -> None:
        holding = self._ledger(message.app).instances.get(message.instance)
        if holding is not None:
            holding.suspect_until = now + SUSPECT_S
        self._settle(message.app, now)

    def _on_report(self, gateway: str, report: Report, now: float) -> None:
        self._silent.discard(gateway)
        for ledger in self._apps.values():
            ledger.drop_gateway(gateway)
        for entry in report.apps:
            ledger = self._ledger(entry.app)
            ledger.granted[gateway] = entry.granted_seen
            ledger.set_demand(gateway, entry.waiting, entry.granted_seen, now)
            for held in entry.held:
                holding = ledger.instances.get(held.instance)
                if holding is None:
                    revoke = Revoke(entry.app, held.instance, None)
                    self._out.append(Tell(gateway, revoke))
                else:
                    holding.give(gateway, held.slots)
                    holding.used_at(now - held.unused_s)
        for key in list(self._apps):
            self._settle(key, now)

    def _on_tick(self, now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            _, key = heapq.heappop(self._timers)
            if (ledger := self._apps.get(key)) is not None:
                ledger.due = None
                self._settle(key, now)

    # Decisions

    def _settle(self, key: AppName, now: float) -> None:
        """Bring one app from how it is to how it should be, as far as it goes now."""
        ledger = self._ledger(key)
        self._release_ended(ledger)
        if ledger.app is None:
            self._wind_up(ledger, now)
        else:
            self._roll(ledger, now)
            self._recycle(ledger, now)
            self._grant(ledger, now)
            self._start(ledger, now)
            self._stop_idle(ledger, now)
        self._stop_drained(ledger, now)
        self._plan(ledger, now)
        if not ledger.instances and ledger.app is None and not ledger.demands:
            self._apps.pop(key, None)

    def _release_ended(self, ledger: AppLedger) -> None:
        for holding in list(ledger.instances.values()):
            if holding.ended and not holding.granted and not self._silent:
                del ledger.instances[holding.id]
                self._out.append(Release(ledger.key, holding.id, holding.node))

    def _wind_up(self, ledger: AppLedger, now: float) -> None:
        """The app was removed."""
        for gateway in ledger.waiting_gateways():
            gone = Refuse(ledger.key, "gone", f"the app {ledger.key} was removed", 0.0)
            self._out.append(Tell(gateway, gone))
        ledger.demands.clear()
        for holding in ledger.instances.values():
            self._drain(ledger, holding.id, now, "the app was removed")

    def _roll(self, ledger: AppLedger, now: float) -> None:
        """Drain what is of an old revision, once an instance of the new one is ready."""
        serving = ledger.serving()
        if any(h.revision == ledger.revision for h in serving):
            for holding in serving:
                if holding.revision != ledger.revision:
                    reason = f"replaced by revision {ledger.revision}"
                    self._drain(ledger, holding.id, now, reason)

    def _recycle(self, ledger: AppLedger, now: float) -> None:
        age_s = ledger.current.reactive.max_age_s
        if age_s is None:
            return
        for holding in ledger.serving():
            if now >= holding.born + age_s:
                self._drain(ledger, holding.id, now, f"older than its max_age of {age_s:g} s")

    def _grant(self, ledger: AppLedger, now: float) -> None:
        """Give free slots to who waits longest."""
        usable = [h for h in ledger.serving() if now >= h.suspect_until]
        for gateway in ledger.waiting_gateways():
            for holding in usable:
                wanted = ledger.waiting(gateway)
                free = ledger.current.reactive.concurrency - holding.used
                if (slots := min(wanted, free)) > 0:
                    self._out.append(Tell(gateway, ledger.grant(gateway, holding, slots)))
        for holding in usable:
            holding.trace = None

    def _start(self, ledger: AppLedger, now: float) -> None:
        missing = self._missing(ledger)
        if missing <= 0:
            return
        if now < ledger.blocked_until:
            if ledger.failures > 1:
                self._refuse(ledger, now)
            return
        if self._reclaim(ledger, now):
            return
        for _ in range(1 if ledger.failures else missing):
            node = self._place(ledger.current)
            if node is None:
                self._refuse_elsewhere(ledger)
                return
            holding = Holding(self._new_id(), node, ledger.revision)
            ledger.instances[holding.id] = holding
            self._out.append(Start(ledger.current, holding.id, node))

    def _missing(self, ledger: AppLedger) -> int:
        """How many instances to start now."""
        reactive = ledger.current.reactive
        starting = [h for h in ledger.starting() if h.revision == ledger.revision]
        serving = ledger.serving()
        if starting and ledger.failures:
            return 0
        if serving and all(h.revision != ledger.revision for h in serving):
            return 0 if starting else 1
        short = ledger.total_waiting() - len(starting) * reactive.concurrency
        for_sessions = -(-short // reactive.concurrency)
        for_floor = ledger.floor - len(starting) - len(serving)
        return min(max(for_sessions, for_floor), reactive.max - len(starting) - len(serving))

    def _reclaim(self, ledger: AppLedger, now: float) -> bool:
        """Ask unused slots back before starting more; True while answers are awaited."""
        if ledger.total_waiting() == 0:
            return False
        if ledger.reclaiming:
            if now < ledger.reclaimed_at + RECLAIM_S:
                return True
            ledger.reclaiming.clear()
        if now < ledger.reclaimed_at + RECLAIM_S:
            return False
        waiting = set(ledger.waiting_gateways())
        for holding in ledger.serving():
            for gateway in holding.granted.keys() - waiting:
                ledger.reclaiming.add((gateway, holding.id))
                self._out.append(Tell(gateway, Revoke(ledger.key, holding.id, 0.0)))
        if ledger.reclaiming:
            ledger.reclaimed_at = now
        return bool(ledger.reclaiming)

    def _stop_idle(self, ledger: AppLedger, now: float) -> None:
        """Stop what no session used for `stop_after`; where slots are held, ask first."""
        if self._silent:
            return
        after_s = ledger.current.reactive.stop_after_s
        serving = ledger.serving()
        spare = len(serving) - ledger.floor
        for holding in sorted(serving, key=lambda h: h.last_used)[: max(0, spare)]:
            if now < holding.last_used + after_s:
                continue
            if not holding.granted:
                self._stop(ledger, holding, f"idle for {after_s:g} s")
            elif now >= holding.asked_at + after_s:
                holding.asked_at = now
                revoke = Revoke(ledger.key, holding.id, after_s)
                self._out += [Tell(gateway, revoke) for gateway in holding.granted]

    def _drain(self, ledger: AppLedger, instance: InstanceId, now: float, reason: str) -> None:
        holding = ledger.instances.get(instance)
        if holding is None or holding.draining or holding.state is State.STOPPING:
            return
        if holding.state is State.STARTING:
            self._stop(ledger, holding, reason)
        elif holding.state is State.READY:
            holding.draining, holding.drain_until = reason, now + DRAIN_TIMEOUT_S
            revoke = Revoke(ledger.key, instance, None)
            self._out += [Tell(gateway, revoke) for gateway in holding.granted]

    def _stop_drained(self, ledger: AppLedger, now: float) -> None:
        for holding in ledger.draining() if not self._silent else ():
            if not holding.granted or now >= holding.drain_until:
                self._stop(ledger, holding, holding.draining)

    def _stop(self, ledger: AppLedger, holding: Holding, reason: str) -> None:
        holding.state = State.STOPPING
        self._out.append(Stop(ledger.key, holding.id, holding.node, reason))

    def _refuse(self, ledger: AppLedger, now: float) -> None:
        retry_after_s = max(0.0, ledger.blocked_until - now)
        refuse = Refuse(ledger.key, "broken", ledger.reason, retry_after_s)
        for gateway in ledger.waiting_gateways():
            self._out.append(Tell(gateway, refuse))
        ledger.demands.clear()

    def _refuse_elsewhere(self, ledger: AppLedger) -> None:
        reason = f"no node of this data center can run {ledger.key} now"
        for gateway in ledger.waiting_gateways():
            self._out.append(Tell(gateway, Refuse(ledger.key, "elsewhere", reason, 1.0)))
        ledger.demands.clear()

    # Timers

    def _plan(self, ledger: AppLedger, now: float) -> None:
        """Note when this app wants to be looked at again without anything happening."""
        due = min((at for at in self._moments(ledger) if at > now), default=None)
        if due is not None and (ledger.due is None or due < ledger.due):
            ledger.due = due
            heapq.heappush(self._timers, (due, ledger.key))

    def _moments(self, ledger: AppLedger) -> Iterable[float]:
        yield from (holding.drain_until for holding in ledger.draining())
        if ledger.app is None:
            return
        reactive = ledger.app.reactive
        yield ledger.blocked_until
        if ledger.reclaiming:
            yield ledger.reclaimed_at + RECLAIM_S
        for holding in ledger.serving():
            yield holding.suspect_until
            yield max(holding.last_used, holding.asked_at) + reactive.stop_after_s
            if reactive.max_age_s is not None:
                yield holding.born + reactive.max_age_s
