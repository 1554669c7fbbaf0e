"""The asyncio client: a member's session with its hub, its rooms and its state.

    async with await connect("unix:///run/tabane/hub.sock", name="web-1") as me:
        room = await me.join("deploys")

When the session is lost the client dials again, with growing pauses; then it publishes its state
and joins its rooms again, handlers and callbacks stay, and `on_connected` callbacks are called.
Meanwhile whatever needs the hub fails at once with `Closed`, except `state.put` and
`state.delete`, which then take effect with the next session. Nothing is sent twice by itself.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, overload

import msgspec

from tabane.errors import Busy, Closed, Denied, ProtocolError
from tabane.middlecon.addresses import parse_url
from tabane.middlecon.administration import Administration
from tabane.middlecon.agreement import deliver_step
from tabane.middlecon.connection import TIMEOUT_S, Connection
from tabane.middlecon.directory import RETURN_S
from tabane.middlecon.frames import (
    CHANGES,
    GONE,
    OPEN,
    STOP,
    URGENT,
    Frame,
    JoinFlag,
    Kind,
    check_given_name,
)
from tabane.middlecon.inbox import Handler, Inbox, Message, register
from tabane.middlecon.joined import WHEN_SLOW, Callback, Room, WhenSlow
from tabane.middlecon.own_state import OwnState
from tabane.middlecon.session import Hello, Welcome, error_of
from tabane.middlecon.views import (
    Callbacks,
    Presence,
    StateChange,
    StateTable,
)
from tabane.middlecon.wire import Wire
from tabane.supervise import Supervisor

log = logging.getLogger(__name__)

__all__ = ["Callback", "Client", "Room", "WhenSlow", "connect"]


async def connect(
    url: str, *, name: str | None = None, token: str | None = None, timeout_s: float = 5.0
) -> Client:
    """A session with the hub at `tcp://HOST:PORT` or `unix:///PATH`, as the member `name`.

    Names are unique in the cluster; without one a random name is taken. In a container the hub puts
    the instance's identity before it (docs/services.md): `name` of the client says so. Tries for
    `timeout_s`, as the hub may be just starting. Raises `Unreachable`, `TimedOut`, `Conflict` (the
    name is taken), `Unauthenticated`, `Denied`, `UsageError`. Cancelling it leaves nothing behind.
    """
    client = Client(url, name or f"member-{secrets.token_hex(4)}", token, drawn=not name)
    try:
        await client._connection.start(timeout_s)
    except BaseException:
        await client.aclose()
        raise
    return client


class Client(Administration):
    """A member of the cluster: made by `connect`. Leaving its `async with` block closes it."""

    def __init__(self, url: str, name: str, token: str | None, *, drawn: bool = False) -> None:
        self.name = check_given_name(name)
        self.hub = ""
        """The name of the hub."""
        self.hubs: dict[str, bool] = {}
        """The hub's peers, and whether their links are open. Stale while not `connected`."""
        self._tasks = Supervisor(f"middlecon {name}")
        hello = Hello(self.name, uuid.uuid4().hex, token=token or "", drawn=drawn)
        self._connection = Connection(parse_url(url), hello, self, self._tasks)
        self._rooms: dict[str, Room] = {}
        self._numbered: dict[int, Room] = {}
        self._refused: set[Room] = set()
        """Rooms that the hub did not let us into again. They are asked for at the next session."""
        self._table = StateTable()
        self.state = OwnState(self._connection)
        self._inbox = Inbox(name, self._tasks)
        self._connected = Callbacks("on_connected", self._tasks)
        self._disconnected = Callbacks("on_disconnected", self._tasks)
        self._hub_changed = Callbacks("on_hub", self._tasks)
        requests = self._connection.requests
        self._actions: dict[int, Callable[[Wire, Frame], None]] = {
            Kind.ACK: lambda wire, frame: requests.on_ack(frame),
            Kind.NACK: lambda wire, frame: requests.on_nack(frame),
            Kind.ANSWER: lambda wire, frame: requests.on_answer(frame),
            Kind.RECEIPT: lambda wire, frame: requests.on_receipt(frame),
            Kind.PRESENCE: self._on_presence,
            Kind.STATE: self._on_state,
            Kind.JOIN: self._on_join,
            Kind.SYNCED: self._on_synced,
            Kind.HUB: self._on_hub,
            Kind.FLOW: self._on_flow,
            Kind.SAY: self._on_room_message,
            Kind.ASK: self._on_room_message,
            Kind.CAST: self._on_room_message,
            Kind.SEND: self._on_direct,
            Kind.CALL: self._on_direct,
            Kind.POST: self._on_direct,
            Kind.PREPARE: self._on_step,
            Kind.OUTCOME: self._on_step,
            Kind.AGREED: lambda wire, frame: requests.on_agreed(frame),
            Kind.ERROR: self._on_error,
            Kind.GOODBYE: self._on_goodbye,
        }

    @property
    def connected(self) -> bool:
        return self._connection.connected

    @property
    def trouble(self) -> str:
        """Why the last session was lost, or the last attempt to have one again failed."""
        return self._connection.trouble

    def fileno(self) -> int:
        """The descriptor of the session's socket, for who must know it; -1 without a session."""
        wire = self._connection._wire
        sock = None if wire is None else wire.transport.get_extra_info("socket")
        return -1 if sock is None else int(sock.fileno())

    # Messages to one member

    async def call(self, member: str, data: bytes, *, timeout_s: float = TIMEOUT_S) -> bytes:
        """What the member's handler returns.

        Raises `NotFound` (no such member), `Refused` (its handler raised; `reason` is the code of
        its error), `Busy` (too much waits for it), `Unreachable` (the link to its hub is down),
        `TimedOut`, `Closed` (its session, ours, or a link between them ended). After the last two
        the handler may have run. Cancelling stops the waiting, not the handler.
        """
        await self._connection.wait_writable()
        answer: bytes = await self._connection.request(Kind.CALL, timeout_s, name=member, data=data)
        return answer

    async def send(self, member: str, data: bytes, *, timeout_s: float = TIMEOUT_S) -> None:
        """Return when the member's handler has returned. Raises as `call` does."""
        await self._connection.wait_writable()
        await self._connection.request(Kind.SEND, timeout_s, name=member, data=data)

    def send_nowait(self, member: str, data: bytes, *, urgent: bool = False) -> None:
        """Send, in order with the other messages to this member; nobody says whether it arrived.

        Urgent ones overtake the others. Raises `Closed` while there is no session.
        """
        flags = URGENT if urgent else 0
        self._connection.post(Kind.POST, flags=flags, name=member, data=data)

    async def hub_stats(self) -> dict[str, Any]:
        """What there is at our hub and what waits: counts by name. Raises `Closed`, `TimedOut`."""
        data = await self._connection.request(Kind.STATS, TIMEOUT_S)
        stats: dict[str, Any] = msgspec.msgpack.decode(data)
        return stats

    @overload
    def on_message(self, handler: Handler) -> Handler: ...
    @overload
    def on_message(self, *, concurrent: bool = False) -> Callable[[Handler], Handler]: ...
    def on_message(self, handler: Handler | None = None, *, concurrent: bool = False) -> Any:
        """Decorate the handler of what is sent to this member: `handler(message) -> bytes | None`.

        Messages of one sender are handled one after the other. With `concurrent=True` they begin in
        the order they were sent and may overlap, so that one that takes long holds up no others. A
        plain function is called at once, without a task; it must be quick.
        """
        return register(self._inbox, handler, concurrent)

    # Rooms, hubs and the session

    async def join(
        self,
        name: str,
        *,
        member: bool = True,
        watch: bool = True,
        when_slow: WhenSlow = WhenSlow.WAIT,
        timeout_s: float = TIMEOUT_S,
    ) -> Room:
        """Enter a room. Returns when its members and their state are known.

        `member=False`: to speak or watch only; nobody is told, and nothing said there comes here.
        `watch=False`: do not follow its members and state. Joining again returns the same room,
        and changes what we are there. `when_slow`: what is done when too much waits for us.
        Raises `Busy` (a limit of the hub), `Closed`, `TimedOut`.
        """
        flags = (JoinFlag.MEMBER if member else 0) | (JoinFlag.WATCH if watch else 0)
        flags |= WHEN_SLOW[when_slow]
        room = self._rooms.get(name)
        if room is None:
            room = self._rooms[name] = Room(self, check_given_name(name, "room name"), flags)
            try:
                await room._enter(timeout_s)
            except BaseException:
                room.leave()
                raise
            finally:
                room._entered.set()
        elif not room._entered.is_set():  # somebody else is about to
            await room._entered.wait()
            return await self.join(
                name, member=member, watch=watch, when_slow=when_slow, timeout_s=timeout_s
            )
        elif room._flags != flags or room in self._refused:
            room._flags = flags
            await room._enter(timeout_s)
            self._refused.discard(room)
        return room

    def on_connected(self, callback: Callback) -> Callback:
        """Call `callback()` whenever there is a session again, with rooms joined, state known."""
        self._connected.add(callback)
        return callback

    def on_disconnected(self, callback: Callback) -> Callback:
        """Call `callback()` whenever the session was lost, other than by `aclose`."""
        self._disconnected.add(callback)
        return callback

    def on_hub(self, callback: Callback) -> Callback:
        """Call `callback(hub, open)` when our hub's link to another opened, or is down."""
        self._hub_changed.add(callback)
        return callback

    async def aclose(self) -> None:
        """Say goodbye and close. Idempotent. Handlers that still run are cancelled."""
        self._connection.close()
        self._let_all_speak()
        await self._tasks.aclose()
        await self._connection.wait_closed()

    def abort(self) -> None:
        """Drop the connection at once, as a crash would. The client dials again, until `aclose`."""
        self._connection.abort()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    # What the connection tells

    def on_welcome(self, welcome: Welcome) -> None:
        """A session is open."""
        self.hub = welcome.hub
        for room in self._rooms.values():
            room.ballot.on_hub_gone(self.hub, welcome.instance)
        self.name = welcome.name or self.name
        self._numbered.clear()
        for hub in self.hubs.keys() - welcome.hubs.keys():
            self._set_hub(hub, None)
        for hub, is_open in welcome.hubs.items():
            self._set_hub(hub, is_open)

    def on_frame(self, wire: Wire, frame: Frame) -> None:
        """Act on a frame. Raises `ProtocolError`."""
        action = self._actions.get(frame.kind)
        if action is None:
            raise ProtocolError(f"a hub sends no frames of kind {frame.kind}")
        action(wire, frame)

    async def restore(self) -> None:
        """Publish our state and join our rooms again, and find out what has changed.

        A room that we may not enter any more stays as it is, and needs `join` to be had again."""
        self.state.publish()
        self._table.begin_snapshot()
        self._refused.clear()
        for room in list(self._rooms.values()):
            try:
                await room._enter(TIMEOUT_S)
            except (Busy, Denied) as error:
                log.warning("%s is not in %s any more: %s", self.name, room.name, error.message)
                self._refused.add(room)
                room._let_speak(True)  # so that who waits hears that it is closed
        self._drop_stale_state()
        self._tasks.start("hubs that are not linked again", self._forget_unlinked())

    async def _forget_unlinked(self) -> None:
        """Our hub will link to whom it was linked before, if it is to be linked to at all."""
        await asyncio.sleep(RETURN_S)
        self._settle(lambda hub: hub not in self.hubs)

    def _settle(self, over: Callable[[str], bool]) -> None:
        for room in self._rooms.values():
            for presence in room.members.settle(over):
                self._on_change(room, presence)
        self._drop_stale_state()

    def _drop_stale_state(self) -> None:
        """Delete what was not published again, of all members but those that are still kept."""
        rooms = self._rooms.values()
        for member, key in self._table.end_snapshot(
            lambda name: not any(room.members.keeps(name) for room in rooms)
        ):
            self._set_state(member, key, None)

    def on_restored(self) -> None:
        self._connected.fire()

    def on_lost(self) -> None:
        self._let_all_speak()
        self._disconnected.fire()

    # What frames do

    def _on_room_message(self, wire: Wire, frame: Frame) -> None:
        if (room := self._numbered.get(frame.to)) is not None:
            room._inbox.deliver(Message(wire, frame, room.name))

    def _on_step(self, wire: Wire, frame: Frame) -> None:
        deliver_step(self._rooms, self._numbered, wire, frame)

    def _on_direct(self, wire: Wire, frame: Frame) -> None:
        self._inbox.deliver(Message(wire, frame, None))

    def _on_join(self, wire: Wire, frame: Frame) -> None:
        room = self._rooms.get(frame.name)
        if room is None:
            self._connection.post(Kind.LEAVE, to=frame.to)
        else:
            room._number = frame.to
            self._numbered[frame.to] = room
            room._let_speak(True)
            room.members.begin_snapshot()

    def _on_synced(self, wire: Wire, frame: Frame) -> None:
        if (room := self._numbered.get(frame.to)) is not None:
            for presence in room.members.end_snapshot(self._is_linked):
                self._on_change(room, presence)
        self._connection.requests.on_ack(frame)

    def _on_presence(self, wire: Wire, frame: Frame) -> None:
        room = self._numbered.get(frame.to)
        if room is None or frame.flags >= len(CHANGES):
            return
        hub = frame.data.decode(errors="replace")
        presence = room.members.apply(frame.name, CHANGES[frame.flags], hub)
        if presence is not None:
            self._on_change(room, presence)

    def _on_flow(self, wire: Wire, frame: Frame) -> None:
        if (room := self._numbered.get(frame.to)) is not None:
            room._let_speak(not frame.flags & STOP)

    def _on_change(self, room: Room, presence: Presence) -> None:
        """Tell it, and forget the state of who is in none of our rooms any more."""
        if not any(presence.member in other.members for other in self._rooms.values()):
            self._table.drop(presence.member)
        room._presence.fire(presence)

    def _is_linked(self, hub: str) -> bool:
        return hub == self.hub or self.hubs.get(hub, False)

    def _on_state(self, wire: Wire, frame: Frame) -> None:
        key = frame.data[: frame.value].decode(errors="replace")
        value = None if frame.flags & GONE else frame.data[frame.value :]
        self._set_state(frame.name, key, value)

    def _set_state(self, member: str, key: str, value: bytes | None) -> None:
        if self._table.put(member, key, value):
            for room in self._rooms.values():
                if member in room.members:
                    room._state_changed.fire(StateChange(member, key, value))

    def _on_hub(self, wire: Wire, frame: Frame) -> None:
        if frame.flags & (GONE | OPEN):
            self._settle(lambda hub: hub == frame.name)
        if frame.flags & GONE:
            for room in self._rooms.values():
                room.ballot.on_hub_gone(frame.name)
        self._set_hub(frame.name, None if frame.flags & GONE else bool(frame.flags & OPEN))

    def _set_hub(self, hub: str, is_open: bool | None) -> None:
        """`None`: it was unlinked, and is no peer any more."""
        if self.hubs.get(hub) is is_open:
            return
        if is_open is None:
            del self.hubs[hub]
        else:
            self.hubs[hub] = is_open
        self._hub_changed.fire(hub, bool(is_open))

    def _on_error(self, wire: Wire, frame: Frame) -> None:
        wire.lose(error_of(frame.name, frame.data.decode(errors="replace")))

    def _on_goodbye(self, wire: Wire, frame: Frame) -> None:
        wire.lose(Closed(f"hub {self.hub} said goodbye"))

    def _let_all_speak(self) -> None:
        """There is no session whose members could be slow: who waits learns that."""
        for room in self._rooms.values():
            room._let_speak(True)

    def _forget(self, room: Room) -> None:
        self._refused.discard(room)
        room._let_speak(True)
        if self._rooms.get(room.name) is room:
            del self._rooms[room.name]
        if self._numbered.get(room._number) is room:
            del self._numbered[room._number]
