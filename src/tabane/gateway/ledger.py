"""An app's books at its home: who waits, which instances there are, who holds which slots."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tabane.gateway.lowering import Lowering
from tabane.gateway.messages import Demand, Grant, Refuse, StartTrace
from tabane.gateway.setbacks import HEALTHY_S, NEVER, Setbacks
from tabane.model import App, AppName, Instance, InstanceId, NodeName, Reactive, State

DRAINABLE = (State.READY, State.FROZEN, State.CHECKPOINTING)


@dataclass(slots=True)
class Holding:
    """One instance and the slots of it that gateways hold.

    Its `state` is `starting`, `ready`, `frozen` (it was told to freeze), `checkpointing` (it is
    being put away, or was found being saved), `stopping`, `absent` (it ended, its address is still
    kept) or `unknown` (a gateway holds slots of it, no node has told of it yet).
    """

    id: InstanceId
    node: NodeName
    state: State
    app: App | None = None
    """What it runs: its own revision. None while that is not known here; it gets no sessions."""
    revision: int = 0
    instance: Instance | None = None
    granted: dict[str, int] = field(default_factory=dict)
    """Slots by gateway; one that holds none is not in it."""
    asked: set[str] = field(default_factory=set)
    """Gateways that were asked for slots and have not answered."""
    owing: set[str] = field(default_factory=set)
    """Gateways that were asked because others wait, and have given nothing back since."""
    doubtful: bool = False
    """It was found, and some gateway may hold slots of it that are not in `granted`."""
    began: float = 0.0
    """When it was told to start, or was found."""
    doing: str = ""
    """What its start is at, if that takes long."""
    setbacks_before: int = 0
    """How many its app had had by then."""
    born: float = 0.0
    """When it became ready."""
    last_used: float = NEVER
    freezes: int = 0
    """The number of the latest order to freeze or to save it."""
    is_saving: bool = False
    """It was told to be saved, and has not said that it goes on; its state is `frozen`."""
    save_at: float = math.inf
    """From when on it may be told to."""
    away_at: float = NEVER
    """From when on it may be put away."""
    is_called: bool = False
    """While it is being put away: its node was told that sessions wait."""
    turned_at: float = NEVER
    """When it was last told to freeze, to be saved or to thaw."""
    asked_at: float = NEVER
    """When gateways were last asked whether it is idle."""
    lowering: Lowering | None = None
    """Its node wants it lower on the ladder."""
    draining: str = ""
    """Why, while it drains."""
    drain_until: float = 0.0
    suspect_until: float = NEVER
    """Others are preferred until then; and if it could not be `reached`, it gets no sessions."""
    reached: bool = True
    trace: StartTrace | None = None
    """What its start cost, while those who waited for it have not been told."""
    was_away: bool = False
    """It was put away, and goes on."""
    note: str = ""
    """Why it began, and none that was put away went on instead."""

    @property
    def used(self) -> int:
        return sum(self.granted.values())

    @property
    def can_freeze(self) -> bool:
        instance = self.instance
        return self.state is State.READY and instance is not None and instance.freezable

    @property
    def can_save(self) -> bool:
        return self.state is State.READY and self.save_at < math.inf

    @property
    def can_put_away(self) -> bool:
        instance, standing = self.instance, self.state in (State.READY, State.FROZEN)
        return standing and instance is not None and instance.puttable

    @property
    def drain_timeout_s(self) -> float:
        """Of its own revision's file, as far as that is known."""
        return (self.app.reactive if self.app is not None else Reactive()).drain_timeout_s

    @property
    def is_leaving(self) -> bool:
        return bool(self.draining) or self.state in (State.STOPPING, State.ABSENT)

    def takes_sessions(self, now: float) -> bool:
        return (
            self.app is not None
            and self.app.takes_sessions
            and not self.doubtful
            and (self.reached or now >= self.suspect_until)
        )

    def free(self, now: float) -> int:
        """Slots that may be granted now."""
        if self.app is None or not self.takes_sessions(now):
            return 0
        return max(0, self.app.reactive.concurrency - self.used)

    def give(self, gateway: str, slots: int, last_used: float) -> None:
        self.granted[gateway] = self.granted.get(gateway, 0) + slots
        self.last_used = max(self.last_used, last_used)

    def give_back(self, gateway: str, slots: int, last_used: float) -> None:
        left = self.granted.get(gateway, 0) - slots
        self.drop(gateway)
        if left > 0:
            self.granted[gateway] = left
        self.last_used = max(self.last_used, last_used)

    def drop(self, gateway: str) -> None:
        """The gateway holds nothing of it, and owes no answer."""
        self.granted.pop(gateway, None)
        self.asked.discard(gateway)
        self.owing.discard(gateway)


def proven_at(holding: Holding) -> float:
    """When it has been ready for so long that starts of its app work, by its checks, too."""
    checks_s = holding.app.health.verdict_s if holding.app is not None else 0.0
    return holding.born + HEALTHY_S + checks_s


@dataclass(slots=True)
class Away:
    """An instance that was saved as it was, and ended."""

    id: InstanceId
    node: NodeName
    revision: int
    since: float
    """When that was learnt."""
    last_used: float
    not_before: float = NEVER
    """It could not go on, and is left alone until then."""
    reason: str = ""


@dataclass(slots=True)
class Account:
    """What one gateway wants and what it was answered, in one epoch."""

    epoch: int
    answered: int
    """Its waiting sessions that got a slot or a refusal."""
    answered_seen: int = 0
    sessions: int = 0
    since: float = 0.0
    """When the first of them began to wait."""

    @property
    def waiting(self) -> int:
        """Sessions there that no answer is on its way to."""
        return max(0, self.sessions - (self.answered - self.answered_seen))


@dataclass(slots=True)
class AppLedger:
    key: AppName
    app: App | None = None
    floor: int = 0
    instances: dict[InstanceId, Holding] = field(default_factory=dict)
    away: dict[InstanceId, Away] = field(default_factory=dict)
    lost: str = ""
    """What became of one that was to go on, and has to be said yet."""
    accounts: dict[str, Account] = field(default_factory=dict)
    """By gateway."""
    setbacks: Setbacks = field(default_factory=Setbacks)
    unsaved: str = ""
    """Why there is no checkpoint of it, or why it was not used, lately; empty: nothing is wrong."""
    recalled_at: float = NEVER
    """When gateways were last asked for slots because others wait."""
    declined: dict[NodeName, tuple[float, str]] = field(default_factory=dict)
    """Nodes that did not take a start on: until when they are not asked again, and why."""
    proven: int = -1
    """The latest revision of which an instance was ready here."""
    short_since: float | None = None
    """Since when instances are missing, while they are."""
    crowded: bool = False
    """And no more than memory is missing for them."""
    rests_since: float | None = None
    """Since when it is `at_rest`, while it is."""
    due: float | None = None
    is_early: bool = False
    """This home has not heard of the app, and may be about to: nothing is said or done yet."""

    @property
    def current(self) -> App:
        assert self.app is not None
        return self.app

    @property
    def revision(self) -> int:
        return self.app.revision if self.app is not None else 0

    def holding(
        self, instance: InstanceId, node: NodeName, now: float, state: State = State.UNKNOWN
    ) -> Holding:
        """The books of an instance, opened if need be."""
        if instance not in self.instances:
            self._open(Holding(instance, node, state, began=now))
        return self.instances[instance]

    def declines(self, now: float) -> dict[NodeName, str]:
        """Why nodes are not to be asked now."""
        return {node: reason for node, (until, reason) in self.declined.items() if now < until}

    def add_start(self, instance: InstanceId, node: NodeName, now: float, note: str = "") -> None:
        app = self.current
        holding = Holding(instance, node, State.STARTING, app, app.revision, began=now, note=note)
        if (away := self.away.pop(instance, None)) is not None:
            holding.last_used = away.last_used
            holding.was_away = True
        self._open(holding)

    def put_away(self, holding: Holding, kept_after_s: float, reason: str, now: float) -> None:
        """It can go on from where it was saved, after so long."""
        last_used = holding.last_used if holding.last_used > NEVER else now
        kept = Away(holding.id, holding.node, holding.revision, now, last_used)
        if kept_after_s:
            kept.not_before, kept.reason = now + kept_after_s, reason
        self.away[holding.id] = kept

    def away_ones(self) -> list[Away]:
        """Of the current revision, those used last first."""
        found = [each for each in self.away.values() if each.revision == self.revision]
        return sorted(found, key=lambda away: -away.last_used)

    def going(self) -> list[Holding]:
        """Being put away: they end, or go on."""
        return [h for h in self.instances.values() if h.state is State.CHECKPOINTING]

    def _open(self, holding: Holding) -> None:
        holding.setbacks_before = self.setbacks.total
        self.instances[holding.id] = holding

    def set_app(self, app: App | None) -> None:
        """It is known what the app is now, or that it is gone."""
        self.app, self.is_early = app, False
        for holding in self.instances.values():
            if holding.app is None and holding.instance and holding.revision == self.revision:
                holding.app = app

    def set_instance(self, holding: Holding, instance: Instance) -> None:
        """A node told of it."""
        holding.instance, holding.node, holding.revision = (
            instance,
            instance.node,
            instance.revision,
        )
        if holding.app is None and instance.revision == self.revision:
            holding.app = self.app

    def serving(self) -> list[Holding]:
        """Ready and not draining, of any revision."""
        return [h for h in self.instances.values() if h.state is State.READY and not h.draining]

    def frozen(self) -> list[Holding]:
        """Frozen and not draining, those used last first."""
        found = [h for h in self.instances.values() if h.state is State.FROZEN and not h.draining]
        return sorted(found, key=lambda holding: -holding.last_used)

    def standing(self) -> list[Holding]:
        """Ready or frozen, and not draining."""
        return [*self.serving(), *self.frozen()]

    def has_any(self) -> bool:
        """Is an instance there, in whatever state before its end?"""
        return any(holding.state is not State.ABSENT for holding in self.instances.values())

    def at_rest(self) -> bool:
        """Whether nothing of it runs, is kept, waits, or is in the way: all else is learnt anew."""
        kept = self.instances or self.away or self.floor
        needed = kept or self.is_early or self.total_waiting()
        return not (needed or self.setbacks.count or self.unsaved)

    def serves_current(self) -> bool:
        """Is an instance of the current revision ready, or was it before it was frozen?"""
        return any(holding.revision == self.revision for holding in self.standing())

    def starts_current(self) -> bool:
        return any(holding.revision == self.revision for holding in self.starting())

    def rolls(self) -> bool:
        """Is the first of a new revision on its way, beside what it will replace?"""
        there = (*self.standing(), *self.starting())
        old = any(holding.revision != self.revision for holding in there)
        return old and self.starts_current() and not self.serves_current()

    def starting(self) -> list[Holding]:
        return [h for h in self.instances.values() if h.state is State.STARTING]

    def note_doing(self, instance: InstanceId, doing: str) -> None:
        if (holding := self.instances.get(instance)) is not None:
            holding.doing = doing

    def stopping(self) -> list[Holding]:
        return [h for h in self.instances.values() if h.state is State.STOPPING]

    def draining(self) -> list[Holding]:
        found = (h for h in self.instances.values() if h.state in DRAINABLE)
        return [holding for holding in found if holding.draining]

    def unconfirmed(self) -> list[Holding]:
        """Gateways say that there are these; no node has."""
        return [h for h in self.instances.values() if h.state is State.UNKNOWN and not h.draining]

    def on_demand(self, gateway: str, demand: Demand, now: float) -> None:
        """Enter what waits there; a new epoch begins with nothing on its way."""
        account = self.accounts.get(gateway)
        if account is None or account.epoch != demand.epoch:
            account = self.accounts[gateway] = Account(demand.epoch, demand.answered_seen)
        account.sessions, account.answered_seen = demand.waiting, demand.answered_seen
        account.since = now - demand.waited_s

    def waiting(self, gateway: str) -> int:
        account = self.accounts.get(gateway)
        return account.waiting if account is not None else 0

    def waiting_gateways(self) -> list[str]:
        """Those with waiting sessions, the longest waiting first."""
        names = [name for name, account in self.accounts.items() if account.waiting]
        return sorted(names, key=lambda name: self.accounts[name].since)

    def late_gateways(self, moment: float) -> list[str]:
        """Those with sessions that wait since then or longer."""
        return [name for name in self.waiting_gateways() if self.accounts[name].since <= moment]

    def total_waiting(self) -> int:
        return sum(account.waiting for account in self.accounts.values())

    def grant(self, gateway: str, holding: Holding, slots: int, now: float) -> Grant:
        """Enter a grant in the books and word it."""
        instance, app, account = holding.instance, holding.app, self.accounts[gateway]
        assert instance is not None and app is not None and app.takes_sessions
        holding.give(gateway, slots, now)
        account.answered += slots
        return Grant(
            app=self.key,
            revision=instance.revision,
            generation=instance.generation,
            node=instance.node,
            address=instance.address,
            port=app.port or 0,
            slots=slots,
            epoch=account.epoch,
            answered=account.answered,
            trace=holding.trace,
            protocol=app.protocol,
            tcp=tuple((each.port, each.target) for each in app.tcp),
        )

    def refuse(
        self, gateway: str, kind: str, reason: str, retry_after_s: float, waited_s: float = 0.0
    ) -> Refuse:
        """Enter a refusal of all who wait there, for at least `waited_s`, and word it."""
        account = self.accounts[gateway]
        sessions = account.waiting
        account.answered += sessions
        return Refuse(
            app=self.key,
            kind=kind,
            reason=reason,
            retry_after_s=retry_after_s,
            sessions=sessions,
            epoch=account.epoch,
            answered=account.answered,
            waited_s=waited_s,
        )

    def drop_gateway(self, gateway: str) -> None:
        """Forget all that a gateway held and wanted."""
        self.accounts.pop(gateway, None)
        for holding in self.instances.values():
            holding.drop(gateway)
