"""A router for gateways under test: it leads where it is told, and keeps account of its slots."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from dataclasses import dataclass, field

from tabane.errors import NotFound, TabaneError
from tabane.gateway.api import HTTP, Route, Slot, TcpRoute
from tabane.model import AppName


@dataclass(eq=False)
class FakeSlot:
    """Counts what is done to it."""

    app: FakeApp
    host: str
    port: int
    pool: str
    headers: tuple[tuple[bytes, bytes], ...] = ()
    protocol: str = HTTP
    first_bytes: int = 0
    releases: int = 0
    failures: list[str] = field(default_factory=list)
    broke_off: list[str] = field(default_factory=list)
    """Those of the failures after which the app could be reached."""

    def target(self, port: int) -> int | None:
        return None if port in self.app.lacks else self.port

    def reached(self) -> None:
        assert self.releases == 0, "reached of a released slot"

    def first_byte(self) -> None:
        assert self.releases == 0, "first_byte of a released slot"
        self.first_bytes += 1

    def failed(self, reason: str, *, reached: bool = False) -> None:
        assert self.releases == 0, "failed of a released slot"
        self.failures.append(reason)
        if reached:
            self.broke_off.append(reason)

    def release(self) -> None:
        self.releases += 1
        if self.releases == 1:
            self.app.on_release(self)


class FakeApp:
    """One app: its slots lead to `targets` in turn, `concurrency` at a time.

    `cold` lets `acquire` wait (until it is set to False), `error` lets it fail.
    """

    def __init__(
        self,
        name: str,
        targets: list[tuple[str, int]],
        *,
        concurrency: int = 1_000,
        start_timeout_s: float = 10.0,
        response_timeout_s: float = 60.0,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        protocol: str = HTTP,
    ) -> None:
        self.route = Route(AppName(name), 1, start_timeout_s, response_timeout_s)
        self.targets: list[tuple[str, int]] = []
        self.lead_to(*targets)
        self.concurrency = concurrency
        self.headers = headers
        self.protocol = protocol
        self.error: TabaneError | None = None
        self.lacks: set[int] = set()
        """Public TCP ports that its instances are too old for."""
        self.slots: list[FakeSlot] = []
        self.held = 0
        self._cold = False
        self._waiters: deque[asyncio.Future[FakeSlot]] = deque()

    def lead_to(self, *targets: tuple[str, int]) -> None:
        """From now on slots lead to these addresses in turn."""
        self.targets = list(targets)
        self._next = itertools.cycle(range(len(targets)))

    @property
    def waiting(self) -> int:
        return sum(1 for waiter in self._waiters if not waiter.done())

    @property
    def cold(self) -> bool:
        return self._cold

    @cold.setter
    def cold(self, cold: bool) -> None:
        self._cold = cold
        self._serve_waiters()

    def take(self) -> FakeSlot | None:
        if self._cold or self.error is not None or self.held >= self.concurrency:
            return None
        number = next(self._next)
        host, port = self.targets[number]
        pool = f"{self.route.app}#{number}"
        slot = FakeSlot(self, host, port, pool, self.headers, self.protocol)
        self.slots.append(slot)
        self.held += 1
        return slot

    async def wait(self) -> FakeSlot:
        if self.error is not None:
            raise self.error
        slot = self.take()
        if slot is not None:
            return slot
        waiter: asyncio.Future[FakeSlot] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                waiter.result().release()
            raise

    def on_release(self, slot: FakeSlot) -> None:
        self.held -= 1
        self._serve_waiters()

    def _serve_waiters(self) -> None:
        while self._waiters:
            if not self._waiters[0].done():
                slot = self.take()
                if slot is None:
                    return
                self._waiters[0].set_result(slot)
            self._waiters.popleft()


class FakeRouter:
    """Routes by host name, and `ports` by public TCP port; `named` are the slots another gateway
    may name, by generation."""

    def __init__(self) -> None:
        self.apps: dict[str, FakeApp] = {}
        self.ports: dict[int, TcpRoute] = {}
        self.named: dict[bytes, FakeApp | TabaneError] = {}
        self.gone: frozenset[str] = frozenset()
        self.asked: list[tuple[str, str]] = []

    def add(self, host: str, app: FakeApp) -> FakeApp:
        self.apps[host] = app
        return app

    @property
    def held(self) -> int:
        return sum(app.held for app in self.apps.values())

    @property
    def slots(self) -> list[FakeSlot]:
        return [slot for app in self.apps.values() for slot in app.slots]

    def _app(self, route: Route) -> FakeApp:
        return next(app for app in self.apps.values() if app.route is route)

    def tcp_route(self, port: int) -> TcpRoute | None:
        return self.ports.get(port)

    def route_caller(self, route: Route, peer: str, token: bytes) -> Route:
        return route

    def route(self, host: str, path: str) -> Route | None:
        self.asked.append((host, path))
        app = self.apps.get(host)
        return app.route if app is not None else None

    def acquire_nowait(self, route: Route) -> Slot | None:
        return self._app(route).take()

    async def acquire(self, route: Route) -> Slot:
        return await self._app(route).wait()

    def accept_forward(self, headers: dict[bytes, bytes]) -> Slot | Route:
        named = self.named.get(headers.get(b"tabane-generation", b""))
        if isinstance(named, TabaneError):
            raise named
        if named is not None:
            slot = named.take()
            assert slot is not None
            return slot
        app = next(
            (a for a in self.apps.values() if a.route.app.encode() == headers.get(b"tabane-app")),
            None,
        )
        if app is None:
            raise NotFound("the other gateway named neither a generation nor an app of ours")
        return app.route

    def pools_gone(self) -> frozenset[str]:
        return self.gone
