"""Descriptors of pipes and terminals, read and written without a thread and only when asked."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable
from contextlib import suppress

READ_BYTES = 64 << 10


class Source:
    """An `Output` of a descriptor, which it owns."""

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._is_last = False
        self._waiter: asyncio.Future[None] | None = None

    async def read(self) -> bytes:
        """As `Output.read`; a terminal that nobody has open any more has ended, too."""
        while self._descriptor >= 0:
            try:
                return os.read(self._descriptor, READ_BYTES)
            except BlockingIOError:
                if self._is_last:
                    break
                await self._wait_readable(asyncio.get_running_loop())
            except OSError:
                break
        return b""

    async def _wait_readable(self, loop: asyncio.AbstractEventLoop) -> None:
        self._waiter = loop.create_future()
        loop.add_reader(self._descriptor, _wake, self._waiter)
        try:
            await self._waiter
        finally:
            if self._descriptor >= 0:
                loop.remove_reader(self._descriptor)
            self._waiter = None

    def has_more(self) -> bool | None:
        """Whether there is something to read now; None once nobody writes it any more, and when it
        is closed."""
        if self._descriptor < 0:
            return None
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        events = dict(poll.poll(0)).get(self._descriptor, 0)
        return None if events & select.POLLHUP else bool(events)

    def finish(self) -> None:
        """Who wrote has ended: what is there now is the last of it."""
        self._is_last = True
        _wake(self._waiter)

    def close(self) -> None:
        """Idempotent; who reads finds its end."""
        _close(self._descriptor, asyncio.get_running_loop().remove_reader)
        self._descriptor = -1
        _wake(self._waiter)


class Sink:
    """Writes to a descriptor, which it owns."""

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._waiter: asyncio.Future[None] | None = None

    async def write(self, data: bytes) -> None:
        """Return once the kernel has it; what nobody will read is dropped."""
        rest = memoryview(data)
        while rest and self._descriptor >= 0:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                await self._wait_writable(asyncio.get_running_loop())
            except OSError:
                return

    async def _wait_writable(self, loop: asyncio.AbstractEventLoop) -> None:
        self._waiter = loop.create_future()
        loop.add_writer(self._descriptor, _wake, self._waiter)
        try:
            await self._waiter
        finally:
            if self._descriptor >= 0:
                loop.remove_writer(self._descriptor)
            self._waiter = None

    def close(self) -> None:
        """Idempotent; what is being written is dropped."""
        _close(self._descriptor, asyncio.get_running_loop().remove_writer)
        self._descriptor = -1
        _wake(self._waiter)


class Words:
    """An `Output` that was said before anyone asked."""

    def __init__(self, said: bytes = b"") -> None:
        self._said = said

    async def read(self) -> bytes:
        said, self._said = self._said, b""
        return said


async def wait_readable(descriptor: int) -> None:
    """Until there is something to read, or its end."""
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()
    loop.add_reader(descriptor, _wake, waiter)
    try:
        await waiter
    finally:
        loop.remove_reader(descriptor)


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


def _close(descriptor: int, forget: Callable[[int], object]) -> None:
    if descriptor >= 0:
        forget(descriptor)
        with suppress(OSError):
            os.close(descriptor)
