"""A gateway's `Router`: host names to apps, sessions to slots, slots to where to connect.

It owns the routes and the books (`grants`), and is told by the gateway's process what agents and
homes say. Messages to an app's home go out in the order of the books' changes; what a session
waits for is asked once a loop turn, however many sessions came in it.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Iterable
from typing import Protocol

from msgspec.structs import replace

from tabane.clock import Clock
from tabane.errors import NotFound, Stale, TimedOut, Unauthenticated, Unavailable
from tabane.gateway.api import HTTP, Place, Route, Slot, TcpRoute
from tabane.gateway.grants import Grants, Lease
from tabane.gateway.messages import Grant, Refuse, Report, Revoke, StartTrace, ToGateway, ToHome
from tabane.gateway.routes import Routes, route_to
from tabane.gateway.slots import AwaitedSlot, ForwardedSlot, LeasedSlot
from tabane.gateway.uses import InUse, Uses
from tabane.model import (
    PHASES,
    App,
    AppName,
    InstanceId,
    NodeName,
    Trust,
    WakeRecord,
    app_of_cohort,
    name_cohort,
)

VERDICT_S = 1.0
"""A session waits this much longer than `start_timeout`, so that what the app's home knows, which
says why, comes first."""

CLIENT_LEFT = "its client left"
SAME_WAKE_S = 1.0
"""Sessions that fail so soon after another of the same app share its record: of a start that fails,
all who wait for it are refused at once."""
EPOCH_BITS = 48
"""Of the random number from which this process counts its reports."""

Target = tuple[str, int]


class Surroundings(Protocol):
    """What a router asks and tells the rest of its node."""

    node: NodeName
    datacenter: str
    name: str
    token: str

    def tell_home(self, app: AppName, message: ToHome) -> None: ...

    def gateway_of(self, node: NodeName) -> Target:
        """Where another node's gateway takes forwards."""

    def live_nodes(self) -> list[NodeName]: ...

    def on_wake(self, record: WakeRecord) -> None: ...

    def kick(self) -> None:
        """Pools are gone: kept connections to them must be closed now."""


class Local:
    """A ready instance of this node: what a forward from another gateway may reach. `trust`: whom
    it is for, if that matters."""

    __slots__ = ("address", "app", "trust")

    def __init__(self, app: AppName, address: str, trust: Trust | None = None) -> None:
        self.app = app
        self.address = address
        self.trust = trust


class GatewayRouter:
    """See the module's text; the methods of `Router` are documented there."""

    def __init__(self, surroundings: Surroundings, clock: Clock) -> None:
        self._around = surroundings
        self._clock = clock
        self._grants: Grants[asyncio.Future[Lease]] = Grants(secrets.randbits(EPOCH_BITS))
        self._routes = Routes()
        self._locals: dict[str, Local] = {}
        self._callers: dict[str, Local] = {}
        """This node's instances, by address."""
        self._dirty: set[AppName] = set()
        self._gone: set[str] = set()
        self._failed_at: dict[tuple[AppName, bool], float] = {}
        """Of clients that left (True), which says nothing of the app, and of all others."""
        self.uses: Uses | None = None
        """Told of sessions in instances whose resources follow them."""

    # What agents and homes say

    def set_routes(self, apps: Iterable[App], gone: Iterable[AppName], revision: int = 0) -> None:
        """Apps that are new or changed, and apps that are no more; as of that revision of the
        store, if it is told."""
        self._grants.known = revision or self._grants.known
        for app in apps:
            self._forget_failures(app.key)
            self._routes.put(app)
        for key in gone:
            self._forget_failures(key)
            self._routes.drop(key)

    def _forget_failures(self, key: AppName) -> None:
        for cohort in (key, *(name_cohort(key, trust) for trust in Trust)):
            for left in (True, False):
                self._failed_at.pop((cohort, left), None)

    def known_apps(self) -> frozenset[AppName]:
        return self._routes.known()

    def is_app(self, host: str) -> bool:
        """For the resolver."""
        return self._routes.is_app(host)

    def set_locals(self, instances: dict[str, Local], *, complete: bool) -> None:
        """The ready instances of this node, by generation: all of them, or more."""
        self._locals = instances if complete else self._locals | instances
        self._callers = {local.address: local for local in self._locals.values()}

    def hear(self, message: ToGateway, home: str = "") -> None:
        """An app's home, the agent of that name, said something."""
        now = self._clock.now()
        match message:
            case Grant():
                served, answers = self._grants.on_grant(message, now, home)
                self._serve(served)
            case Revoke():
                answers = self._grants.on_revoke(message, now)
                self._forget_pool(message.app, message.instance)
            case Refuse():
                refused, answers = self._grants.on_refuse(message, now)
                for waiter in refused:
                    if not waiter.done():
                        waiter.set_exception(_Refused(message))
        for answer in answers:
            self._around.tell_home(message.app, answer)

    def cut_off(self, home: str) -> None:
        """That agent could not be reached for `CUT_OFF_S`."""
        for message in self._grants.cut_off(home, self._clock.now()):
            self._around.tell_home(message.app, message)
            self._forget_pool(message.app, message.instance)

    def in_use(self, node: NodeName) -> tuple[InUse, ...]:
        """That node's instances of which slots are held here."""
        now = self._clock.now()
        held = (lease for lease in self._grants.leases() if lease.node == node)
        return tuple(InUse(one.instance, one.used, one.unused_s(now)) for one in held)

    def homes(self) -> frozenset[str]:
        """The agents that granted what is held here."""
        return frozenset(lease.home for lease in self._grants.leases())

    def report(self, apps: frozenset[AppName]) -> Report:
        """How things stand with these apps, for their home."""
        return Report(self._grants.report(self._clock.now(), apps))

    def apps_in_use(self) -> frozenset[AppName]:
        """All that sessions came for."""
        return self._grants.apps()

    # Router

    def route(self, host: str, path: str) -> Route | None:
        return self._routes.route(host)

    def tcp_route(self, port: int) -> TcpRoute | None:
        return self._routes.tcp_route(port)

    def route_caller(self, route: Route, peer: str, token: bytes) -> Route:
        trusted = hmac.compare_digest(token, self._around.token.encode())
        if not trusted and (local := self._callers.get(peer)) is not None:
            app, caller = self._routes.app(route.app), self._routes.app(local.app)
            is_of_owner = app is not None and caller is not None and caller.owner == app.owner
            trusted = is_of_owner and local.trust is not Trust.ANONYMOUS
        trust = Trust.TRUSTED if trusted else Trust.ANONYMOUS
        return replace(route, app=name_cohort(route.app, trust), by_caller=False)

    def acquire_nowait(self, route: Route) -> Slot | None:
        lease = self._grants.take(route.app, self._clock.now())
        if lease is None:
            return None
        slot = LeasedSlot(self, lease, lease.place or self._place(lease))
        if lease.follows and self.uses is not None:
            self.uses.note(lease)
        return slot

    async def acquire(self, route: Route) -> Slot:
        app = self._routes.app(route.app)
        if app is None:
            raise NotFound(f"the app {route.app} was removed")
        if not app.allows(self._around.datacenter):
            return self._elsewhere(
                route, app, f"{app.key} may not run in {self._around.datacenter}"
            )
        began = self._clock.now()
        waiter: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self._grants.wait(route.app, waiter, app.reactive.queue, began)
        self._ask(route.app)
        try:
            async with asyncio.timeout(route.start_timeout_s + VERDICT_S):
                lease = await waiter
        except _Refused as refused:
            if refused.refuse.kind == "late":
                raise self._late(route, app, began, refused.refuse.reason) from None
            if refused.refuse.kind == "broken":
                self.unwoken(route.app, app.revision, began, refused.refuse.reason)
            return self._on_refused(route, app, refused.refuse)
        except TimeoutError:
            self._leave_queue(route.app, waiter)
            raise self._late(route, app, began, "its home says nothing") from None
        except asyncio.CancelledError:
            self._leave_queue(route.app, waiter)
            self.unwoken(route.app, app.revision, began, CLIENT_LEFT)
            raise
        slot = AwaitedSlot(self, lease, self._place(lease), began)
        if lease.follows and self.uses is not None:
            self.uses.note(lease)
        return slot

    def _late(self, route: Route, app: App, began: float, why: str) -> TimedOut:
        """A session found no slot in time."""
        problem = f"{app.key} had no free slot within {route.start_timeout_s:g} s: {why}"
        self.unwoken(route.app, app.revision, began, problem)
        return TimedOut(problem, retry_after_s=1.0)

    def accept_forward(self, headers: dict[bytes, bytes]) -> Slot | Route:
        given = headers.get(b"tabane-token", b"")
        if not hmac.compare_digest(given, self._around.token.encode()):
            raise Unauthenticated("this port is for the cluster's own gateways")
        generation = headers.get(b"tabane-generation", b"").decode(errors="replace")
        if generation:
            local = self._locals.get(generation)
            app = self._routes.app(local.app) if local is not None else None
            if local is None or app is None or not app.takes_sessions:
                raise Stale(f"instance {generation} is not on {self._around.node} any more")
            return ForwardedSlot(Place(local.address, app.port or 0, generation, app.protocol))
        key = AppName(headers.get(b"tabane-app", b"").decode(errors="replace"))
        if (wanted := self._routes.app(key)) is None:
            raise NotFound(f"there is no app {key} in {self._around.datacenter}")
        return route_to(wanted, hops=1)

    def pools_gone(self) -> frozenset[str]:
        gone, self._gone = frozenset(self._gone), set()
        return gone

    # Slots

    def _place(self, lease: Lease) -> Place:
        """Where sessions with a slot of it connect: found once, for all of them."""
        if lease.place is None:
            app = self._routes.app(lease.app)
            lease.follows = app is not None and app.resources.follow
            generation = str(lease.generation)
            if lease.node == self._around.node:
                place = Place(lease.address, lease.port, generation, lease.protocol)
            else:
                place = self._beyond(lease.node, b"tabane-generation", generation, lease.protocol)
            lease.place = place
        return lease.place

    def _beyond(self, node: NodeName, header: bytes, meant: str, protocol: str) -> Place:
        """Another node's gateway, told what is meant there."""
        host, port = self._around.gateway_of(node)
        headers = ((b"tabane-token", self._around.token.encode()), (header, meant.encode()))
        pool = f"node {node}" if protocol == HTTP else f"node {node} {protocol}"
        return Place(host, port, pool, protocol, headers)

    def _elsewhere(self, route: Route, app: App, why: str) -> ForwardedSlot:
        """A data center that may run the app serves the session."""
        for node in self._around.live_nodes() if not route.hops else ():
            datacenter = node.partition("/")[0]
            if datacenter != self._around.datacenter and app.allows(datacenter):
                place = self._beyond(node, b"tabane-app", app.cohort, app.protocol)
                return ForwardedSlot(place)
        raise Unavailable(self._why_nowhere(app, why), retry_after_s=2.0)

    def _why_nowhere(self, app: App, why: str) -> str:
        if app.pinned_to not in ("", *self._around.live_nodes()):
            return f"the volumes of {app.key} are on {app.pinned_to}, which does not answer"
        return f"{why}, and no data center that can is reachable"

    def _on_refused(self, route: Route, app: App, refuse: Refuse) -> Slot:
        if refuse.kind == "elsewhere":
            return self._elsewhere(route, app, refuse.reason)
        if refuse.kind == "gone":
            raise NotFound(refuse.reason)
        raise Unavailable(
            f"{route.app} {refuse.reason}", retry_after_s=max(1.0, refuse.retry_after_s)
        )

    def give_back(self, lease: Lease) -> None:
        """A session with a slot ended."""
        served, messages = self._grants.release(lease, self._clock.now())
        if lease.follows and self.uses is not None:
            self.uses.note(lease)
        if served:
            self._serve(served)
        for message in messages:
            self._around.tell_home(lease.app, message)
        if not lease.slots:
            self._forget_pool(lease.app, lease.instance)

    def broken(self, lease: Lease, reason: str, *, reached: bool) -> None:
        """The instance of a slot could not be reached, or broke off."""
        for message in self._grants.broken(lease, reason, reached=reached):
            self._around.tell_home(lease.app, message)

    def woke(
        self, lease: Lease, began: float, granted: float, reached: float | None = None
    ) -> None:
        """A session that had to wait has its first byte; or it `reached` its instance at that
        moment and got none, as it may be where the client alone speaks."""
        grant = lease.grant
        assert grant is not None
        now = self._clock.now() if reached is None else reached
        option, phases = explain(grant.trace, granted - began, now - granted)
        app, trust = app_of_cohort(lease.app)
        record = WakeRecord(
            app=app,
            revision=lease.revision,
            instance=lease.instance,
            node=lease.node,
            gateway=self._around.name,
            option=option,
            at=self._clock.wall(),
            phases_us=phases,
            total_us=micros(now - began),
            trust=trust,
            note=grant.trace.note if grant.trace is not None and option != "wait" else "",
        )
        self._around.on_wake(record)

    def unwoken(
        self, app: AppName, revision: int, began: float, reason: str, lease: Lease | None = None
    ) -> None:
        """A session that had to wait has ended without its first byte."""
        now = self._clock.now()
        kind = app, reason == CLIENT_LEFT
        if kind in self._failed_at and now < self._failed_at[kind] + SAME_WAKE_S:
            return
        self._failed_at[kind] = now
        waited_us = micros(now - began)
        name, trust = app_of_cohort(app)
        record = WakeRecord(
            app=name,
            revision=revision,
            instance=lease.instance if lease is not None else InstanceId(""),
            node=lease.node if lease is not None else NodeName(""),
            gateway=self._around.name,
            option="failed",
            at=self._clock.wall(),
            phases_us=dict.fromkeys(PHASES, 0) | {"queue": waited_us},
            total_us=waited_us,
            outcome=reason,
            trust=trust,
        )
        self._around.on_wake(record)

    def now(self) -> float:
        return self._clock.now()

    def _serve(self, served: Iterable[tuple[asyncio.Future[Lease], Lease]]) -> None:
        for waiter, lease in served:
            if waiter.done():
                self.give_back(lease)
            else:
                waiter.set_result(lease)

    def _leave_queue(self, app: AppName, waiter: asyncio.Future[Lease]) -> None:
        """A session gave up; a slot that it was just given goes to the next."""
        if self._grants.give_up(app, waiter, self._clock.now()) is not None:
            self._ask(app)
        elif waiter.done() and not waiter.cancelled() and waiter.exception() is None:
            self.give_back(waiter.result())

    def _ask(self, app: AppName) -> None:
        if not self._dirty:
            asyncio.get_running_loop().call_soon(self._flush)
        self._dirty.add(app)

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, set()
        for app in dirty:
            self._around.tell_home(app, self._grants.demand(app, self._clock.now()))

    def _forget_pool(self, app: AppName, instance: InstanceId) -> None:
        generation = self._grants.ended_generation(app, instance)
        if generation is not None:
            self._gone.add(str(generation))
            self._around.kick()


class _Refused(Exception):
    def __init__(self, refuse: Refuse) -> None:
        super().__init__(refuse.reason)
        self.refuse = refuse


def explain(
    trace: StartTrace | None, waited_s: float, answered_s: float
) -> tuple[str, dict[str, int]]:
    """A session's wait in phases: with the start's own when it waited through all of it."""
    waited_us = micros(waited_s)
    phases = dict.fromkeys(PHASES, 0)
    option = "wait"
    if trace is not None and waited_us >= trace.total_us:
        option = trace.option
        phases |= trace.phases_us
        measured_us = sum(trace.phases_us.values())
        phases["ready"] = trace.total_us - measured_us
        phases["queue"] = waited_us - trace.total_us
    else:
        phases["queue"] = waited_us
    phases["first_byte"] = micros(answered_s)
    return option, phases


def micros(seconds: float) -> int:
    return round(seconds * 1_000_000)
