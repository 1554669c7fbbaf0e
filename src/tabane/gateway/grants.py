"""A gateway's books: the slots it was granted, and its sessions that wait for one. Without IO.

`Grants` is told what sessions do and what homes say; it answers with leases for sessions and with
messages for the home. A session waits with a *waiter*, any object of the caller's; it gets a
`Lease` when a slot is granted or freed here, first come, first served.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tabane.errors import Busy
from tabane.gateway.api import HTTP, Place
from tabane.gateway.messages import (
    AppReport,
    Broken,
    Demand,
    Grant,
    Held,
    Refuse,
    Returned,
    Revoke,
    StillUsed,
    ToHome,
)
from tabane.model import AppName, Generation, InstanceId, NodeName

REST_S = 60.0
"""Books without a slot or a session for so long may be closed: no answer is on its way to them."""
FEW_APPS = 256
"""Fewer books are not looked through for what can be closed."""

Waiter = TypeVar("Waiter", bound=Hashable)


@dataclass(slots=True, eq=False)
class Lease:
    """Slots of one instance that this gateway holds."""

    app: AppName
    revision: int
    generation: Generation
    node: NodeName
    address: str
    port: int
    home: str
    """Who granted the last of them."""
    slots: int = 0
    used: int = 0
    last_used: float = 0.0
    revoked: bool = False
    """Each slot goes back when its session ends."""
    recalled: bool = False
    """The next slot that comes free goes back."""
    grant: Grant | None = None
    """The latest grant, for its trace."""
    protocol: str = HTTP
    place: Place | None = None
    """Where its sessions connect, once the router found it."""
    follows: bool = False
    """The resources of its instance follow its sessions."""

    @property
    def instance(self) -> InstanceId:
        return self.generation.instance

    @property
    def free(self) -> int:
        return 0 if self.revoked else self.slots - self.used

    def unused_s(self, now: float) -> float:
        return 0.0 if self.used else max(0.0, now - self.last_used)


@dataclass(slots=True)
class AppGrants(Generic[Waiter]):
    epoch: int
    answered_seen: int = 0
    leases: dict[InstanceId, Lease] = field(default_factory=dict)
    queue: OrderedDict[Waiter, float] = field(default_factory=OrderedDict)
    """Who waits, since when."""
    ended: dict[InstanceId, Generation] = field(default_factory=dict)
    used_at: float = 0.0
    """When a session or a slot last came, or a slot went."""


Served = list[tuple[Waiter, Lease]]


class Grants(Generic[Waiter]):
    """See the module's text. Every method that changes the books returns what to tell the home.

    `epoch` is where this process counts its reports from: a random number, so that what was meant
    for a process before it, of the same name, is never taken for its own.
    """

    def __init__(self, epoch: int = 0) -> None:
        self.known = 0
        """The revision of the store that this gateway's routes are of."""
        self._epoch = epoch
        self._most = FEW_APPS
        self._apps: dict[AppName, AppGrants[Waiter]] = {}

    def take(self, app: AppName, now: float) -> Lease | None:
        """A slot that is free now: the warm path. Packs sessions onto few instances."""
        books = self._apps.get(app)
        if books is None or books.queue:
            return None
        for lease in books.leases.values():
            if lease.used < lease.slots and not lease.revoked:
                lease.used += 1
                lease.last_used = now
                return lease
        return None

    def wait(self, app: AppName, waiter: Waiter, limit: int, now: float) -> Demand:
        """Queue a session. Raises `Busy` when `limit` sessions wait here already."""
        books = self._books(app, now)
        if len(books.queue) >= limit:
            raise Busy(f"{len(books.queue)} sessions wait for {app} already, its queue is full")
        books.queue[waiter] = now
        return self._demand(app, books, now)

    def give_up(self, app: AppName, waiter: Waiter, now: float) -> Demand | None:
        """Take a session out of the queue; None when it is not in it."""
        books = self._apps.get(app)
        if books is None or books.queue.pop(waiter, None) is None:
            return None
        return self._demand(app, books, now)

    def release(self, lease: Lease, now: float) -> tuple[Served[Waiter], list[ToHome]]:
        """A session ended: its slot goes to the next in the queue, or back if it was asked for."""
        lease.used -= 1
        lease.last_used = now
        if lease.revoked or lease.recalled:
            lease.recalled = False
            return [], [self._return(lease, 1, now)]
        books = self._apps.get(lease.app)
        if books is None or not books.queue:
            return [], []
        served = self._serve(books, now)
        return served, [self._demand(lease.app, books, now)] if served else []

    def broken(self, lease: Lease, reason: str, *, reached: bool = False) -> list[ToHome]:
        """The instance could not be reached, or broke off: use it no more, and say so. Its home
        knows whether there is a better one."""
        if lease.revoked:
            return []
        broken = Broken(lease.app, lease.instance, reason, reached)
        return [broken, *self._revoke(lease, lease.last_used)]

    def on_grant(
        self, grant: Grant, now: float, home: str = ""
    ) -> tuple[Served[Waiter], list[ToHome]]:
        """More slots, from the agent `home`."""
        books = self._books(grant.app, now)
        if grant.epoch != books.epoch:
            return [], []
        books.answered_seen = grant.answered
        lease = books.leases.get(grant.instance)
        if lease is None or lease.generation != grant.generation:
            lease = Lease(
                grant.app,
                grant.revision,
                grant.generation,
                grant.node,
                grant.address,
                grant.port,
                home,
                last_used=now,
                protocol=grant.protocol,
            )
            books.leases[grant.instance] = lease
        books.ended.pop(grant.instance, None)
        lease.revoked = False
        lease.home = home
        lease.slots += grant.slots
        lease.grant = grant
        return self._serve(books, now), []

    def on_revoke(self, revoke: Revoke, now: float) -> list[ToHome]:
        books = self._apps.get(revoke.app)
        lease = books.leases.get(revoke.instance) if books is not None else None
        if lease is None:
            return []
        if revoke.unused_s is None:
            return [*self._revoke(lease, now)]
        unused_s = lease.unused_s(now)
        if lease.free and unused_s >= revoke.unused_s:
            return [self._return(lease, lease.free, now)]
        lease.recalled = lease.recalled or not revoke.unused_s
        return [StillUsed(revoke.app, revoke.instance, unused_s)]

    def cut_off(self, home: str, now: float) -> list[Returned]:
        """`home` could not be reached for so long that it may give what it granted to others: no
        further session gets a slot of it."""
        lost = [lease for lease in self.leases() if lease.home == home and not lease.revoked]
        return [message for lease in lost for message in self._revoke(lease, now)]

    def on_refuse(self, refuse: Refuse, now: float) -> tuple[list[Waiter], list[ToHome]]:
        """The sessions that are refused; they get the reason. Those that wait on are asked for
        again, as the home counts them as answered."""
        books = self._apps.get(refuse.app)
        if books is None or refuse.epoch != books.epoch:
            return [], []
        books.answered_seen = refuse.answered
        refused: list[Waiter] = []
        for waiter, since in itertools.islice(books.queue.items(), refuse.sessions):
            if now - since < refuse.waited_s:
                break
            refused.append(waiter)
        for waiter in refused:
            del books.queue[waiter]
        waits_on = books.queue and len(refused) < refuse.sessions
        return refused, [self._demand(refuse.app, books, now)] if waits_on else []

    def apps(self) -> frozenset[AppName]:
        """All that sessions came for lately, or hold slots of."""
        return frozenset(self._apps)

    def report(self, now: float, apps: frozenset[AppName]) -> tuple[AppReport, ...]:
        """How things stand with these apps, which begin a new epoch: answers that are still on
        their way to them are void. Revoked slots in use are still held."""
        self._epoch += 1
        reports = []
        for app, books in self._apps.items():
            if app not in apps:
                continue
            books.epoch, books.answered_seen = self._epoch, 0
            if books.queue or books.leases:
                held = tuple(
                    Held(lease.instance, lease.slots, lease.unused_s(now))
                    for lease in books.leases.values()
                )
                reports.append(AppReport(self._demand(app, books, now), held))
        return tuple(reports)

    def demand(self, app: AppName, now: float) -> Demand:
        """What waits now."""
        return self._demand(app, self._books(app, now), now)

    def ended_generation(self, app: AppName, instance: InstanceId) -> Generation | None:
        """The generation of an instance whose last slot was given back; told once."""
        books = self._apps.get(app)
        return books.ended.pop(instance, None) if books is not None else None

    def leases(self) -> list[Lease]:
        return [lease for books in self._apps.values() for lease in books.leases.values()]

    def _books(self, app: AppName, now: float) -> AppGrants[Waiter]:
        """Opened if need be."""
        books = self._apps.get(app)
        if books is None:
            if len(self._apps) >= self._most:
                self._close_resting(now)
            books = self._apps[app] = AppGrants(self._epoch)
        books.used_at = now
        return books

    def _close_resting(self, now: float) -> None:
        """So that their number follows that of the apps in use. Those that are opened later are of
        another epoch: homes may remember these."""
        for app, books in tuple(self._apps.items()):
            is_used = books.queue or books.leases or now - books.used_at < REST_S
            if not is_used:
                del self._apps[app]
        self._epoch += 1
        self._most = max(FEW_APPS, 2 * len(self._apps))

    def _demand(self, app: AppName, books: AppGrants[Waiter], now: float) -> Demand:
        since = next(iter(books.queue.values()), now)
        seen = books.answered_seen
        return Demand(app, len(books.queue), now - since, books.epoch, seen, self.known)

    def _serve(self, books: AppGrants[Waiter], now: float) -> Served[Waiter]:
        served: Served[Waiter] = []
        for lease in books.leases.values():
            while books.queue and lease.free > 0:
                lease.used += 1
                lease.last_used = now
                served.append((books.queue.popitem(last=False)[0], lease))
        return served

    def _revoke(self, lease: Lease, now: float) -> list[Returned]:
        free = lease.free
        lease.revoked = True
        return [self._return(lease, free, now)] if free else []

    def _return(self, lease: Lease, slots: int, now: float) -> Returned:
        lease.slots -= slots
        books = self._apps.get(lease.app)
        if books is not None:
            books.used_at = now
        if books is not None and not lease.slots and books.leases.get(lease.instance) is lease:
            del books.leases[lease.instance]
            books.ended[lease.instance] = lease.generation
        return Returned(lease.app, lease.instance, slots, lease.unused_s(now))
