"""Ask a k2i from Python, and have it act: `Client`, and `AsyncClient` for asyncio.

    with Client("unix:///run/tabane/api.sock") as k2i:
        for process in k2i.processes(scope="cluster", app="hello"):
            print(process.node, process.pid, process.command)

An address is `unix:///PATH`, where k2i sees who asks, or `http://HOST:PORT` with a cluster's token;
without one `$TABANE_K2I` is taken, or the k2i that runs by itself on this machine. Filters are the
API's parameters; several values for one are given as a list. Each call has a connection of its own,
so one client serves many threads or tasks.

Raises what k2i refuses with (`UsageError`, `Denied`, `NotFound`, `Stale`, ...: `tabane.errors`),
`Unreachable` when nobody answers, `TimedOut`, `Closed` when an answer breaks off.
"""

from __future__ import annotations

import asyncio
import os
import socket
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import msgspec

from tabane.errors import ProtocolError, TabaneError, TimedOut, Unreachable, UsageError
from tabane.k2i.exchange import Reply, Silent, encode_request, encode_target, parse_url
from tabane.k2i.files import OpenFile
from tabane.k2i.history import AppPoint, HostPoint, ProcessPoint
from tabane.k2i.host import Host
from tabane.k2i.logins import Login
from tabane.k2i.mounts import Mount
from tabane.k2i.orders import Limit, Outcome
from tabane.k2i.process import Process
from tabane.k2i.stream import Changes
from tabane.k2i.threads import Thread
from tabane.k2i.tree import Branch
from tabane.unix import connect_unix, shortened

__all__ = ["AsyncClient", "Changes", "Client", "Limit", "Node", "Outcome", "Rows", "Silent"]

HERE = "http://127.0.0.1:8000"
BLOCK_BYTES = 1 << 16
TIMEOUT_S = 10.0

Row = TypeVar("Row")


class Node(msgspec.Struct, frozen=True):
    """One that answered. What it says was so at most `age_s` ago."""

    node: str
    incarnation: str
    age_s: float


class Rows(list[Row], Generic[Row]):
    """An answer's rows, the `nodes` they are from, and those that were `silent`."""

    nodes: list[Node]
    silent: list[str]


def _target(kind: str, params: Mapping[str, Any]) -> str:
    return encode_target(f"/v2/{kind}", params)


def _check_typed(kind: str, params: Mapping[str, Any]) -> None:
    """Raises `UsageError`."""
    if other := sorted({"fields", "group", "sum"} & params.keys()):
        raise UsageError(f"{other[0]}: such rows have other fields: ask table({kind!r}, ...)")


def _read_rows(kind: str, row: Any, body: bytes) -> Rows[Any]:
    """Raises `ProtocolError`."""
    try:
        answer = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        rows: Rows[Any] = Rows(msgspec.json.decode(answer[kind.partition("/")[0]], type=list[row]))
        rows.nodes = msgspec.json.decode(answer["nodes"], type=list[Node])
        rows.silent = msgspec.json.decode(answer["silent"], type=list[str])
    except (msgspec.MsgspecError, KeyError) as error:
        problem = "k2i's answer is not understood: is it of another version?"
        raise ProtocolError(f"{problem} ({error})") from None
    return rows


def _order(process: Process, args: Mapping[str, Any], how: Mapping[str, Any]) -> dict[str, Any]:
    """Which process is meant, so that no other can be."""
    place = {name: getattr(process, name) for name in ("dc", "node", "incarnation")}
    return {**place, "start_ticks": process.start_ticks, **args, **how}


class _Common:
    def __init__(self, url: str = "", *, token: str = "", timeout_s: float = TIMEOUT_S) -> None:
        """`timeout_s`: for each block of an answer, not for streams. Raises `UsageError`."""
        self._address = parse_url(url or os.environ.get("TABANE_K2I") or HERE)
        self._token = token
        self._timeout_s = timeout_s

    def _encode(self, method: str, target: str, body: Any = None) -> bytes:
        return encode_request(self._address, self._token, method, target, body)

    def _unreachable(self, error: OSError) -> TabaneError:
        if isinstance(error, TimeoutError):
            return TimedOut(f"k2i at {self._address} did not answer in {self._timeout_s:g} s")
        reason = error.strerror or str(error) or type(error).__name__
        return Unreachable(f"no k2i at {self._address}: {reason}")


class Client(_Common):
    """See the module's text. `with` is not needed: nothing stays open between calls."""

    def processes(self, **filters: Any) -> Rows[Process]:
        return self._rows("processes", Process, filters)

    def threads(self, **filters: Any) -> Rows[Thread]:
        return self._rows("threads", Thread, filters)

    def tree(self, **filters: Any) -> Rows[Branch]:
        """Parents before their children, each with its `depth`."""
        return self._rows("tree", Branch, filters)

    def files(self, **filters: Any) -> Rows[OpenFile]:
        return self._rows("files", OpenFile, filters)

    def host(self, **filters: Any) -> Rows[Host]:
        """A row for each node."""
        return self._rows("host", Host, filters)

    def mounts(self, **filters: Any) -> Rows[Mount]:
        return self._rows("mounts", Mount, filters)

    def logins(self, **filters: Any) -> Rows[Login]:
        return self._rows("logins", Login, filters)

    def history(self, **filters: Any) -> Rows[HostPoint]:
        return self._rows("history", HostPoint, filters)

    def app_history(self, **filters: Any) -> Rows[AppPoint]:
        return self._rows("history/apps", AppPoint, filters)

    def process_history(self, **filters: Any) -> Rows[ProcessPoint]:
        return self._rows("history/processes", ProcessPoint, filters)

    def table(self, kind: str, **params: Any) -> Rows[dict[str, Any]]:
        """Rows with the fields, groups and sums that are asked for."""
        return _read_rows(kind, dict[str, Any], self._ask("GET", _target(kind, params)))

    def changes(self, **filters: Any) -> Generator[Changes | Silent, None, None]:
        """What changes from now on, first all that there is. Ends by raising `Busy` when it is read
        too slowly, and `Closed` when k2i ends."""
        with self._connect() as sock:
            sock.sendall(self._encode("GET", _target("changes", filters)))
            reply = _receive_head(sock)
            if not reply.ok:
                raise _receive_rest(sock, reply).error()
            sock.settimeout(None)
            while True:
                yield from reply.take_events()
                reply.feed_stream(sock.recv(BLOCK_BYTES))

    def signal(self, process: Process, signal: int | str, **how: Any) -> Outcome:
        """By number, or by name as `TERM`. `how`: `dry_run`, `force`, `idempotency_key`."""
        return self._act(process, "signal", {"signal": signal}, how)

    def nice(self, process: Process, nice: int, **how: Any) -> Outcome:
        """Set it; with `relative=True` change it by so much."""
        return self._act(process, "nice", {"nice": nice}, how)

    def affinity(self, process: Process, cpus: Iterable[int], **how: Any) -> Outcome:
        return self._act(process, "affinity", {"cpus": list(cpus)}, how)

    def limits(self, process: Process, limits: Mapping[str, Limit], **how: Any) -> Outcome:
        """By the names of `prlimit`: `nofile`, `core`, `as`, ..."""
        return self._act(process, "limits", {"limits": msgspec.to_builtins(limits)}, how)

    def pause(self, process: Process, **how: Any) -> Outcome:
        return self._act(process, "pause", {}, how)

    def resume(self, process: Process, **how: Any) -> Outcome:
        return self._act(process, "resume", {}, how)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def _rows(self, kind: str, row: Any, params: Mapping[str, Any]) -> Rows[Any]:
        _check_typed(kind, params)
        return _read_rows(kind, row, self._ask("GET", _target(kind, params)))

    def _act(
        self, process: Process, verb: str, args: Mapping[str, Any], how: Mapping[str, Any]
    ) -> Outcome:
        target = f"/v2/processes/{process.pid}/{verb}"
        return _read_outcome(self._ask("POST", target, _order(process, args, how)))

    def _ask(self, method: str, target: str, body: Any = None) -> bytes:
        with self._connect() as sock:
            sock.sendall(self._encode(method, target, body))
            reply = _receive_rest(sock, Reply())
        if not reply.ok:
            raise reply.error()
        return reply.body

    @contextmanager
    def _connect(self) -> Iterator[socket.socket]:
        address = self._address
        try:
            if address.path:
                sock = connect_unix(Path(address.path), self._timeout_s)
            else:
                place = address.host, address.port
                sock = socket.create_connection(place, timeout=self._timeout_s)
            with sock:
                yield sock
        except OSError as error:
            raise self._unreachable(error) from None


def _receive_head(sock: socket.socket) -> Reply:
    reply = Reply()
    while not reply.headed:
        reply.feed(sock.recv(BLOCK_BYTES))
    return reply


def _receive_rest(sock: socket.socket, reply: Reply) -> Reply:
    while not reply.complete:
        reply.feed(sock.recv(BLOCK_BYTES))
    return reply


def _read_outcome(body: bytes) -> Outcome:
    try:
        return msgspec.json.decode(body, type=Outcome)
    except msgspec.MsgspecError as error:
        problem = "k2i's outcome is not understood: is it of another version?"
        raise ProtocolError(f"{problem} ({error})") from None


class AsyncClient(_Common):
    """The same for asyncio."""

    async def processes(self, **filters: Any) -> Rows[Process]:
        return await self._rows("processes", Process, filters)

    async def threads(self, **filters: Any) -> Rows[Thread]:
        return await self._rows("threads", Thread, filters)

    async def tree(self, **filters: Any) -> Rows[Branch]:
        return await self._rows("tree", Branch, filters)

    async def files(self, **filters: Any) -> Rows[OpenFile]:
        return await self._rows("files", OpenFile, filters)

    async def host(self, **filters: Any) -> Rows[Host]:
        return await self._rows("host", Host, filters)

    async def mounts(self, **filters: Any) -> Rows[Mount]:
        return await self._rows("mounts", Mount, filters)

    async def logins(self, **filters: Any) -> Rows[Login]:
        return await self._rows("logins", Login, filters)

    async def history(self, **filters: Any) -> Rows[HostPoint]:
        return await self._rows("history", HostPoint, filters)

    async def app_history(self, **filters: Any) -> Rows[AppPoint]:
        return await self._rows("history/apps", AppPoint, filters)

    async def process_history(self, **filters: Any) -> Rows[ProcessPoint]:
        return await self._rows("history/processes", ProcessPoint, filters)

    async def table(self, kind: str, **params: Any) -> Rows[dict[str, Any]]:
        return _read_rows(kind, dict[str, Any], await self._ask("GET", _target(kind, params)))

    async def changes(self, **filters: Any) -> AsyncGenerator[Changes | Silent, None]:
        """As `Client.changes`; close it (`contextlib.aclosing`) when you have had enough."""
        async with self._connect() as (reader, writer):
            writer.write(self._encode("GET", _target("changes", filters)))
            reply = Reply()
            async with self._deadline():
                while not reply.headed or not (reply.ok or reply.complete):
                    reply.feed(await reader.read(BLOCK_BYTES))
            if not reply.ok:
                raise reply.error()
            while True:
                for event in reply.take_events():
                    yield event
                reply.feed_stream(await reader.read(BLOCK_BYTES))

    async def signal(self, process: Process, signal: int | str, **how: Any) -> Outcome:
        return await self._act(process, "signal", {"signal": signal}, how)

    async def nice(self, process: Process, nice: int, **how: Any) -> Outcome:
        return await self._act(process, "nice", {"nice": nice}, how)

    async def affinity(self, process: Process, cpus: Iterable[int], **how: Any) -> Outcome:
        return await self._act(process, "affinity", {"cpus": list(cpus)}, how)

    async def limits(self, process: Process, limits: Mapping[str, Limit], **how: Any) -> Outcome:
        return await self._act(process, "limits", {"limits": msgspec.to_builtins(limits)}, how)

    async def pause(self, process: Process, **how: Any) -> Outcome:
        return await self._act(process, "pause", {}, how)

    async def resume(self, process: Process, **how: Any) -> Outcome:
        return await self._act(process, "resume", {}, how)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def _rows(self, kind: str, row: Any, params: Mapping[str, Any]) -> Rows[Any]:
        _check_typed(kind, params)
        return _read_rows(kind, row, await self._ask("GET", _target(kind, params)))

    async def _act(
        self, process: Process, verb: str, args: Mapping[str, Any], how: Mapping[str, Any]
    ) -> Outcome:
        target = f"/v2/processes/{process.pid}/{verb}"
        return _read_outcome(await self._ask("POST", target, _order(process, args, how)))

    async def _ask(self, method: str, target: str, body: Any = None) -> bytes:
        async with self._connect() as (reader, writer):
            writer.write(self._encode(method, target, body))
            reply = Reply()
            while not reply.complete:
                async with self._deadline():
                    reply.feed(await reader.read(BLOCK_BYTES))
        if not reply.ok:
            raise reply.error()
        return reply.body

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[tuple[StreamReader, StreamWriter]]:
        address = self._address
        try:
            async with self._deadline():
                if address.path:
                    with shortened(Path(address.path)) as path:
                        reader, writer = await asyncio.open_unix_connection(path)
                else:
                    reader, writer = await asyncio.open_connection(address.host, address.port)
        except OSError as error:
            raise self._unreachable(error) from None
        try:
            yield reader, writer
        except OSError as error:
            raise self._unreachable(error) from None
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def _deadline(self) -> asyncio.Timeout:
        return asyncio.timeout(self._timeout_s)
