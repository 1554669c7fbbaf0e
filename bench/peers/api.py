"""What each contender's module brings: `serve`, and a class `Clients` of its members and senders.

`serve(processes)` starts the servers and returns where they are, once they answer. `Clients` is
used in processes of its own (`driver.py`); whoever fails there ends the benchmark.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable

MESSAGE = b"0123456789abcdef" * 4
ROOM = "room"

Call = Callable[[bytes], Awaitable[bytes]]


class Clients(ABC):
    """`members` sessions of one room, and whoever speaks to them, each a session of its own.

    `url` names the server, or several with commas between; members are spread over them. A room is
    told from others on the same server by `room`.
    """

    sender_is_server = False
    """The members dial the sender: there is no server between them."""

    def __init__(self, url: str, members: int) -> None:
        self.urls = url.split(",")
        self.members = members
        self.delivered = Count()
        """Of what was cast, by members in this process."""

    def url(self, number: int) -> str:
        return self.urls[number % len(self.urls)]

    @abstractmethod
    async def join(self, number: int) -> None:
        """Open a session that acknowledges what is said, and counts what is cast."""

    @abstractmethod
    async def open_sender(self) -> None:
        """Open the session of `say` and `cast`. Returns when all members can be reached, or knows
        by itself that they are there."""

    @abstractmethod
    async def say(self) -> None:
        """Tell all members; return when all have acknowledged."""

    async def cast(self) -> None:
        """Tell all members; nobody answers."""
        raise NotImplementedError

    async def open_answerer(self) -> None:
        """Open the session of the one member that answers calls with what they said."""
        raise NotImplementedError

    async def open_caller(self, number: int) -> Call:
        """Open the session of one caller; what is returned calls the member, and gives its
        answer."""
        raise NotImplementedError


class Count:
    """Waits until so many have come."""

    def __init__(self) -> None:
        self._left = 0
        self._done: asyncio.Future[None] | None = None

    def expect(self, count: int) -> asyncio.Future[None]:
        """Done once `add` was called `count` times from now on."""
        self._left = count
        self._done = asyncio.get_running_loop().create_future()
        return self._done

    def add(self) -> None:
        self._left -= 1
        if self._left == 0 and self._done is not None:
            self._done.set_result(None)
