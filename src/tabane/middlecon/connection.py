"""A client's session with its hub, kept open: requests, and dialing again when it is lost.

It knows nothing of rooms: `Owner` is told of each session, of its frames, and asked to restore what
the last session had. The requests of one turn of the event loop leave with one write.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from tabane.errors import Busy, Closed, Conflict, TabaneError, TimedOut, Unreachable, UsageError
from tabane.middlecon.addresses import Address
from tabane.middlecon.dial import dial, pauses
from tabane.middlecon.frames import MAX_U32, URGENT, Frame, Kind, encode_frame
from tabane.middlecon.ports import Port
from tabane.middlecon.requests import Requests
from tabane.middlecon.session import Hello, Limits, Welcome
from tabane.middlecon.wire import Wire, flusher_of
from tabane.supervise import Supervisor

TIMEOUT_S = 10.0
"""The deadline of a message whose sender names none."""

TURN_BYTES = 64 << 10
"""Who casts more than this without a pause lets the loop send it, and hear that it should wait."""

_PASSING = (Unreachable, TimedOut, Closed, Conflict, Busy)
"""What a first attempt may meet while the hub, or who had the name before, starts or ends."""


class Owner(Protocol):
    """Whose connection it is."""

    def on_welcome(self, welcome: Welcome) -> None: ...

    def on_frame(self, wire: Wire, frame: Frame) -> None: ...

    async def restore(self) -> None:
        """After a reconnect: tell the hub again what it must know. Raises when that fails."""

    def on_restored(self) -> None: ...

    def on_lost(self) -> None:
        """The session is over; it is dialed again."""


class Connection:
    """One member's connection. `trouble` says why the session, or the last attempt, failed."""

    def __init__(self, address: Address, hello: Hello, owner: Owner, tasks: Supervisor) -> None:
        self.trouble = ""
        self._address = address
        self._hello = hello
        self._owner = owner
        self._tasks = tasks
        self._loop = asyncio.get_running_loop()
        self._flusher = flusher_of(self._loop)
        self.requests = Requests(self._loop)
        self._limits = Limits()
        self._data_bytes = self._limits.data_bytes
        self._wire: Wire | None = None
        self._last_wire: Wire | None = None
        self._lost = asyncio.Event()
        self._writable = asyncio.Event()
        self._gathered_bytes = 0
        self._check: asyncio.TimerHandle | None = None

    @property
    def connected(self) -> bool:
        return self._wire is not None

    async def start(self, timeout_s: float) -> None:
        """Have a first session within `timeout_s`, then keep one. Raises as `dial` does."""
        deadline = self._loop.time() + timeout_s
        for pause_s in pauses():
            try:
                await self._open()
                break
            except _PASSING:
                if self._loop.time() + pause_s > deadline:
                    raise
                await asyncio.sleep(pause_s)
        self._tasks.start("session", self._keep())

    def close(self) -> None:
        """Say goodbye. The session's tasks must be ended right after, or it is dialed again."""
        if self._wire is not None:
            self._last_wire = self._wire
            self._wire.close()

    async def wait_closed(self) -> None:
        """Until what was sent before `close` has left."""
        if self._last_wire is not None:
            await self._last_wire.wait_closed()

    def abort(self) -> None:
        """Drop the session at once, as a crash would."""
        if self._wire is not None:
            self._wire.lose(Closed("this side dropped the connection"))

    def request(
        self,
        kind: Kind,
        timeout_s: float,
        *,
        flags: int = 0,
        to: int = 0,
        value: int | None = None,
        name: str = "",
        data: bytes = b"",
    ) -> asyncio.Future[Any]:
        """Send what the hub answers; the future is its result. Raises `Closed`, `UsageError`."""
        wire = self._checked(data)
        id, result = self.requests.add(kind, timeout_s)
        if value is None:
            value = min(max(round(timeout_s * 1000), 1), MAX_U32)
        frame = encode_frame(kind, flags=flags, to=to, id=id, value=value, name=name, data=data)
        self._put(wire, frame, flags)
        return result

    def post(
        self,
        kind: Kind,
        *,
        flags: int = 0,
        to: int = 0,
        value: int = 0,
        name: str = "",
        data: bytes = b"",
    ) -> None:
        """Send what nobody answers. Raises `Closed`, `UsageError`."""
        wire = self._checked(data)
        frame = encode_frame(kind, flags=flags, to=to, value=value, name=name, data=data)
        self._put(wire, frame, flags)

    def _put(self, wire: Wire, frame: bytes, flags: int) -> None:
        self._gathered_bytes += len(frame)
        if flags & URGENT:
            wire.port.send_first(frame)
        else:
            wire.port.send(frame)

    async def wait_writable(self) -> None:
        """Until the hub takes what waits for it, if that is much."""
        while self.is_full:
            if self._gathered_bytes > TURN_BYTES:
                self._gathered_bytes = 0
                await asyncio.sleep(0)  # it leaves at the end of this turn, and others have one
            elif self._wire is not None:
                self._writable.clear()
                await self._writable.wait()

    @property
    def is_full(self) -> bool:
        """So much waits to be sent that who has more should wait."""
        wire = self._wire
        if wire is None:
            return False
        return self._gathered_bytes > TURN_BYTES or wire.port.backlog > self._limits.hold_bytes

    def _on_drained(self, port: Port) -> None:
        self._writable.set()

    def _checked(self, data: bytes) -> Wire:
        if self._wire is None:
            raise Closed(f"{self._hello.name} has no session with its hub now: {self.trouble}")
        if len(data) > self._data_bytes:
            raise UsageError(
                f"a message has at most {self._data_bytes} bytes, this one {len(data)}: cut it up"
            )
        return self._wire

    async def _keep(self) -> None:
        while True:
            await self._lost.wait()
            for pause_s in pauses():
                await asyncio.sleep(pause_s)
                try:
                    await self._open()
                    await self._owner.restore()
                except TabaneError as error:
                    self.abort()
                    self.trouble = error.message
                if self.connected:  # it may be lost again already
                    break
            self._owner.on_restored()

    async def _open(self) -> None:
        await dial(
            self._address,
            self._hello,
            self._adopt,
            self._flusher,
            queue_bytes=self._limits.queue_bytes,
        )

    def _adopt(self, wire: Wire, welcome: Welcome) -> None:
        wire.on_frame = self._owner.on_frame
        wire.on_lost = self._on_lost
        wire.on_drained = self._on_drained
        wire.port.name = f"hub {welcome.hub}"
        wire.session.set_limit(welcome.data_bytes)
        self._data_bytes = welcome.data_bytes
        self._hello.was = welcome.name
        self._wire = wire
        self._lost.clear()
        self._check = self._loop.call_later(welcome.heartbeat_s, self._on_check, welcome)
        self._owner.on_welcome(welcome)

    def _on_check(self, welcome: Welcome) -> None:
        """The hub pings us when it is quiet: several heartbeats without a byte mean it is gone."""
        if self._wire is not None:
            self._check = self._loop.call_later(welcome.heartbeat_s, self._on_check, welcome)
            self._wire.check()

    def _on_lost(self, wire: Wire, error: TabaneError) -> None:
        self._wire = None
        self._writable.set()
        self.trouble = error.message
        if self._check is not None:
            self._check.cancel()
        self.requests.fail_all(f"the session of {self._hello.name} was lost: {error.message}")
        self._lost.set()
        if wire is not self._last_wire:
            self._owner.on_lost()
