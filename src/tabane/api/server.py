"""Serves an ASGI app on sockets that somebody else keeps open."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import uvicorn

from tabane.api.guard import PeerProtocol
from tabane.supervise import Supervisor

if TYPE_CHECKING:
    from starlette.types import ASGIApp


class ApiServer:
    """uvicorn on given sockets, without its signal handlers."""

    def __init__(self, app: ASGIApp, tasks: Supervisor) -> None:
        config = uvicorn.Config(
            app, http=PeerProtocol, lifespan="off", log_config=None, access_log=False
        )
        self._server = uvicorn.Server(config)
        self._tasks = tasks
        self._serving: asyncio.Task[None] | None = None

    def serve(self, sockets: list[socket.socket]) -> None:
        self._serving = self._tasks.start("api", self._server._serve(sockets))

    async def aclose(self) -> None:
        """Finish requests in flight, drop streams, keep the sockets open."""
        self._server.should_exit = self._server.force_exit = True
        if self._serving is not None:
            await self._serving
