"""The connections to the agents inside one node's machines, each made when it is wanted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from tabane.errors import Closed, ProtocolError, TimedOut
from tabane.guest.client import Guest
from tabane.model import InstanceId
from tabane.runtimes.api import Handle

RETRY_S = 0.05
Connect = Callable[[Handle], Awaitable[Guest]]


class Line:
    """To one guest. `is_frozen`: nobody answers there."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.guest: Guest | None = None
        self.is_frozen = False


class Lines:
    """`connect` waits until a guest's program runs, and for ever if need be."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._lines: dict[InstanceId, Line] = {}

    def of(self, handle: Handle) -> Line:
        return self._lines.setdefault(handle.id, Line())

    async def reach(self, handle: Handle, timeout_s: float | None) -> Guest:
        """The guest, once its program runs. Raises `Closed` when its machine ends, `TimedOut`."""
        line = self.of(handle)
        try:
            async with asyncio.timeout(timeout_s), line.lock:
                if line.guest is not None and not line.guest.is_open:
                    await line.guest.aclose()
                    line.guest = None
                if line.guest is None:
                    line.guest = await self._connect(handle)
                return line.guest
        except TimeoutError:
            raise TimedOut(f"the agent in {handle.id} does not answer") from None

    async def wait_listening(self, handle: Handle, port: int) -> None:
        while True:
            with suppress(Closed, ProtocolError):
                guest = await self.reach(handle, None)
                return await guest.wait_listening(port)
            await asyncio.sleep(RETRY_S)  # of its end, somebody else tells

    async def attend(self, handle: Handle) -> str:
        """Be there for what its programs ask for, until one of them has ended; returns how, as the
        guest says it. Never by itself when the machine ends with it."""
        while True:
            with suppress(Closed, ProtocolError):
                guest = await self.reach(handle, None)
                await guest.over()
                if guest.end:
                    return guest.end
            await asyncio.sleep(RETRY_S)

    async def drop(self, handle: Handle) -> None:
        if (line := self._lines.pop(handle.id, None)) is not None and line.guest is not None:
            await line.guest.aclose()

    async def aclose(self) -> None:
        """Let go of the guests, which go on. Idempotent."""
        for line in self._lines.values():
            if line.guest is not None:
                await line.guest.aclose()
        self._lines.clear()

    def abort(self) -> None:
        """As when the node's agent is killed: the guests see their port closed."""
        for line in self._lines.values():
            if line.guest is not None:
                line.guest.abort()
