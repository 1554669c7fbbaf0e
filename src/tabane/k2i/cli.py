"""`k2i`: the process table of this machine as a REST service, on loopback, without a cluster."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from tabane.errors import TabaneError, UsageError
from tabane.supervise import Supervisor

if TYPE_CHECKING:
    from fastapi import Request, Response
    from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Serve until told to end; returns the exit code."""
    try:
        hostname, port = _parse(argv)
        listener = _listen(hostname, port)
    except UsageError as error:
        print(f"k2i: {error.message}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        print(f"k2i: cannot listen on {hostname}:{port}: {reason}", file=sys.stderr)
        return 1
    import uvloop

    try:
        uvloop.run(_serve(listener, hostname))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _parse(argv: list[str]) -> tuple[str, int]:
    parser = Parser("k2i", description="The processes of this machine over REST.")
    parser.add_argument("--host", default="127.0.0.1", choices=LOOPBACK, help="where to listen")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free one")
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65535:
        raise UsageError(f"argument --port: {args.port} is not from 0 to 65535")
    return args.host, args.port


def _listen(hostname: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in hostname else socket.AF_INET
    return socket.create_server((hostname, port), family=family, backlog=128)


async def _serve(listener: socket.socket, hostname: str) -> None:
    from tabane.api.server import ApiServer
    from tabane.k2i.table import ProcessTable

    port = listener.getsockname()[1]
    table = ProcessTable()
    told_to_end = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, told_to_end.set)
    async with Supervisor("k2i") as tasks:
        server = ApiServer(build_app(table, hostname, port), tasks)
        server.serve([listener])
        print(f"On {f'[{hostname}]' if ':' in hostname else hostname}:{port}", flush=True)
        await told_to_end.wait()
        await server.aclose()
    table.close()
    listener.close()


def build_app(table: Any, hostname: str, port: int) -> ASGIApp:
    """The routes behind a check of Host and Origin."""
    from fastapi import FastAPI

    from tabane import __version__
    from tabane.k2i.api import build_router

    app = FastAPI(title="k2i", version=__version__, docs_url=None, redoc_url=None)
    app.include_router(build_router(table, hostname=hostname, port=port))
    app.add_exception_handler(TabaneError, _on_error)
    return LoopbackOnly(app)


async def _on_error(request: Request, error: Exception) -> Response:
    from fastapi.responses import JSONResponse

    from tabane.api.problems import status_of, to_body

    assert isinstance(error, TabaneError)
    return JSONResponse(to_body(error), status_of(error))


class LoopbackOnly:
    """Refuses what a browser was tricked into asking with a foreign Host or Origin."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from tabane.api.guard import refuse
        from tabane.security.identity import check_origin

        headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"]]
        try:
            check_origin(dict(headers), frozenset(LOOPBACK))
        except TabaneError as error:
            await refuse(send, error)
        else:
            await self._app(scope, receive, send)
