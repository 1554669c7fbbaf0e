"""Nothing passes a control port without a principal: an ASGI wrapper around the whole API.

On the unix socket the principal is the peer (`PeerProtocol` takes its credentials when it
connects). On TCP it is who holds the cluster's token. A foreign Host or Origin is refused before
that, so that no browser can be made to speak for its user.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tabane.api.problems import headers_of, status_of, to_body
from tabane.errors import Denied, TabaneError
from tabane.security.identity import Principal, check_bearer, check_origin, peer_principal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1", "tabane"})


class PeerProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, which also notes who is at the other end of a unix socket."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family.name == "AF_UNIX":
            self.app_state = self.app_state | {"peer": peer_principal(sock)}


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
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> Principal:
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        check_origin(headers, self._hosts)
        peer: Principal | None = scope["state"].get("peer")
        if peer is None:
            return check_bearer(headers.get("authorization"), self._token)
        if not peer.is_root:
            raise Denied(f"uid {peer.uid} may not control this cluster: ask its owner, or use sudo")
        return peer


async def refuse(send: Any, error: TabaneError) -> None:
    """Answer with an error, below any framework."""
    body = msgspec.json.encode(to_body(error))
    fields = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **headers_of(error),
    }
    headers = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status_of(error), "headers": headers})
    await send({"type": "http.response.body", "body": body})
