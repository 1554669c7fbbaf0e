"""An app's books at its home: who waits, which instances there are, who holds which slots."""

from __future__ import annotations

from dataclasses import dataclass, field

from tabane.gateway.messages import Grant, StartTrace
from tabane.model import App, AppName, Instance, InstanceId, NodeName, State

NEVER = float("-inf")


@dataclass(slots=True)
class Holding:
    """One instance and the slots of it that gateways hold."""

    id: InstanceId
    node: NodeName
    revision: int = 0
    state: State = State.STARTING
    instance: Instance | None = None
    granted: dict[str, int] = field(default_factory=dict)
    """Slots by gateway; one that holds none is not in it."""
    born: float = 0.0
    """When it became ready."""
    last_used: float = NEVER
    asked_at: float = NEVER
    """When gateways were asked whether it is idle and have not said no since."""
    draining: str = ""
    """Why, while it drains."""
    drain_until: float = 0.0
    suspect_until: float = NEVER
    ended: bool = False
    trace: StartTrace | None = None
    """What its start cost, while those who waited for it have not been told."""

    @property
    def used(self) -> int:
        return sum(self.granted.values())

    def became_ready(self, instance: Instance, trace: StartTrace | None, now: float) -> None:
        self.state, self.instance, self.revision = State.READY, instance, instance.revision
        self.born, self.last_used, self.trace = now, now, trace

    def give(self, gateway: str, slots: int) -> None:
        self.granted[gateway] = self.granted.get(gateway, 0) + slots

    def give_back(self, gateway: str, slots: int, last_used: float) -> None:
        left = self.granted.get(gateway, 0) - slots
        if left > 0:
            self.granted[gateway] = left
        else:
            self.granted.pop(gateway, None)
        self.used_at(last_used)

    def used_at(self, when: float) -> None:
        self.last_used = max(self.last_used, when)
        self.asked_at = NEVER


@dataclass(slots=True)
class Waiting:
    """Sessions of one gateway that had no slot when it last said so."""

    sessions: int
    granted_seen: int
    since: float


@dataclass(slots=True)
class AppLedger:
    key: AppName
    app: App | None = None
    floor: int = 0
    instances: dict[InstanceId, Holding] = field(default_factory=dict)
    demands: dict[str, Waiting] = field(default_factory=dict)
    granted: dict[str, int] = field(default_factory=dict)
    """Slots ever granted, by gateway."""
    failures: int = 0
    blocked_until: float = 0.0
    reason: str = ""
    """Why the last start failed."""
    reclaiming: set[tuple[str, InstanceId]] = field(default_factory=set)
    reclaimed_at: float = NEVER
    due: float | None = None

    @property
    def current(self) -> App:
        assert self.app is not None
        return self.app

    @property
    def revision(self) -> int:
        return self.app.revision if self.app is not None else 0

    def serving(self) -> list[Holding]:
        """Ready and not draining, of any revision."""
        return [h for h in self.instances.values() if h.state is State.READY and not h.draining]

    def starting(self) -> list[Holding]:
        return [h for h in self.instances.values() if h.state is State.STARTING]

    def draining(self) -> list[Holding]:
        return [h for h in self.instances.values() if h.state is State.READY and h.draining]

    def set_demand(self, gateway: str, sessions: int, granted_seen: int, now: float) -> None:
        before = self.demands.get(gateway)
        if not sessions:
            self.demands.pop(gateway, None)
        elif before is None:
            self.demands[gateway] = Waiting(sessions, granted_seen, now)
        else:
            before.sessions, before.granted_seen = sessions, granted_seen

    def waiting(self, gateway: str) -> int:
        """Sessions there that no grant is on its way to."""
        demand = self.demands.get(gateway)
        if demand is None:
            return 0
        return max(0, demand.sessions - (self.granted.get(gateway, 0) - demand.granted_seen))

    def waiting_gateways(self) -> list[str]:
        """Those with waiting sessions, the longest waiting first."""
        names = [name for name in self.demands if self.waiting(name)]
        return sorted(names, key=lambda name: self.demands[name].since)

    def total_waiting(self) -> int:
        return sum(self.waiting(gateway) for gateway in self.demands)

    def grant(self, gateway: str, holding: Holding, slots: int) -> Grant:
        """Enter a grant in the books and word it."""
        instance = holding.instance
        assert instance is not None and self.current.port is not None
        holding.give(gateway, slots)
        self.granted[gateway] = self.granted.get(gateway, 0) + slots
        return Grant(
            app=self.key,
            revision=instance.revision,
            generation=instance.generation,
            node=instance.node,
            address=instance.address,
            port=self.current.port,
            slots=slots,
            granted=self.granted[gateway],
            trace=holding.trace,
        )

    def drop_gateway(self, gateway: str) -> None:
        """Forget all that a gateway held and wanted."""
        self.demands.pop(gateway, None)
        self.granted.pop(gateway, None)
        self.reclaiming = {entry for entry in self.reclaiming if entry[0] != gateway}
        for holding in self.instances.values():
            holding.granted.pop(gateway, None)
