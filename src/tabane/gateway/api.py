"""The seam between a gateway's protocols (HTTP, TCP) and its slots.

A protocol asks the `Router` where a session belongs and for a slot there, forwards, and releases
the slot. It knows nothing of grants, homes or nodes; the router knows nothing of HTTP.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from tabane.model import AppName, Value

FORWARD_HEADERS = (b"tabane-token", b"tabane-generation", b"tabane-app", b"tabane-hops")
"""Spoken only between gateways; stripped from what clients send and from what apps get."""
HTTP, H2C = "http", "h2c"
REFUSED_HEADER = b"tabane-refused"
"""In a response between gateways: no byte of the request reached the app, take another slot. The
value is the reason in one word. Stripped from what apps answer."""


class Route(Value, frozen=True):
    """Where a host name (and path) leads, with the app's limits."""

    app: AppName
    revision: int
    start_timeout_s: float
    response_timeout_s: float
    hops: int = 0
    """Data centers it has been forwarded from; at most one."""
    by_caller: bool = False
    """Who calls decides which instances: ask `Router.route_caller`."""


class TcpRoute(Value, frozen=True):
    """Where a public TCP port leads; the rest as of `tabane.model.TcpPort`."""

    route: Route
    session_idle_s: float | None = None
    proxy_protocol: str = ""


class Place(NamedTuple):
    """Where sessions connect: see `Slot`."""

    host: str
    port: int
    pool: str
    protocol: str
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Slot(Protocol):
    """A session's place in one instance, held from `acquire` to `release`."""

    host: str
    port: int
    """Where to connect: the instance itself, or the gateway of the node that has it."""
    pool: str
    """Upstream connections may be kept and reused among slots with the same `pool` only: it names
    the instance's generation, so that a kept connection never outlives it."""
    headers: tuple[tuple[bytes, bytes], ...]
    """To be added to the forwarded request (for another gateway); empty for an instance."""
    protocol: str
    """What is spoken there: `HTTP` (HTTP/1.1) or `H2C` (HTTP/2 from the connection's beginning)."""

    def target(self, port: int) -> int | None:
        """For a session at the app's public TCP port: the port to connect to at the instance, or,
        where another gateway has to be told (`headers`), what it is told. None: the instance is of
        a revision without it."""

    def reached(self) -> None:
        """A session of TCP is connected there: it has woken the app, whether or not a byte comes
        back (then `first_byte`)."""

    def first_byte(self) -> None:
        """The response's first byte is here: ends the wake record, if this session woke the app."""

    def failed(self, reason: str, *, reached: bool = False) -> None:
        """The upstream could not be reached, or (`reached`) was, and broke off; `reason` for
        people. Then `release`."""

    def release(self) -> None:
        """Give the place back. Idempotent."""


class Router(Protocol):
    def route(self, host: str, path: str) -> Route | None:
        """`host` without port, lower case. None: no app has it."""

    def route_caller(self, route: Route, peer: str, token: bytes) -> Route:
        """Of a route that goes `by_caller`: where it leads for who comes from the address `peer`,
        and whose request has the field `tabane-token`."""

    def acquire_nowait(self, route: Route) -> Slot | None:
        """A slot that is free now, if any: the warm path, no await, no message."""

    async def acquire(self, route: Route) -> Slot:
        """Wait for a slot, waking the app if need be, at most `start_timeout_s`.

        Cancelling gives the place in the queue back. Raises `Busy` (queue full), `TimedOut`,
        `Unavailable` (the app does not start; the text says why), each with `retry_after_s`, or
        `NotFound` (the app is gone).
        """

    def accept_forward(self, headers: dict[bytes, bytes]) -> Slot | Route:
        """For the port between gateways: the slot of the generation that another gateway named, or
        the route when it left the choice to this data center (this gateway must then not forward to
        yet another data center). `headers` holds those of `FORWARD_HEADERS` that came.

        Raises `Unauthenticated`, `Stale` (the generation is not here any more), `NotFound`.
        """

    def pools_gone(self) -> frozenset[str]:
        """Pools whose kept connections must be closed now (asked once a second and on `kick`)."""


class TcpRouter(Protocol):
    """What of a router sessions of TCP need, as of `Router`."""

    def tcp_route(self, port: int) -> TcpRoute | None:
        """None: no app has this public port."""

    def route_caller(self, route: Route, peer: str, token: bytes) -> Route: ...

    def acquire_nowait(self, route: Route) -> Slot | None: ...

    async def acquire(self, route: Route) -> Slot: ...

    def accept_forward(self, headers: dict[bytes, bytes]) -> Slot | Route: ...
