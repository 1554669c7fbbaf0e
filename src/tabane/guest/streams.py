"""The two directions of what host and guest carry for each other, each with its window.

What a guest sends beyond what it was granted, or takes beyond what it was given, is no mistake that
an agent makes: it raises `ProtocolError`, which ends the connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from tabane.errors import ProtocolError
from tabane.guest.frames import MAX_PAYLOAD

Grant = Callable[[int], None]
Send = Callable[[bytes], None]


class Incoming:
    """An `Output`: holds what came and nobody has taken, a window at the most. `grant` is told how
    much was."""

    def __init__(self, window_bytes: int, grant: Grant) -> None:
        self._grant = grant
        self._blocks: deque[bytes] = deque()
        self._granted = window_bytes
        self._is_last = False
        self._is_dropped = False
        self._changed = asyncio.Event()

    async def read(self) -> bytes:
        while not self._blocks and not self._is_last:
            self._changed.clear()
            await self._changed.wait()
        if not self._blocks:
            return b""
        block = self._blocks.popleft()
        self._granted += len(block)
        self._grant(len(block))
        return block

    def put(self, block: bytes) -> None:
        """Raises `ProtocolError` for more than was granted, and for nothing."""
        self._granted -= len(block)
        if self._granted < 0 or not block:
            raise ProtocolError("the guest sent more than it was asked for")
        if not self._is_dropped:
            self._blocks.append(block)
            self._changed.set()

    def finish(self) -> None:
        """No more comes."""
        self._is_last = True
        self._changed.set()

    def drop(self) -> None:
        """What is here will not be read, nor what comes."""
        self._is_last = self._is_dropped = True
        self._blocks.clear()
        self._changed.set()


class Outgoing:
    """Sends no more than a window of what the guest has not taken. `send` is given blocks that fit
    into a frame."""

    def __init__(self, window_bytes: int, send: Send) -> None:
        self._send = send
        self._window = self._room = window_bytes
        self._is_over = False
        self._changed = asyncio.Event()

    async def write(self, data: bytes) -> None:
        """Returns once all is sent, or nobody takes any more."""
        rest = memoryview(data)
        while rest and not self._is_over:
            if not self._room:
                self._changed.clear()
                await self._changed.wait()
                continue
            block = rest[: min(self._room, MAX_PAYLOAD)]
            self._room -= len(block)
            self._send(bytes(block))
            rest = rest[len(block) :]

    def take(self, payload: bytes) -> None:
        """The guest says how much it took. Raises `ProtocolError` for more than it was given."""
        count = int.from_bytes(payload, "little")
        if len(payload) != 4 or not 0 < count <= self._window - self._room:
            raise ProtocolError("the guest took more than it was given")
        self._room += count
        self._changed.set()

    def end(self) -> None:
        """Nobody takes any more."""
        self._is_over = True
        self._changed.set()
