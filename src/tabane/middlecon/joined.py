"""A room as one of those in it has it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Any, overload

from tabane.errors import Closed, TimedOut
from tabane.middlecon.agreement import Agreeing, Ballot
from tabane.middlecon.connection import TIMEOUT_S
from tabane.middlecon.frames import URGENT, JoinFlag, Kind
from tabane.middlecon.inbox import Handler, Inbox, register
from tabane.middlecon.receipts import Receipt, Replies
from tabane.middlecon.views import Callbacks, MemberTable, RoomState

if TYPE_CHECKING:
    from tabane.middlecon.client import Client

Callback = Callable[..., Any]


class WhenSlow(StrEnum):
    """What a hub does when more waits for a member than it should."""

    WAIT = "wait"
    """Those who speak in its rooms wait."""
    DROP_OLDEST = "drop_oldest"
    """Its oldest casts are dropped, and counted."""
    DISCONNECT = "disconnect"


WHEN_SLOW: dict[WhenSlow, int] = {
    WhenSlow.WAIT: 0,
    WhenSlow.DROP_OLDEST: JoinFlag.DROP_OLDEST,
    WhenSlow.DISCONNECT: JoinFlag.DISCONNECT,
}


class Room(Agreeing):
    """A room as one of those in it sees it: made by `Client.join`.

    `members` are its members by name, with ourselves if we are one; `state[member][key]` is what
    they publish. Both keep their last view while there is no session.
    """

    def __init__(self, client: Client, name: str, flags: int) -> None:
        self.name = name
        self.members = MemberTable()
        self.state = RoomState(self.members, client._table)
        self._client = client
        self._connection = client._connection
        self._flags = flags
        self._number = 0
        self._entered = asyncio.Event()
        """The first try to enter is over."""
        self._may_speak: asyncio.Event | None = None
        """Set when those who are slow have caught up; None while nobody is."""
        self.ballot = Ballot(client.name, name, client._tasks)
        self._inbox = Inbox(f"{client.name} in {name}", client._tasks)
        self._presence = Callbacks(f"on_presence in {name}", client._tasks)
        self._state_changed = Callbacks(f"on_state in {name}", client._tasks)

    async def say(
        self, data: bytes, *, timeout_s: float = TIMEOUT_S, urgent: bool = False
    ) -> Receipt:
        """Tell all members; the receipt names the fate of each.

        Returns as soon as all have acknowledged or failed, and at the latest half a second after
        `timeout_s`. Waits first while members are too slow. `urgent` does not, and goes before
        all that waits for them. Raises `Closed` when our own session is or gets lost: then nobody
        knows; `TimedOut` when nothing was sent in time.
        """
        receipt: Receipt = await self._request(Kind.SAY, data, timeout_s, urgent)
        return receipt

    async def ask(
        self, data: bytes, *, timeout_s: float = TIMEOUT_S, urgent: bool = False
    ) -> Replies:
        """As `say`, and what the members' handlers return. Who fails has no answer."""
        replies: Replies = await self._request(Kind.ASK, data, timeout_s, urgent)
        return replies

    async def cast(self, data: bytes, *, urgent: bool = False) -> None:
        """Tell all members; nobody says whether it arrived. Waits while members are too slow.

        Raises `Closed` without a session.
        """
        if not urgent:
            await self._wait_turn()
        flags = URGENT if urgent else 0
        self._connection.post(Kind.CAST, flags=flags, to=self._joined(), data=data)

    async def _request(self, kind: Kind, data: bytes, timeout_s: float, urgent: bool) -> Any:
        if not urgent and (self._may_speak is not None or self._connection.is_full):
            loop = asyncio.get_running_loop()
            began = loop.time()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._wait_turn()
            except TimeoutError:
                raise TimedOut(f"members of {self.name} are too slow: nothing was sent") from None
            timeout_s -= loop.time() - began
        flags = URGENT if urgent else 0
        to = self._joined()
        return await self._connection.request(kind, timeout_s, flags=flags, to=to, data=data)

    async def _wait_turn(self) -> None:
        while self._may_speak is not None:
            await self._may_speak.wait()
        await self._connection.wait_writable()

    def _let_speak(self, may: bool) -> None:
        if may and self._may_speak is not None:
            self._may_speak.set()
            self._may_speak = None
        elif not may and self._may_speak is None:
            self._may_speak = asyncio.Event()

    def _joined(self) -> int:
        if self._client._numbered.get(self._number) is not self:
            raise Closed(f"{self._client.name} is not in the room {self.name} now")
        return self._number

    @overload
    def on_message(self, handler: Handler) -> Handler: ...
    @overload
    def on_message(self, *, concurrent: bool = False) -> Callable[[Handler], Handler]: ...
    def on_message(self, handler: Handler | None = None, *, concurrent: bool = False) -> Any:
        """Decorate the handler of what is said here; as `Client.on_message`.

        That it returned acknowledges; what it returned is the reply, for those who ask. Without a
        handler whatever is said here is refused by us.
        """
        return register(self._inbox, handler, concurrent)

    def on_presence(self, callback: Callback) -> Callback:
        """Call `callback(presence)` when a member joined, left, is unknown, or known again."""
        self._presence.add(callback)
        return callback

    def on_state(self, callback: Callback) -> Callback:
        """Call `callback(change)` when a member of this room put or deleted a value."""
        self._state_changed.add(callback)
        return callback

    def leave(self) -> None:
        """Leave the room. Idempotent; the hub is told at once, or knows when the session ended."""
        joined = self._client._numbered.get(self._number) is self
        self._client._forget(self)
        if joined:
            self._connection.post(Kind.LEAVE, to=self._number)

    async def _enter(self, timeout_s: float) -> None:
        await self._connection.request(Kind.JOIN, timeout_s, flags=self._flags, name=self.name)
