"""Activity leases: a program says that it is at work, though it has no session (`services.lease`).

At the socket that its instance is shown, a connection is a lease for as long as it is open,
whatever is said on it; so it goes with the program, however that ends. Who would rather ask in HTTP
takes one for a time, `PUT /lease?for=10m`, and gives it back with `DELETE /lease`. While an
instance has leases it is not idle: it is neither frozen nor stopped for that. They hold up nothing
else.

The agent answers here. When it is started again, connections break off (programs dial again), and
leases for a time go on: when they end is in a file of the instance.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from msgspec.structs import replace

from tabane.clock import Clock, Timer
from tabane.errors import UsageError
from tabane.model import Instance, InstanceId
from tabane.node.services import End
from tabane.node.using import keep_in_use
from tabane.runtimes.api import InstanceSpec
from tabane.supervise import Supervisor
from tabane.units import parse_duration

if TYPE_CHECKING:
    from tabane.node.agent import Agent

CONNECTIONS = 16
"""Of one instance at the same time."""
LONGEST_S = 86_400.0
LONGEST_HEAD = 4096
HEAD_S = 10.0
METHODS = (b"GET ", b"PUT ", b"DELETE ", b"POST ", b"HEAD ", b"PATCH ", b"OPTIONS ")
FILE = "lease"
"""In the instance's directory: until when, by this machine's clock."""


class Activity:
    """The leases of a node's instances. `hold(instance)` has one in use until it is cancelled."""

    def __init__(
        self, hold: Callable[[InstanceId], Awaitable[None]], tasks: Supervisor, clock: Clock
    ) -> None:
        self.hold = hold
        self.tasks = tasks
        self.clock = clock
        self._leases: dict[InstanceId, _Leases] = {}

    async def serve(self, sock: socket.socket, spec: InstanceSpec) -> End:
        """Answer at an instance's socket."""
        leases = self._leases[spec.id] = _Leases(self, spec)
        server = await asyncio.start_unix_server(leases.serve, sock=sock, limit=LONGEST_HEAD)

        async def end() -> None:
            server.close()
            leases.close()
            if self._leases.get(spec.id) is leases:
                del self._leases[spec.id]
            await server.wait_closed()

        return end

    def show(self, instance: Instance) -> Instance:
        """With its leases."""
        leases = self._leases.get(instance.id)
        count = leases.count if leases is not None else 0
        return replace(instance, leases=count) if count else instance


class _Leases:
    """The leases of one instance."""

    def __init__(self, activity: Activity, spec: InstanceSpec) -> None:
        self._activity = activity
        self._id = spec.id
        self._file = spec.directory / FILE
        self._open: set[asyncio.StreamWriter] = set()
        self._until = self._read()
        self._task: asyncio.Task[None] | None = None
        self._timer: Timer | None = None
        self._settle()

    @property
    def left_s(self) -> float:
        """Of the lease for a time."""
        return max(0.0, self._until - self._activity.clock.wall())

    @property
    def count(self) -> int:
        return len(self._open) + (self.left_s > 0)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until its end."""
        if len(self._open) >= CONNECTIONS:
            writer.transport.abort()
            return
        self._open.add(writer)
        self._settle()
        try:
            await self._converse(reader, writer)
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass  # it left, or says what nobody asked for
        finally:
            self._open.discard(writer)
            self._settle()
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.read(LONGEST_HEAD)
        if first.startswith(METHODS):
            async with asyncio.timeout(HEAD_S):
                while b"\r\n\r\n" not in first and len(first) < LONGEST_HEAD:
                    if not (more := await reader.read(LONGEST_HEAD)):
                        return
                    first += more
            self._open.discard(writer)  # a request is no lease
            writer.write(self._answer(first))
            await writer.drain()
            return
        while first:
            first = await reader.read(LONGEST_HEAD)

    def _answer(self, head: bytes) -> bytes:
        method, _, rest = head.decode("latin-1").partition(" ")
        try:
            self._obey(method, rest.partition(" ")[0])
        except UsageError as error:
            return _respond("400 Bad Request", {"error": error.message})
        told = {"leases": self.count, "left_s": round(self.left_s, 3)}
        return _respond("200 OK", told)

    def _obey(self, method: str, target: str) -> None:
        url = urlsplit(target)
        asked = dict(parse_qsl(url.query))
        if url.path != "/lease" or method not in ("GET", "PUT", "DELETE"):
            raise UsageError(f"there is GET, PUT, DELETE /lease, not {method} {target[:100]}")
        if method == "PUT":
            if asked.keys() != {"for"}:
                raise UsageError("say for how long, and nothing else: PUT /lease?for=10m")
            seconds = parse_duration(asked["for"])
            if not 0 < seconds <= LONGEST_S:
                raise UsageError(f"{asked['for']} is not longer than nothing and at most 1d")
            self._write(self._activity.clock.wall() + seconds)
        elif method == "DELETE":
            self._write(0.0)

    def _write(self, until: float) -> None:
        self._until = until
        self._file.write_text(repr(until))
        self._settle()

    def _read(self) -> float:
        with suppress(FileNotFoundError, ValueError):
            return float(self._file.read_text())
        return 0.0

    def _settle(self) -> None:
        """Have it in use while there is a lease, and look again when the one for a time ends."""
        activity = self._activity
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.left_s:
            due = activity.clock.now() + self.left_s
            self._timer = activity.clock.call_at(due, self._settle)
        if self.count and (self._task is None or self._task.done()):
            self._task = activity.tasks.start(f"lease {self._id}", self._hold())
        elif not self.count and self._task is not None:
            self._task.cancel()
            self._task = None

    async def _hold(self) -> None:
        await self._activity.hold(self._id)

    def close(self) -> None:
        """The instance or the agent ends; what is written stays."""
        self._until = 0.0
        for writer in tuple(self._open):
            writer.transport.abort()
        self._open.clear()
        self._settle()


def _respond(status: str, body: object) -> bytes:
    data = json.dumps(body).encode() + b"\n"
    fields = f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\nConnection: close"
    return f"HTTP/1.1 {status}\r\n{fields}\r\n\r\n".encode() + data


def activity_of(agent: Agent) -> Activity:
    return Activity(lambda instance: keep_in_use(agent, instance), agent.tasks, agent.clock)
