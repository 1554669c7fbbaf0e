"""`k2i`: what runs on this machine as a REST service, without a cluster: on loopback, or on a unix
socket that neighbours ask, each of whom sees what it may see."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabane.clock import SYSTEM
from tabane.commandline import CommandLine
from tabane.errors import Denied, NotFound, SystemFault, TabaneError, UsageError
from tabane.supervise import Supervisor
from tabane.units import shorten
from tabane.unix import connect_unix, shortened

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response
    from starlette.types import ASGIApp, Receive, Scope, Send

    from tabane.k2i.collectors.runner import Job
    from tabane.k2i.service import K2i
    from tabane.security.audit import AuditLog

UNREAD_MS = 30_000
"""How long the other side may take nothing of what waits for it (TCP_USER_TIMEOUT, tcp(7))."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Serve until told to end; returns the exit code."""
    try:
        args = _parse(argv)
        if args.list_collectors:
            return list_collectors()
        jobs = read_jobs(args.collect)
        audit = open_audit(args.audit)
        listener = listen_unix(args.unix) if args.unix else listen_tcp(args.host, args.port)
    except UsageError as error:
        print(f"k2i: {error.message}", file=sys.stderr)
        return 2
    except OSError as error:
        place = args.unix or f"{args.host}:{args.port}"
        reason = os.strerror(error.errno or 0)
        print(f"k2i: cannot listen on {place}: {reason}", file=sys.stderr)
        return 1
    import uvloop

    try:
        uvloop.run(_serve(listener, args, jobs, audit))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if args.unix:
            args.unix.unlink(missing_ok=True)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandLine("k2i", description="The processes of this machine over REST.")
    parser.add_version("-V")
    parser.add_argument("--host", default="127.0.0.1", choices=LOOPBACK, help="where to listen")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free one")
    unix = "a unix socket instead, which knows who asks: own processes are shown in full"
    parser.add_argument("--unix", type=Path, metavar="PATH", help=unix)
    audit = "at the unix socket, also signal, renice, pause, ...: this file says what was done"
    parser.add_argument("--audit", type=Path, metavar="FILE", help=audit)
    collect = "what to collect from servers and commands: see docs/collectors.md"
    parser.add_argument("--collect", type=Path, metavar="FILE.toml", help=collect)
    kinds = "show the kinds of collectors that are installed, and end"
    parser.add_argument("--list-collectors", action="store_true", help=kinds)
    args = parser.parse_args(argv)
    if args.audit and not args.unix:
        raise UsageError("--audit: only at a unix socket is it known who asks: add --unix")
    if not 0 <= args.port <= 65535:
        raise UsageError(f"--port: {args.port} is not from 0 to 65535")
    return args


def listen_tcp(hostname: str, port: int) -> socket.socket:
    """Listen on loopback. Connections are cut whose other end takes nothing: anybody can ask, and
    could have answers wait for ever. Raises `OSError`."""
    family = socket.AF_INET6 if ":" in hostname else socket.AF_INET
    listener = socket.create_server((hostname, port), family=family, backlog=128)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MS)
    return listener


def listen_unix(path: Path) -> socket.socket:
    """Listen on a unix socket that everybody may connect to. A socket there that nobody listens on
    any more makes room. Raises `OSError`."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        if path.is_socket() and not _is_served(path):
            path.unlink()
        with shortened(path) as short:
            sock.bind(short)
        path.chmod(0o666)
        sock.listen(128)
    except BaseException:
        sock.close()
        raise
    return sock


def _is_served(path: Path) -> bool:
    try:
        connect_unix(path).close()
    except ConnectionRefusedError:
        return False
    return True


def list_collectors() -> int:
    """Print a line for each kind; returns the exit code."""
    from tabane.k2i.collectors.registry import list_kinds

    for kind in asyncio.run(list_kinds()):
        print(f"{kind.kind:<16} {kind.source:<16} {'works' if kind.works else kind.reason}")
    return 0


def read_jobs(path: Path | None) -> list[Job]:
    """What a file asks to be collected. Raises `SpecError`."""
    if path is None:
        return []
    from tabane.k2i.collectors.file import load_jobs

    return load_jobs(path)


async def _serve(
    listener: socket.socket,
    args: argparse.Namespace,
    jobs: Sequence[Job],
    audit: AuditLog | None,
) -> None:
    from tabane.api.server import ApiServer
    from tabane.k2i.collectors.runner import Collection
    from tabane.k2i.event_feed import EventFeed
    from tabane.k2i.procfs import start_ticks
    from tabane.k2i.service import K2i
    from tabane.k2i.table import ProcessTable

    port = 0 if args.unix else listener.getsockname()[1]
    tasks = Supervisor("k2i")
    collection = Collection("", clock=SYSTEM, tasks=tasks, ticks=start_ticks)
    incarnation = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    table = ProcessTable(incarnation=incarnation)
    k2i = K2i(table, incarnation=incarnation, facts=collection.rows)
    told_to_end = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, told_to_end.set)
    async with tasks:
        collection.want("", jobs)
        events = EventFeed(table)
        events.start(tasks)
        k2i.start(tasks, events)
        app = build_app(k2i, args.host, port)
        if audit is not None:
            add_control(app, audit, k2i, tasks)
        else:
            refuse_control(app)
        server = ApiServer(LoopbackOnly(app), tasks)
        server.serve([listener])
        print(f"On {args.unix or _describe(listener.getsockname())}", flush=True)
        await told_to_end.wait()
        await server.aclose()
    if audit is not None:
        audit.close()
    k2i.close()
    k2i.table.close()
    listener.close()


def _describe(address: Any) -> str:
    hostname, port, *_ = address
    return f"[{hostname}]:{port}" if ":" in hostname else f"{hostname}:{port}"


def build_app(k2i: K2i, hostname: str, port: int) -> FastAPI:
    """The routes that read, to be put behind `LoopbackOnly`."""
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    from tabane import __version__
    from tabane.k2i.api import build_router
    from tabane.k2i.description import add_schemas
    from tabane.k2i.v2 import build_v2

    app = FastAPI(title="k2i", version=__version__, docs_url=None, redoc_url=None)
    app.include_router(build_router(k2i.table, hostname=hostname, port=port))
    app.include_router(build_v2(k2i))
    add_schemas(app)
    app.add_api_route("/", _show_way, include_in_schema=False)
    app.add_exception_handler(TabaneError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_fault)
    return app


def open_audit(path: Path | None) -> AuditLog | None:
    """Raises `UsageError`."""
    from tabane.security.audit import AuditLog

    if path is None:
        return None
    try:
        return AuditLog(path)
    except OSError as error:
        problem = f"--audit: {path} cannot be written"
        raise UsageError(f"{problem} ({error.strerror}): name another file") from None


def add_control(app: FastAPI, audit: AuditLog, k2i: K2i, tasks: Supervisor) -> None:
    """The routes that change something, at a socket that knows who asks."""
    from tabane.k2i.control import Control
    from tabane.k2i.control_api import build_control_router
    from tabane.k2i.permission import Here
    from tabane.model import NodeName

    here = Here(NodeName(""), k2i.incarnation)
    control = Control(here, audit, tasks, on_change=k2i.table.touch)
    app.include_router(build_control_router(control))


def refuse_control(app: FastAPI) -> None:
    """Say why it changes nothing here to who wants to."""

    async def refuse() -> None:
        hint = "start it with `--unix PATH --audit FILE`"
        raise Denied(f"this k2i only tells: it obeys where it knows who asks: {hint}")

    for kind in ("processes", "instances"):
        path = f"/v2/{kind}/{{what:path}}"
        app.add_api_route(path, refuse, methods=["POST"], include_in_schema=False)


async def _show_way() -> dict[str, str]:
    """What there is, to who asks for nothing in particular."""
    return {"v1": "/v1/proc", "v2": "/v2/processes", "description": "/openapi.json"}


async def _on_invalid(request: Request, error: Exception) -> Response:
    from fastapi.exceptions import RequestValidationError

    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return await _on_error(request, UsageError(f"{where}: {first['msg']}"))


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses by itself."""
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    assert isinstance(error, HTTPException)
    code = NotFound.code if error.status_code == 404 else UsageError.code
    message = f"{request.method} {shorten(request.url.path)}: {error.detail}"
    return JSONResponse({"error": code, "message": message}, error.status_code, error.headers)


async def _on_fault(request: Request, error: Exception) -> Response:
    """A mistake of ours, which the server logs."""
    return await _on_error(request, SystemFault("k2i made a mistake: it is not your request"))


async def _on_error(request: Request, error: Exception) -> Response:
    from fastapi.responses import JSONResponse

    from tabane.api.problems import status_of, to_body

    assert isinstance(error, TabaneError)
    return JSONResponse(to_body(error), status_of(error))


class LoopbackOnly:
    """Refuses what a browser was tricked into asking with a foreign Host or Origin. Who asks at a
    unix socket is known; at a port it is anybody."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from tabane.api.guard import read_headers, refuse
        from tabane.security.identity import check_origin

        try:
            check_origin(read_headers(scope), frozenset(LOOPBACK))
        except TabaneError as error:
            await refuse(send, error)
        else:
            if peer := scope.get("state", {}).get("peer"):
                scope["state"]["principal"] = peer
            await self._app(scope, receive, send)
