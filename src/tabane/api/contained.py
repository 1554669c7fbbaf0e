"""What an instance may read of k2i through its own socket: what runs of its app on this node.

Who comes through the socket is the instance, so there is nothing to say who asks. It can ask for
processes, their threads and tree, and facts, of all instances of its own app on its own node, and
do nothing. Its questions cost this node time: those of all instances are answered one after the
other, each followed by a pause as long as itself, and an instance has few connections.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import uvicorn
from uvicorn.server import ServerState

from tabane.api.guard import TOO_MANY, PeerProtocol, refuse
from tabane.clock import sleep_until
from tabane.errors import Denied, NotFound, TabaneError, UsageError
from tabane.k2i import Question
from tabane.k2i.service import parse_params
from tabane.model import AppName
from tabane.node.services import End
from tabane.runtimes.api import InstanceSpec
from tabane.security.identity import Principal
from tabane.units import shorten

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from tabane.node.agent import Agent

log = logging.getLogger(__name__)

KINDS = ("processes", "threads", "tree", "facts")
CONNECTIONS = 16
"""Of one instance at the same time."""
PREFIX = "/v2/"


class ContainedProtocol(PeerProtocol):
    """Few of them for each instance; one that sends nothing goes after some seconds."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.write(TOO_MANY)
            transport.close()


class ContainedK2i:
    """See the module's text."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._turn = asyncio.Lock()
        self._config = uvicorn.Config(
            self._answer,
            http=ContainedProtocol,
            interface="asgi3",
            proxy_headers=False,
            lifespan="off",
            log_config=None,
            access_log=False,
        )
        self._config.load()

    async def serve(self, sock: socket.socket, spec: InstanceSpec) -> End:
        """Answer at an instance's socket."""
        state = ServerState()
        told = {"contained": spec.app.key}
        listening = await asyncio.get_running_loop().create_unix_server(
            lambda: ContainedProtocol(self._config, state, told), sock=sock
        )

        async def end() -> None:
            listening.close()
            for task in tuple(state.tasks):
                task.cancel()
            await asyncio.gather(*state.tasks, return_exceptions=True)
            for connection in tuple(state.connections):
                connection.transport.abort()
            await listening.wait_closed()

        return end

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            question = read_question(
                scope["method"], scope["path"], scope["query_string"], scope["state"]["contained"]
            )
            body = await self._ask(question)
        except TabaneError as error:
            await refuse(send, error)
            return
        except Exception:
            log.exception("%s %s of an instance failed", scope["method"], scope["path"])
            raise
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _ask(self, question: Question) -> bytes:
        question.check()
        clock = self._agent.clock
        async with self._turn:
            began = clock.now()
            body = await self._agent.k2i.answer(question, Principal("member"))
            ended = clock.now()
            await sleep_until(clock, ended + ended - began)
            return body


def read_question(method: str, path: str, query: bytes, app: AppName) -> Question:
    """What an instance of `app` asks, of nothing but its app. Raises `Denied` for what is not its
    own, `NotFound`, `UsageError`."""
    if method not in ("GET", "HEAD"):
        raise Denied(f"k2i can only be read from inside an instance: {shorten(method)} is not GET")
    kind = path.removeprefix(PREFIX)
    if not path.startswith(PREFIX) or kind not in KINDS:
        known = ", ".join(PREFIX + kind for kind in KINDS)
        raise NotFound(f"an instance can ask for {known}, not for {shorten(path)}")
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict")
    except ValueError:
        raise UsageError("the query cannot be read: write it as %XX of UTF-8") from None
    params: dict[str, Any] = parse_params(pairs)
    if params.pop("scope", "node") != "node":
        raise Denied("an instance sees its own node only: leave scope out")
    asked = params.pop("app", app)
    if asked not in (app, app.removeprefix("default/")):
        raise Denied(f"an instance sees its own app only, {app}: leave app out")
    return Question(kind, params | {"app": app})
