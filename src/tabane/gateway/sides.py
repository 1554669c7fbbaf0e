"""What an exchange has on its two sides, whatever protocol they speak."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from tabane.gateway.forwarding import Extra, Provenance
from tabane.gateway.heads import RequestHead, ResponseHead
from tabane.gateway.replies import Reply

if TYPE_CHECKING:
    from tabane.gateway.exchange import Exchange
    from tabane.gateway.http import HttpGateway
    from tabane.gateway.http1 import Response
    from tabane.gateway.tunnel import Tunnel
    from tabane.gateway.upstream import Upstream

Trailers = Sequence[tuple[bytes, bytes]]


class ClientSide(Protocol):
    """Who asked: a connection of HTTP/1.1, or a stream of HTTP/2."""

    gateway: HttpGateway
    provenance: Provenance
    deadline: float
    """When `Exchange.on_deadline` is due."""
    is_full: bool
    """It takes no more of the answer for now."""
    reads: bool

    def balance(self) -> None:
        """Read on, or stop reading, as `Exchange.blocks_reading` says."""

    def has_moved(self) -> bool:
        """It has taken bytes since it became full, or since the last call."""

    def respond_interim(self, head: ResponseHead) -> None:
        """Pass on a 1xx response."""

    def respond(
        self,
        head: ResponseHead | None,
        pieces: list[bytes],
        is_end: bool,
        trailers: Trailers = (),
    ) -> None:
        """Pass on the final response: its head, if that is not out, more of its body, its end."""

    def open_tunnel(
        self, upstream: Upstream, from_app: bytes, on_end: Callable[[Tunnel], None]
    ) -> None:
        """The protocol changes, as the client asked: bytes pass both ways from now on, first those
        that came `from_app`; `on_end` is called when both connections are closed."""

    def on_done(self) -> None:
        """The response was whole; the exchange is over."""

    def reply(self, reply: Reply, exchange: Exchange | None, *, refused: bool = False) -> None:
        """Answer in the gateway's own name; the exchange is over."""

    def cut(self) -> None:
        """What it got is not the whole answer, and must not seem so; the exchange is over."""


class Peer(Protocol):
    """What an app's side serves: an exchange."""

    def on_response(self, reader: Response) -> None:
        """More of the response came."""

    def on_upstream_end(self, reader: Response, reason: str) -> None:
        """The app's side ended before the exchange did, and serves it no more."""

    def on_upstream_flow(self) -> None:
        """It takes bytes again, or (`is_full`) takes no more for now."""


class AppSide(Protocol):
    """Who answers: a connection of HTTP/1.1, or a stream of HTTP/2. Serves one exchange at a time,
    from `begin` to `end` or `abort`."""

    is_full: bool

    @property
    def reader(self) -> Response:
        """What came of the response."""

    @property
    def is_used(self) -> bool:
        """It is a kept connection, or ended with one, which says nothing of the instance."""

    @property
    def is_dead(self) -> bool:
        """Its instance has ended."""

    @property
    def was_refused(self) -> bool:
        """The app says that it did not look at the request."""

    @property
    def was_reset(self) -> bool:
        """The app gave up this exchange, and serves others."""

    def begin(
        self,
        peer: Peer,
        head: RequestHead,
        provenance: Provenance,
        extra: Extra,
        expects_continue: bool,
    ) -> None:
        """Serve `peer`, whose request has this head. That may go out with the first of the body."""

    def send(self, pieces: list[bytes], is_end: bool, trailers: Trailers = ()) -> None:
        """More of the request's body (perhaps none yet), or the last of it."""

    def read(self, on: bool) -> None:
        """Take more of the response, or let the app wait. Idempotent."""

    def has_moved(self) -> bool:
        """The app has taken bytes since it became full, or since the last call."""

    def end(self, now: float | None) -> None:
        """The response is whole: serve nobody. With `now`, the request was sent whole, too, and it
        may be kept for others."""

    def abort(self) -> None:
        """Give the exchange up. Idempotent."""
