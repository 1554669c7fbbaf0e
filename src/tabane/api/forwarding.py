"""Requests about an instance that lives on another node are passed on to it, and its answer back,
both as streams: what waits is never more than a block each way."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from httptools import HttpParserError, HttpResponseParser
from starlette.responses import Response

from tabane.api import actions
from tabane.api.checks import check_instance
from tabane.api.guard import FOR, VIA, keep_alive
from tabane.api.shapes import who_asks
from tabane.errors import Unreachable
from tabane.node.config import API_PORT, Peer
from tabane.security.identity import Principal, encode_principal
from tabane.supervise import Supervisor

if TYPE_CHECKING:
    from fastapi import Request
    from starlette.types import Receive, Scope, Send

    from tabane.node.agent import Agent

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
BLOCK_BYTES = 64 << 10
PASSED_ON = frozenset({b"content-type", b"retry-after"})


async def elsewhere(agent: Agent, request: Request, instance: str) -> Forward | None:
    """The answer of the node that has the instance, or only its log; None when that is this one.
    Raises `NotFound`, or `Unreachable` when it may be on a node that is silent."""
    identity = check_instance(instance)
    if who_asks(request).via or actions.knows(agent, identity):
        return None
    peer = agent.config.cluster.node(await actions.locate(agent, identity))
    if peer.key == agent.config.key:
        return None
    if request.method != "GET":
        what = f"{request.method} {request.url.path} to {peer.key}"
        actions.note(agent, who_asks(request), "pass-on", what)
    return Forward(peer, agent.token, agent.config.key, who_asks(request))


class Forward(Response):
    """What `peer` answers to this request."""

    def __init__(self, peer: Peer, token: str, via: str, who: Principal) -> None:
        super().__init__()
        self._peer = peer
        passed_on = {VIA: via, FOR: encode_principal(who)}
        self._fields = {"Host": "tabane", "Authorization": f"Bearer {token}", **passed_on}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reader, writer = await self._connect()
        answer = _Answer()
        try:
            async with Supervisor("forward", on_failure=lambda *_: None) as tasks:
                asking = tasks.start("ask", self._ask(scope, receive, writer))
                answering = tasks.start("answer", self._answer(reader, answer, send))
                first = asyncio.FIRST_COMPLETED
                await asyncio.wait({asking, answering}, return_when=first)
                if answering.done():
                    answering.result()
        except (OSError, HttpParserError) as error:
            self._break_off(answer, error)
        finally:
            writer.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(
                    self._peer.address, API_PORT, limit=BLOCK_BYTES
                )
        except OSError as error:
            reason = error.strerror or str(error) or "it does not answer"
            raise Unreachable(f"{self._peer.key} cannot be reached: {reason}") from None
        keep_alive(writer.get_extra_info("socket"))
        return reader, writer

    def _break_off(self, answer: _Answer, error: Exception) -> None:
        """Before the answer began the client is told; later the end of the connection tells it."""
        problem = f"{self._peer.key} broke off: {error}"
        if not answer.has_begun:
            raise Unreachable(problem) from error
        log.info("%s", problem)

    async def _ask(self, scope: Scope, receive: Receive, writer: asyncio.StreamWriter) -> None:
        """Pass the request on; returns when the client has left. A peer that takes no more of it
        has its answer on the way."""
        try:
            await self._pass_on(scope, receive, writer)
        except ConnectionError:
            while (await receive())["type"] != "http.disconnect":
                pass

    async def _pass_on(self, scope: Scope, receive: Receive, writer: asyncio.StreamWriter) -> None:
        query = scope["query_string"]
        target = scope["raw_path"] + (b"?" + query if query else b"")
        has_body = scope["method"] != "GET"
        fields = self._fields | {"Connection": "close"}
        fields |= {"Transfer-Encoding": "chunked"} if has_body else {}
        lines = [f"{name}: {value}\r\n" for name, value in fields.items()]
        start = b"%s %s HTTP/1.1\r\n" % (scope["method"].encode(), target)
        writer.write(start + "".join(lines).encode() + b"\r\n")
        while (message := await receive())["type"] != "http.disconnect":
            block = message.get("body", b"")
            if has_body and block:
                writer.write(b"%x\r\n%s\r\n" % (len(block), block))
            if has_body and not message.get("more_body", False):
                writer.write(b"0\r\n\r\n")
                has_body = False
            await writer.drain()

    async def _answer(self, reader: asyncio.StreamReader, answer: _Answer, send: Send) -> None:
        parser = HttpResponseParser(answer)
        while not answer.is_complete:
            block = await reader.read(BLOCK_BYTES)
            if not block:
                raise ConnectionResetError("it closed the connection before its answer's end")
            parser.feed_data(block)
            if answer.is_whole_head and not answer.has_begun:
                answer.has_begun = True
                head = {"status": parser.get_status_code(), "headers": answer.headers}
                await send({"type": "http.response.start", **head})
            for part in answer.take():
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Answer:
    """What the parser finds."""

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.is_whole_head = False
        self.is_complete = False
        self.has_begun = False
        self._parts: list[bytes] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in PASSED_ON:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.is_whole_head = True

    def on_body(self, part: bytes) -> None:
        self._parts.append(part)

    def on_message_complete(self) -> None:
        self.is_complete = True

    def take(self) -> list[bytes]:
        parts, self._parts = self._parts, []
        return parts
