"""k2i's REST routes: `/v1` in the terms of the k2i of 2018.

Always a JSON array, empty for what is not there. Handlers are plain functions, so that the reading
of /proc happens on a worker thread and not on the event loop.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import PlainTextResponse
from starlette.convertors import Convertor, register_url_convertor

from tabane.errors import UsageError
from tabane.k2i.table import ProcessTable
from tabane.k2i.v1 import Record
from tabane.security.identity import Principal
from tabane.units import shorten

ANYBODY = Principal("anybody")
"""Who asks a port that wants to know nothing of it: a standalone k2i's, on loopback."""

_encode = msgspec.json.Encoder().encode


def principal_of(request: Request) -> Principal:
    """Who asks, as the port's guard noted."""
    principal: Principal = getattr(request.state, "principal", ANYBODY)
    return principal


Who = Annotated[Principal, Depends(principal_of)]


class AnyText(Convertor[str]):
    """The rest of a path, newlines too: a process may have one in its name."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("any_text", AnyText())


class Records(Response):
    """Records as a JSON array."""

    media_type = "application/json"

    def render(self, content: list[Record]) -> bytes:
        return _encode(content)


def build_router(
    table: ProcessTable, *, hostname: str = "127.0.0.1", port: int = 8000
) -> APIRouter:
    """The routes over `table`; `hostname` and `port` are what `/v1/config` says."""
    router = APIRouter(prefix="/v1", tags=["k2i"])
    _add_pages(router, {"hostname": hostname, "port": port, "threads": 1})
    _add_processes(router, table)
    return router


def _add_pages(router: APIRouter, config: dict[str, Any]) -> None:
    @router.get("/", response_class=PlainTextResponse)
    def root() -> str:
        return "root response!"

    @router.get("/hello", response_class=PlainTextResponse)
    def hello() -> str:
        return "hello!"

    @router.get("/config")
    def show_config() -> dict[str, Any]:
        return config


def sees_all(who: Principal, table: ProcessTable) -> bool:
    """Whether all arguments are for who asks. A port on loopback does not know that, and shows what
    the kernel shows everybody: all, unless /proc is mounted with hidepid."""
    return who.is_root or (who == ANYBODY and not table.hides())


def redact(record: Record, who: Principal) -> Record:
    """Its arguments are for its own user."""
    if who.uid == record.euid:
        return record
    return msgspec.structs.replace(record, cmdline=[f"[{record.cmd}]"])


def _add_processes(router: APIRouter, table: ProcessTable) -> None:
    def shown(records: Iterable[Record | None], who: Principal) -> Response:
        found = [record for record in records if record]
        if not sees_all(who, table):
            found = [redact(record, who) for record in found]
        return Records(found)

    @router.get("/proc", response_class=Records)
    def all_processes(who: Who) -> Response:
        """Every process to be seen."""
        if sees_all(who, table):
            return Response(table.render_records(), media_type="application/json")
        return shown(table.records(), who)

    @router.get("/proc/self", response_class=Records)
    @router.get("/k2i", response_class=Records)
    def own_process(who: Who) -> Response:
        """The process that answers."""
        return shown([table.record(os.getpid())], who)

    @router.get("/proc/cmd/{cmd:any_text}", response_class=Records)
    def processes_by_name(cmd: str, who: Who) -> Response:
        """Those with `cmd` in their names; upper and lower case differ."""
        return shown((record for record in table.records() if cmd in record.cmd), who)

    @router.get("/proc/pid/{pid}", response_class=Records)
    @router.get("/proc/{pid}", response_class=Records)
    def process_by_pid(pid: str, who: Who) -> Response:
        """The process with this number; the shorter path is the older one."""
        return shown([table.record(_parse_pid(pid))], who)


def _parse_pid(text: str) -> int:
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 20:
        raise UsageError(f"a pid is a number, not {shorten(text)}")
    return int(text)
