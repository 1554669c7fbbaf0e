"""Nothing passes a control port without a principal: an ASGI wrapper around the whole API.

On the unix socket the principal is the peer (`PeerProtocol` takes its credentials when it
connects). On TCP it is who holds the cluster's token, or who asked the node that passes the request
on with it. A foreign Host or Origin is refused before that, so that no browser can be made to speak
for its user.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tabane.api.problems import headers_of, status_of, to_body
from tabane.errors import Denied, TabaneError, UsageError
from tabane.security.identity import (
    Principal,
    check_bearer,
    check_origin,
    parse_principal,
    peer_principal,
)

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

log = logging.getLogger(__name__)

VIA, FOR = "tabane-via", "tabane-for"
"""Headers with the node that passed a request on, with the token, and for whom."""
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1", "tabane"})
HEAD_TIMEOUT_S = 10.0
"""From a connection's beginning, or a request's first byte, to the end of its head, as at the
gateways: nobody has said who is asking before that."""
FOR_EVERY_USER = "/v2/"
"""Where every user of the node may ask, as with ps and kill: k2i says and does what that user
may see and do."""
READING = ("GET", "HEAD")
MAX_HEAD_BYTES = 64 << 10
MAX_CONNECTIONS = 512
"""At a time, over TCP; at the local socket root is not counted."""
MAX_OF_ONE_USER = 64
"""At a time at the local socket, of a user who is not root: each is an open file of ours, and may
leave a request half said or an answer half read for ever."""
KEEP_ALIVE = {socket.TCP_KEEPIDLE: 15, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}
"""Seconds of silence until the other side is asked, between questions, and how many of them."""
TOO_MANY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"


class PeerProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, which also notes who is at the other end of a unix socket, and waits
    only so long for the head of a request."""

    peer: Principal | None = None
    _timer: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family.name == "AF_UNIX":
            self.peer = peer_principal(sock)
            self.app_state = self.app_state | {"peer": self.peer}
        elif sock is not None:
            keep_alive(sock)
        if self._is_one_too_many():
            transport.write(TOO_MANY)
            transport.close()
            return
        self._await_head()

    def _is_one_too_many(self) -> bool:
        if self.peer is None:
            return len(self.connections) > MAX_CONNECTIONS
        if self.peer.is_root:
            return False
        peers = (getattr(other, "peer", None) for other in self.connections)
        uids = [peer.uid for peer in peers if peer is not None]
        return uids.count(self.peer.uid) > MAX_OF_ONE_USER

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or has a longer URL than any request of ours, as we refuse the rest."""
        problem = f"this is no HTTP request, or its URL is longer than {MAX_HEAD_BYTES} bytes"
        body = msgspec.json.encode(to_body(UsageError(problem)))
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(body), body)
        )
        self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def keep_alive(sock: socket.socket) -> None:
    """Have a connection over TCP end when the other machine is gone without a word: what runs for
    it would go on for ever."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEP_ALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


class Guard:
    """Puts the `Principal` into `scope["state"]["principal"]`, or answers 401 or 403."""

    def __init__(self, app: ASGIApp, token: str, hosts: frozenset[str]) -> None:
        self._app = app
        self._token = token
        self._hosts = hosts | LOCAL_HOSTS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            scope.setdefault("state", {})["principal"] = self._admit(scope)
        except TabaneError as error:
            await refuse(send, error)
            return
        try:
            await self._app(scope, receive, send)
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])

    def _admit(self, scope: Scope) -> Principal:
        headers = read_headers(scope)
        check_origin(headers, self._hosts)
        peer: Principal | None = scope["state"].get("peer")
        if peer is None:
            bearer = check_bearer(headers.get("authorization"), self._token)
            via = headers.get(VIA, "")
            return parse_principal(headers.get(FOR, ""), via) if via else bearer
        if not peer.is_root and not scope["path"].startswith(FOR_EVERY_USER):
            verb = "see" if scope["method"] in READING else "change"
            problem = f"uid {peer.uid} may not {verb} this, which is for root: use sudo"
            raise Denied(f"{problem} (processes are for every user: ps, top, kill)")
        return peer


def read_headers(scope: Scope) -> dict[str, str]:
    """By name. What is given twice stands there with a comma between (RFC 9110, 5.3), so that no
    Host hides behind another."""
    found: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


async def refuse(send: Any, error: TabaneError) -> None:
    """Answer with an error, below any framework, and close: what follows is not read."""
    body = msgspec.json.encode(to_body(error))
    fields = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **headers_of(error),
    }
    headers = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status_of(error), "headers": headers})
    await send({"type": "http.response.body", "body": body})
