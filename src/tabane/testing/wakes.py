"""A data center in virtual time under the real decisions: a home (`Activation`), gateways
(`Grants`) and nodes that start, lose and end instances, joined by connections that keep order.

Everything can break at any moment. Messages are late by a random time; those on their way when a
connection breaks are lost from a random one on. `problems` gathers what must never be seen: see
the methods whose names begin with `check_`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tabane.errors import Busy
from tabane.gateway import activation
from tabane.gateway.activation import Activation
from tabane.gateway.decisions import PATIENCE_S
from tabane.gateway.grants import Grants, Lease
from tabane.gateway.messages import Grant, Refuse, Report, Revoke, ToGateway, ToHome
from tabane.lifecycle import STANDING
from tabane.model import App, AppName, InstanceId, NodeName, State
from tabane.scheduler.placement import Choice
from tabane.testing.world import Channel, Running, VirtualNode, World

GATEWAY_GRACE_S = 5.0
THAW_POLL_S = 0.01


@dataclass(eq=False)
class Session:
    """`outcome` is `waiting`, `running`, or how it ended."""

    app: AppName
    takes_s: float
    patience_s: float
    outcome: str = "waiting"
    reason: str = ""
    since: float = 0.0


class VirtualGateway:
    """Sessions come in here."""

    def __init__(self, dc: VirtualDatacenter, name: str) -> None:
        self.name = name
        self.up = True
        self.alive = True
        self._dc = dc
        self.waiting: set[Session] = set()
        self.grants: Grants[Session] = Grants(dc.world.random.getrandbits(32))
        self.inbox = Channel(dc.world, self._on_message, dc.late_s)
        self.to_home = Channel(dc.world, lambda m: dc.home.on_gateway(name, m), dc.late_s)

    def arrive(self, session: Session) -> None:
        world = self._dc.world
        session.since = world.now
        if not self.alive:
            session.outcome = "no gateway"
            return
        if (lease := self.grants.take(session.app, world.now)) is not None:
            self._serve(session, lease)
            return
        try:
            demand = self.grants.wait(session.app, session, self._dc.queue, world.now)
        except Busy:
            session.outcome = "queue full"
            return
        self.waiting.add(session)
        self._tell(demand)
        grants = self.grants
        world.after(session.patience_s, lambda: self._give_up(session, grants))

    def break_session(self, down_s: float) -> None:
        """Its hub session breaks; it serves on with what it holds, and comes back in time."""
        self._leave()
        self._dc.world.after(down_s, self._join)

    def die(self, down_s: float) -> None:
        """All its sessions are cut; another process of the same name follows."""
        self._leave()
        self.alive = False
        for session in (*self.waiting, *self._dc.forget_running(self)):
            session.outcome = "gateway died"
        self.waiting.clear()
        self.grants = Grants(self._dc.world.random.getrandbits(32))
        self._dc.world.after(down_s, self._join)

    def report(self) -> None:
        apps = self.grants.apps()
        self._tell(Report(self.grants.report(self._dc.world.now, apps)))

    def _leave(self) -> None:
        self.up = False
        self.to_home.cut()
        self.to_home.send("left")

    def _join(self) -> None:
        self.up = self.alive = True
        self.to_home.send("joined")
        self.report()

    def _give_up(self, session: Session, grants: Grants[Session]) -> None:
        if session.outcome == "waiting" and grants is self.grants:
            session.outcome = "timed out"
            self.waiting.remove(session)
            demand = self.grants.give_up(session.app, session, self._dc.world.now)
            if demand is None:
                self._dc.problem("a waiting session was in no queue")
            else:
                self._tell(demand)

    def _serve(self, session: Session, lease: Lease) -> None:
        if session.outcome != "waiting":
            self._dc.problem(f"a session was served that had {session.outcome}")
        session.outcome = "running"
        self.waiting.discard(session)
        self._dc.in_use[session] = (self, lease)
        works = self._dc.check_session(lease)
        grants = self.grants
        takes_s = session.takes_s if works else 0.001
        self._dc.world.after(takes_s, lambda: self._end(session, lease, grants, works))

    def _end(self, session: Session, lease: Lease, grants: Grants[Session], works: bool) -> None:
        self._dc.in_use.pop(session, None)
        if grants is not self.grants:
            return
        if works and self._dc.is_frozen(lease):  # it goes on when that is thawed
            self._dc.in_use[session] = (self, lease)
            self._dc.world.after(THAW_POLL_S, lambda: self._end(session, lease, grants, works))
            return
        session.outcome = "served" if works else "instance crashed"
        if not works:
            self._tell(*self.grants.broken(lease, "connection refused"))
        else:
            self._dc.used(lease)
        served, messages = self.grants.release(lease, self._dc.world.now)
        self._tell(*messages)
        for waiter, its in served:
            self._serve(waiter, its)

    def _on_message(self, message: object) -> None:
        if not self.up:
            return
        now = self._dc.world.now
        match message:
            case Grant():
                served, answers = self.grants.on_grant(message, now)
                for waiter, lease in served:
                    self._serve(waiter, lease)
                self._tell(*answers)
            case Revoke():
                self._tell(*self.grants.on_revoke(message, now))
            case Refuse():
                refused, answers = self.grants.on_refuse(message, now)
                for waiter in refused:
                    self._dc.check_refusal(waiter, message)
                    waiter.outcome, waiter.reason = "refused", message.reason
                    self.waiting.remove(waiter)
                self._tell(*answers)
            case _:
                self.report()

    def _tell(self, *messages: ToHome) -> None:
        if self.up:
            for message in messages:
                self.to_home.send(message)


class VirtualHome:
    """Performs what `Activation` decides, as `tabane.node.home` does."""

    def __init__(self, dc: VirtualDatacenter) -> None:
        self._dc = dc
        self.activation = self._new()
        self.up = True
        self._reported: set[str] = set()
        self._leaving: dict[str, object] = {}
        self.started: list[activation.Start] = []
        self.stopped: list[activation.Stop] = []
        self.frozen: list[activation.Freeze] = []
        self.saved: list[activation.Save] = []

    def restart(self, down_s: float) -> None:
        """All it knew is lost."""
        self.up = False
        self.activation = self._new()
        self._reported.clear()
        self._leaving.clear()
        for node in self._dc.nodes.values():
            node.inbox.cut()
        for gateway in self._dc.gateways.values():
            gateway.inbox.cut()
        self._dc.world.after(down_s, self._come_back)

    def _come_back(self) -> None:
        self.up = True
        for gateway in self._dc.gateways.values():
            self.on_gateway(gateway.name, "joined")
            if not gateway.up:
                self.on_gateway(gateway.name, "left")
            gateway.inbox.send("home is back")
        for node in self._dc.nodes.values():
            node.inbox.send(self._dc.world.now)
        for key, floor in self._dc.floors.items():
            if floor:
                self._know(key)

    def _new(self) -> Activation:
        return Activation(self._place, self._new_id)

    def _place(self, app: App, declined: Mapping[NodeName, str]) -> Choice:
        return Choice(self._dc.place(app), ())

    def _new_id(self) -> InstanceId:
        return InstanceId(f"i{next(self._dc.numbers)}")

    def on_event(self, event: object) -> None:
        if not self.up:
            return
        match event:
            case VirtualNode():
                event.inbox.send(self._dc.world.now)
                return
            case activation.InstanceReady(instance=instance):
                self._know(instance.app)
            case activation.InstanceEnded(app=key) | activation.InstanceAwake(app=key):
                self._know(key)
            case activation.NodeReport(instances=instances, saved=saved):
                for app in (*(one.app for one in instances), *(one.app for one in saved.away)):
                    self._know(app)
        assert isinstance(event, activation.Event)
        self._perform(self.activation.handle(event, self._dc.world.now))

    def about(self, key: AppName, event: activation.Event) -> None:
        if self.up:
            self._know(key)
            self.on_event(event)

    def on_gateway(self, name: str, message: object) -> None:
        if not self.up:
            return
        if message == "left":
            self._reported.discard(name)
            token = self._leaving[name] = object()
            self._dc.world.after(GATEWAY_GRACE_S, lambda: self._gone(name, token))
        elif message == "joined":
            self._leaving.pop(name, None)
            self.on_event(activation.GatewayJoined(name))
        else:
            self._hear(name, message)

    def _hear(self, name: str, message: object) -> None:
        assert isinstance(message, ToHome)
        if isinstance(message, Report):
            for report in message.apps:
                self._know(report.app)
        else:
            self._know(message.app)
        self._perform(self.activation.hear(name, message, self._dc.world.now))

    def _gone(self, name: str, token: object) -> None:
        if self._leaving.get(name) is token:
            del self._leaving[name]
            self.on_event(activation.GatewayGone(name))

    def _know(self, key: AppName) -> None:
        if self.activation.ledger(key) is None:
            now = self._dc.world.now
            app = self._dc.apps.get(key)
            self._perform(self.activation.handle(activation.AppChanged(key, app), now))
            floor = self._dc.floors.get(key, 0)
            if floor and app is not None:
                self._perform(self.activation.handle(activation.FloorChanged(key, floor), now))

    def _perform(self, instructions: list[activation.Instruction]) -> None:
        self._dc.check_settled(self.activation)
        for instruction in instructions:
            match instruction:
                case activation.Tell(gateway=name, message=message):
                    self._tell(name, message)
                case activation.Start(node=node):
                    self._dc.check_start(instruction)
                    self.started.append(instruction)
                    self._dc.nodes[node].inbox.send(instruction)
                case activation.Stop(node=node):
                    self._dc.check_stop(instruction)
                    self.stopped.append(instruction)
                    self._dc.nodes[node].inbox.send(instruction)
                case activation.Freeze(node=node):
                    self._dc.check_rest(instruction)
                    self.frozen.append(instruction)
                    self._dc.nodes[node].inbox.send(instruction)
                case activation.Save(node=node):
                    self._dc.check_rest(instruction)
                    self.saved.append(instruction)
                    self._dc.nodes[node].inbox.send(instruction)
                case activation.Thaw(node=node):
                    self._dc.nodes[node].inbox.send(instruction)
                case activation.Release(node=node):
                    self._dc.check_release(instruction)
                    self._dc.nodes[node].inbox.send(instruction)
        self._plan()

    def _tell(self, name: str, message: ToGateway) -> None:
        gateway = self._dc.gateways[name]
        if gateway.up:
            gateway.inbox.send(message)

    def _plan(self) -> None:
        due = self.activation.next_due()
        if due is not None:
            current = self.activation
            self._dc.world.after(due - self._dc.world.now, lambda: self._tick(current, due))

    def _tick(self, of: Activation, due: float) -> None:
        if self.up and of is self.activation and of.next_due() == due:
            self._perform(of.handle(activation.Tick(), self._dc.world.now))


@dataclass
class VirtualDatacenter:
    """`start_takes`, `fails`, `dies_after` and `place` may be replaced at any time."""

    world: World
    late_s: float = 0.002
    queue: int = 1_000
    stop_takes_s: float = 0.05
    apps: dict[AppName, App] = field(default_factory=dict)
    floors: dict[AppName, int] = field(default_factory=dict)
    nodes: dict[NodeName, VirtualNode] = field(default_factory=dict)
    gateways: dict[str, VirtualGateway] = field(default_factory=dict)
    in_use: dict[Session, tuple[VirtualGateway, Lease]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    start_takes: Callable[[App], float] = lambda app: 0.1
    fails: Callable[[App], bool] = lambda app: False
    dies_after: Callable[[App], float | None] = lambda app: None
    """How long after it was ready an instance crashes."""

    def __post_init__(self) -> None:
        self.numbers = itertools.count(1)
        self.home = VirtualHome(self)

    def add(self, nodes: int, gateways: int) -> None:
        for number in range(nodes):
            name = NodeName(f"tokyo/tokyo-{number}")
            self.nodes[name] = VirtualNode(self, name)
        for number in range(gateways):
            gateway = VirtualGateway(self, f"tokyo/tokyo-{number}/gateway-0")
            self.gateways[gateway.name] = gateway
            gateway._join()

    def store(self, app: App, floor: int = 0) -> None:
        """Deploy or scale it."""
        self.apps[app.key], self.floors[app.key] = app, floor
        if self.home.activation.ledger(app.key) is not None or floor:
            self.home.about(app.key, activation.AppChanged(app.key, app))
            self.home.about(app.key, activation.FloorChanged(app.key, floor))

    def remove(self, key: AppName) -> None:
        self.apps.pop(key, None)
        self.floors.pop(key, None)
        if self.home.activation.ledger(key) is not None:
            self.home.about(key, activation.AppChanged(key, None))

    def place(self, app: App) -> NodeName | None:
        return min(self.nodes, key=lambda node: len(self.nodes[node].running))

    def instances(self) -> list[Running]:
        return [running for node in self.nodes.values() for running in node.running.values()]

    def forget_running(self, gateway: VirtualGateway) -> list[Session]:
        """The sessions that run there."""
        running = [session for session, (at, _) in self.in_use.items() if at is gateway]
        for session in running:
            del self.in_use[session]
        return running

    def find(self, instance: InstanceId) -> Running | None:
        return next((r for r in self.instances() if r.instance == instance), None)

    def used(self, lease: Lease) -> None:
        if (running := self.find(lease.instance)) is not None:
            running.last_used = self.world.now

    def is_frozen(self, lease: Lease) -> bool:
        running = self.find(lease.instance)
        return running is not None and running.state in (State.FROZEN, State.CHECKPOINTING)

    def holders(self, instance: InstanceId) -> list[Lease]:
        return [
            lease
            for gateway in self.gateways.values()
            for lease in gateway.grants.leases()
            if lease.instance == instance and lease.slots
        ]

    # What must never be seen

    def problem(self, text: str) -> None:
        self.problems.append(f"{self.world.now:.4f}: {text}")

    def check_session(self, lease: Lease) -> bool:
        """A session was given this slot; False when its instance crashed."""
        running = self.find(lease.instance)
        if running is None:
            self.problem(f"a session was sent to {lease.instance}, which was released")
            return False
        if running.told_to_stop:
            self.problem(f"a session was sent to {lease.instance}: {running.told_to_stop}")
        if lease.app != running.app.key or lease.revision != running.app.revision:
            self.problem(f"a session of {lease.app} was sent to {running.app.key}")
        if lease.port != running.app.port:
            self.problem(f"a session was sent to port {lease.port} of {running.app.key}")
        used = Counter(its.instance for _, its in self.in_use.values())[lease.instance]
        if used > running.app.reactive.concurrency:
            self.problem(f"{used} sessions in {lease.instance} at once")
        self.used(lease)
        return running.state in STANDING

    def check_refusal(self, session: Session, refuse: Refuse) -> None:
        """It met a start that failed, or could not wait until the next."""
        limit_s = self.apps[session.app].reactive.start_timeout_s if session.app in self.apps else 0
        waited_s = self.world.now - session.since
        patience_s = min(PATIENCE_S, limit_s - waited_s)
        if refuse.kind == "paused" and refuse.retry_after_s < patience_s:
            self.problem(f"a session was refused after {waited_s} s: {refuse.reason}")

    def check_settled(self, decider: Activation) -> None:
        """Nothing is left to do now, and the next time to look is to come."""
        now = self.world.now
        again = decider.handle(activation.Tick(), now)
        if again:
            self.problem(f"a second look found more to do: {again}")
        due = decider.next_due()
        if due is not None and due <= now:
            self.problem("the next time to look is not in the future")

    def check_start(self, start: activation.Start) -> None:
        ledger = self.home.activation.ledger(start.app.key)
        assert ledger is not None and ledger.app is not None
        surge = 0 if ledger.serves_current() else 1
        count = len(ledger.starting()) + len(ledger.standing())
        if count > ledger.app.reactive.max + surge:
            self.problem(f"{count} instances of {ledger.key}, max is {ledger.app.reactive.max}")

    def check_stop(self, stop: activation.Stop) -> None:
        """Gateways hold nothing of what is stopped, unless it drained too long."""
        ledger = self.home.activation.ledger(stop.app)
        holding = ledger.instances.get(stop.instance) if ledger is not None else None
        timed_out = holding is not None and 0.0 < holding.drain_until <= self.world.now
        if not timed_out and self.holders(stop.instance):
            self.problem(f"{stop.instance} is stopped ({stop.reason}) while slots of it are held")

    def check_rest(self, freeze: activation.Freeze | activation.Save) -> None:
        """Gateways hold nothing of what is told to freeze, or to be saved."""
        if self.holders(freeze.instance):
            self.problem(f"{freeze.instance} is told to rest while slots of it are held")

    def check_freeze(self, running: Running) -> None:
        """Of what freezes, no session is answered: those that come now have it thawed."""
        lease_of = (lease for _, lease in self.in_use.values())
        old = [lease for lease in lease_of if lease.instance == running.instance]
        thawed = self.home.activation.ledger(running.app.key)
        holding = thawed.instances.get(running.instance) if thawed is not None else None
        if old and (holding is None or holding.state is State.FROZEN) and self.home.up:
            self.problem(f"{running.instance} freezes with {len(old)} sessions in it")

    def check_going(self, running: Running) -> None:
        """Of what is put away, no session is lost."""
        if any(lease.instance == running.instance for _, lease in self.in_use.values()):
            self.problem(f"{running.instance} is put away with sessions in it")

    def check_only(self, instance: InstanceId) -> None:
        """Of what goes on, there is no other."""
        if self.find(instance) is not None:
            self.problem(f"{instance} is started twice")

    def check_release(self, release: activation.Release) -> None:
        if self.holders(release.instance):
            self.problem(f"{release.instance} is released while slots of it are held")
