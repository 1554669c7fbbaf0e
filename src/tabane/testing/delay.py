"""A way between two sockets that takes time: what far data centers are to each other.

    async with Delay("unix:///run/b.sock", 0.2) as way:
        hub.link("b", way.url)

Every byte arrives `delay_s` later, in order, in both directions. `cut()` ends all that is open, as
a broken line does.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self, cast

from tabane.middlecon.addresses import Unix, parse_url
from tabane.unix import connect_unix


class _End(asyncio.Protocol):
    """One end of a connection; what comes in leaves at `other`, later."""

    def __init__(self, way: Delay) -> None:
        self._way = way
        self.other: _End | None = None
        self._early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._way.ends.add(self)

    def join(self, other: _End) -> None:
        self.other = other
        early, self._early = self._early, []
        for data in early:
            self.data_received(data)

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self._early.append(data)
        else:
            self._way.later(self.other.transport.write, data)

    def connection_lost(self, error: Exception | None) -> None:
        self._way.ends.discard(self)
        if self.other is not None:
            self._way.later(self.other.transport.close)


class Delay:
    """Listens on a free port of the loopback, and leads to the hub at `target`."""

    def __init__(self, target: str, delay_s: float) -> None:
        self._target = parse_url(target)
        self.delay_s = delay_s
        self.ends: set[_End] = set()
        self._timers: set[asyncio.TimerHandle] = set()
        self._dialing: set[asyncio.Task[None]] = set()

    def later(self, action: object, *arguments: object) -> None:
        """Do it after the delay, in order."""
        loop = asyncio.get_running_loop()

        def act() -> None:
            self._timers.discard(timer)
            action(*arguments)  # type: ignore[operator]

        timer = loop.call_later(self.delay_s, act)
        self._timers.add(timer)

    def cut(self) -> None:
        """Break every connection, and lose what is under way."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        for end in list(self.ends):
            end.transport.abort()

    async def _dial(self, near: _End) -> None:
        loop = asyncio.get_running_loop()
        try:
            if isinstance(self._target, Unix):
                sock = connect_unix(self._target.path, timeout_s=0)
                _, far = await loop.create_unix_connection(lambda: _End(self), sock=sock)
            else:
                host, port = self._target
                _, far = await loop.create_connection(lambda: _End(self), host, port)
        except OSError:
            near.transport.abort()
            return
        far.join(near)
        near.join(far)

    def _accept(self) -> asyncio.Protocol:
        near = _End(self)

        def made(transport: asyncio.BaseTransport) -> None:
            _End.connection_made(near, transport)
            task = asyncio.ensure_future(self._dial(near))
            self._dialing.add(task)
            task.add_done_callback(self._dialing.discard)

        near.connection_made = made  # type: ignore[method-assign]
        return near

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, "127.0.0.1", 0)
        self.url = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        for task in list(self._dialing):
            task.cancel()
        await asyncio.gather(*self._dialing, return_exceptions=True)
        self.cut()
        await asyncio.sleep(0)  # the aborted connections are told so
        await self._server.wait_closed()
