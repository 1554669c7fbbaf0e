"""The slots that a `GatewayRouter` gives to sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tabane.gateway.api import Place

if TYPE_CHECKING:
    from tabane.gateway.grants import Lease
    from tabane.gateway.router import GatewayRouter


class LeasedSlot:
    """A slot that this gateway was granted, and had free when its session came."""

    __slots__ = ("_lease", "_router", "headers", "host", "pool", "port", "protocol")

    def __init__(self, router: GatewayRouter, lease: Lease, place: Place) -> None:
        self.host, self.port, self.pool, self.protocol, self.headers = place
        self._router: GatewayRouter | None = router
        self._lease = lease

    def target(self, port: int) -> int | None:
        grant = self._lease.grant
        return dict(grant.tcp).get(port) if grant is not None else None

    def reached(self) -> None:
        """Nobody waited, so there is no record."""

    def first_byte(self) -> None:
        """The same."""

    def failed(self, reason: str, *, reached: bool = False) -> None:
        if self._router is not None:
            self._router.broken(self._lease, reason, reached=reached)

    def release(self) -> None:
        router, self._router = self._router, None
        if router is not None:
            router.give_back(self._lease)


class AwaitedSlot(LeasedSlot):
    """One that its session had to wait for, from the moment `began` on."""

    __slots__ = ("_began", "_granted", "_problem", "_reached")

    def __init__(self, router: GatewayRouter, lease: Lease, place: Place, began: float) -> None:
        super().__init__(router, lease, place)
        self._began: float | None = began
        self._granted = router.now()
        self._reached: float | None = None
        self._problem = "it ended before the first byte of an answer"

    def first_byte(self) -> None:
        if self._began is not None and self._router is not None:
            self._router.woke(self._lease, self._began, self._granted)
            self._began = None

    def reached(self) -> None:
        if self._router is not None:
            self._reached = self._router.now()

    def failed(self, reason: str, *, reached: bool = False) -> None:
        self._problem, self._reached = reason, None
        super().failed(reason, reached=reached)

    def release(self) -> None:
        if self._began is not None and self._router is not None:
            lease = self._lease
            if self._reached is not None:
                self._router.woke(lease, self._began, self._granted, self._reached)
            else:
                self._router.unwoken(lease.app, lease.revision, self._began, self._problem, lease)
        super().release()


class ForwardedSlot:
    """A place that another gateway accounts for."""

    __slots__ = ("headers", "host", "pool", "port", "protocol")

    def __init__(self, place: Place) -> None:
        self.host, self.port, self.pool, self.protocol, self.headers = place

    def target(self, port: int) -> int | None:
        return port

    def reached(self) -> None:
        """The gateway that woke the app writes the wake record."""

    def first_byte(self) -> None:
        """The same."""

    def failed(self, reason: str, *, reached: bool = False) -> None:
        """The gateway that was granted the slot learns it from the answer."""

    def release(self) -> None:
        """Nothing is held here."""
