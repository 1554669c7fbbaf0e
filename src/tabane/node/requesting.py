"""A request of the cluster's own to an app, by the node's gateway: a session as any other."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

import httptools

from tabane.errors import Closed, ProtocolError, TimedOut, Unavailable
from tabane.gateway.routes import internal_names
from tabane.model import App
from tabane.node.config import HTTP_PORT

if TYPE_CHECKING:
    from tabane.node.agent import Agent

GRACE_S = 10.0
"""Beside what a start and an answer may take: for the gateway to say so, and for the body."""
MAX_BODY_BYTES = 1 << 20
UNSERVED = frozenset({502, 503, 504})
"""Answers that say that no instance took the request, or may have not."""


class Request(NamedTuple):
    method: str
    path: str
    fields: dict[str, str]
    body: bytes

    def encode(self, host: str) -> bytes:
        fields = {
            "Host": host,
            "Connection": "close",
            "User-Agent": "tabane",
            "Content-Length": str(len(self.body)),
            **self.fields,
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"{self.method} {self.path} HTTP/1.1\r\n{lines}\r\n".encode() + self.body


class Response:
    """What is answered, as its bytes come."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self.is_whole = False
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Raises `ProtocolError`."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise ProtocolError(f"it is answered by no HTTP: {error}") from error

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.body = (self.body + body)[: MAX_BODY_BYTES + 1]

    def on_message_complete(self) -> None:
        self.is_whole = self.status >= 200


async def ask_app(agent: Agent, app: App, request: Request) -> Response:
    """Raises `Unavailable` when it may not have reached the app, or its answer broke off."""
    reactive = app.reactive
    timeout_s = reactive.start_timeout_s + reactive.response_timeout_s + GRACE_S
    try:
        async with asyncio.timeout(timeout_s):
            response = await _exchange(agent.config.node.address, app, request)
    except TimeoutError:
        raise TimedOut(f"{app.key} did not answer within {timeout_s:g} s") from None
    except OSError as error:
        raise Closed(f"the gateway of {agent.config.key} cannot be asked: {error}") from error
    if response.status in UNSERVED:
        words = response.body.decode(errors="replace").strip()
        raise Unavailable(f"{app.key} is answered {response.status}: {words[:500]}")
    return response


async def _exchange(address: str, app: App, request: Request) -> Response:
    reader, writer = await asyncio.open_connection(address, HTTP_PORT)
    try:
        writer.write(request.encode(internal_names(app)[0]))
        response = Response()
        while not response.is_whole:
            data = await reader.read(1 << 16)
            if not data:
                raise Closed(f"{app.key} broke its answer off")
            response.feed(data)
        return response
    finally:
        writer.close()
