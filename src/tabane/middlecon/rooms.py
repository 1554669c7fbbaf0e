"""Who is where: members, rooms and shared state, as one hub knows them; without IO.

Each hub is the authority on the members that have a session with it, and tells its links of them.
What comes back over the links is in `directory`, which is built on this.

Rooms and members have numbers, given by each hub for itself and never given twice, so that a frame
that was on its way when its room ended reaches nobody else. Over a link a frame names its target by
the number of the hub that *receives* it.

`Rooms` is told what happened and puts frames into the outboxes of `Port`s. The hub's shell writes
those out, once per port and turn of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count
from typing import TYPE_CHECKING

from tabane.errors import Busy
from tabane.middlecon.frames import (
    CHANGES,
    GONE,
    LOST,
    Change,
    JoinFlag,
    Kind,
    check_name,
    encode_frame,
)
from tabane.middlecon.ports import LinkPort, Port, SessionPort, passes
from tabane.middlecon.session import Limits

if TYPE_CHECKING:
    from tabane.middlecon.tallies import Book


class Member:
    """A named process, with its `number` here. `port` leads to it (None: unknown); behind a link
    (`via`, also while that is down) `address` is its number at the other end.
    `asleep`: it is frozen, so nothing is sent to it and its silence means nothing; kept by its own
    hub only. `run` marks the run of its program."""

    __slots__ = (
        "address",
        "asleep",
        "hub",
        "name",
        "number",
        "port",
        "rooms",
        "run",
        "state",
        "unsynced",
        "version",
        "via",
    )

    def __init__(self, name: str, number: int, hub: str, port: Port, run: int) -> None:
        self.name = name
        self.number = number
        self.hub = hub
        self.run = run
        self.port: Port | None = port
        self.via = port if isinstance(port, LinkPort) else None
        self.address = 0
        self.asleep = False
        self.rooms: dict[Room, None] = {}
        self.state: dict[str, bytes] = {}
        """The last STATE frame of each key."""
        self.unsynced: set[str] = set()
        """Keys that the opening link has not told again yet."""
        self.version = 0


class Room:
    """`local` are members here, `remote` those behind each link, `lost` those behind a dead one."""

    __slots__ = (
        "addresses",
        "asleep",
        "epoch",
        "local",
        "lost",
        "messages",
        "name",
        "number",
        "pending",
        "presences",
        "remote",
        "sessions",
        "slow",
        "speakers",
        "watchers",
        "when_slow",
    )

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.number = number
        self.epoch = 0
        self.messages = 0
        """How many were said here, as far as this hub was told."""
        self.pending: Book = {}
        """Those whose fate is not known yet."""
        self.sessions: dict[Port, None] = {}
        self.watchers: dict[Port, None] = {}
        self.local: dict[Port, Member] = {}
        self.remote: dict[LinkPort, dict[str, Member]] = {}
        self.presences: dict[str, bytes] = {}
        """The frames that name its members to who joins: made once, as thousands may come at once,
        each of whom is told of all."""
        self.addresses: dict[LinkPort, int] = {}
        """The room's number at the other end of each link."""
        self.lost: dict[str, Member] = {}
        self.speakers: dict[Port, None] = {}
        """Who sent something here."""
        self.slow: dict[Port | tuple[LinkPort], None] = {}
        """Those for whom the speakers wait."""
        self.when_slow: dict[Port, int] = {}
        """Members here who want something else to be done, as flags of JOIN."""
        self.asleep: dict[Port, Member] = {}
        """Those of `local` that are frozen."""

    @property
    def size(self) -> int:
        """How many members it has that can be reached."""
        return len(self.local) + sum(map(len, self.remote.values()))

    @property
    def empty(self) -> bool:
        return not (self.sessions or self.remote or self.lost)

    def members(self) -> Iterable[tuple[Member, Change]]:
        for member in self.local.values():
            yield member, Change.JOINED
        for behind in self.remote.values():
            for member in behind.values():
                yield member, Change.JOINED
        for member in self.lost.values():
            yield member, Change.UNKNOWN


class Rooms:
    """The decisions about the members, rooms and state of this hub's sessions."""

    def __init__(self, hub: str, limits: Limits) -> None:
        self.hub = hub
        """This hub's own name."""
        self.limits = limits
        self.members: dict[str, Member] = {}
        self.addressed: dict[int, Member] = {}
        """The same by number."""
        self.rooms: dict[str, Room] = {}
        self.numbered: dict[int, Room] = {}
        self.sessions: dict[SessionPort, None] = {}
        self.links: dict[str, LinkPort] = {}
        self.on_unheard: Callable[[Port, Room], None] = lambda port, room: None
        """Called when a member here has left a room, sleeps, or wants something else to be done
        when it is slow: nobody waits for it."""
        self._numbers = count(1)
        self.on_back: Callable[[Room, Member], None] = lambda room, member: None
        """Called when a member joined a room, is known again, or awake."""

    # Sessions

    def open_session(self, port: SessionPort) -> None:
        """A member is here. The caller made sure that no session of this hub has its name; one of
        another hub, that this hub was told of, is over."""
        known = self.members.get(port.name)
        if known is not None:
            self._forget(known)
        port.member = self._add_member(port.name, self.hub, port, port.run)
        self.sessions[port] = None
        self._tell_links(None, self._member_frame(port.member))

    def close_session(self, port: SessionPort) -> None:
        for room in list(port.rooms.values()):
            self._leave(port, room)
        del self.sessions[port]
        self._forget(port.member)

    def join(self, port: SessionPort, name: str, flags: int, id: int) -> None:
        """Let a session into a room, or change what it is there.

        It gets JOIN with the room's number, then, if it watches, a snapshot as presence and state
        frames, then SYNCED. Raises `Busy` at a limit.
        """
        room = self._enter(port, name)
        port.send(encode_frame(Kind.JOIN, to=room.number, name=room.name))
        if flags & JoinFlag.WATCH:
            room.watchers[port] = None
            self._send_snapshot(port, room)
        elif port in room.watchers:
            del room.watchers[port]
        if policy := flags & (JoinFlag.DROP_OLDEST | JoinFlag.DISCONNECT):
            room.when_slow[port] = policy
            self.on_unheard(port, room)
        else:
            room.when_slow.pop(port, None)
        if flags & JoinFlag.MEMBER and port not in room.local:
            room.local[port] = port.member
            if port.member.asleep:
                room.asleep[port] = port.member
            self._changed(room, port.member, Change.JOINED)
            self._tell_state(room, port.member)
        elif not flags & JoinFlag.MEMBER and port in room.local:
            self._leave_as_member(port, room)
        port.send(encode_frame(Kind.SYNCED, id=id, to=room.number, value=room.epoch))

    def leave(self, port: SessionPort, number: int) -> None:
        if (room := port.rooms.get(number)) is not None:
            self._leave(port, room)

    def put(self, port: SessionPort, key: str, value: bytes) -> None:
        """Publish a value under the member's name. Raises `Busy` at a limit."""
        member, limits = port.member, self.limits
        check_name(key, "state key")
        if key not in member.state and len(member.state) >= limits.state_keys:
            raise Busy(f"{member.name} has {limits.state_keys} state keys: delete one first")
        if len(value) > limits.state_bytes:
            raise Busy(f"a state value has at most {limits.state_bytes} bytes, this {len(value)}")
        self._set_state(member, key, value)

    def delete(self, port: SessionPort, key: str) -> None:
        if key in port.member.state:
            self._delete_state(port.member, key)

    def set_asleep(self, member: Member, asleep: bool) -> None:
        """One of this hub's members was frozen, or thawed."""
        member.asleep = asleep
        for room in member.rooms:
            if asleep and member.port is not None:
                room.asleep[member.port] = member
                self.on_unheard(member.port, room)
            elif member.port is not None:
                room.asleep.pop(member.port, None)
                self.on_back(room, member)

    # What the parts share

    def _add_member(self, name: str, hub: str, port: Port, run: int) -> Member:
        member = Member(check_name(name), next(self._numbers), hub, port, run)
        self.members[name] = self.addressed[member.number] = member
        return member

    def _member_frame(self, member: Member) -> bytes:
        return encode_frame(
            Kind.MEMBER,
            flags=LOST if member.port is None else 0,
            to=member.number,
            value=member.run,
            name=member.name,
            data=member.hub.encode(),
        )

    def _enter(self, port: SessionPort, name: str) -> Room:
        room = self.rooms.get(name)
        if room is not None and room.number in port.rooms:
            return room
        if len(port.rooms) >= self.limits.rooms_per_session:
            raise Busy(f"{port.name} is in {len(port.rooms)} rooms, the most one may: leave some")
        if room is None and len(self.rooms) >= self.limits.rooms:
            raise Busy(f"hub {self.hub} has {len(self.rooms)} rooms, the most it takes")
        room = self._room(name)
        port.rooms[room.number] = room
        room.sessions[port] = None
        return room

    def _room(self, name: str) -> Room:
        room = self.rooms.get(name)
        if room is None:
            room = Room(check_name(name, "room name"), next(self._numbers))
            self.rooms[name] = self.numbered[room.number] = room
        return room

    def _leave(self, port: SessionPort, room: Room) -> None:
        room.watchers.pop(port, None)
        room.speakers.pop(port, None)
        room.when_slow.pop(port, None)
        if port in room.local:
            self._leave_as_member(port, room)
        del room.sessions[port], port.rooms[room.number]
        if room.pending:
            port.left = {**{other: None for other in port.left if other.pending}, room: None}
        self._maybe_end(room)

    def _leave_as_member(self, port: SessionPort, room: Room) -> None:
        del room.local[port]
        room.asleep.pop(port, None)
        self.on_unheard(port, room)
        self._changed(room, port.member, Change.LEFT)

    def _remove(self, room: Room, member: Member) -> None:
        """Take another hub's member out of a room."""
        if room.lost.pop(member.name, None) is None and member.via is not None:
            del room.remote[member.via][member.name]
            self._prune(room, member.via)
        self._changed(room, member, Change.LEFT)
        self._maybe_end(room)

    def _prune(self, room: Room, link: LinkPort) -> None:
        if not room.remote[link]:
            del room.remote[link], room.addresses[link]

    def _maybe_end(self, room: Room) -> None:
        if room.empty:
            del self.rooms[room.name], self.numbered[room.number]

    def _forget(self, member: Member) -> None:
        """A member is gone for good."""
        for room in list(member.rooms):
            self._remove(room, member)
        del self.members[member.name], self.addressed[member.number]
        if member.via is not None:
            member.via.members.pop(member.name, None)
        self._tell_links(member.via, encode_frame(Kind.MEMBER, flags=GONE, name=member.name))

    def _changed(self, room: Room, member: Member, change: Change) -> None:
        """Record and tell a change of membership, to watchers and links."""
        room.epoch += 1
        frame = presence_frame(room, member, change, member.hub)
        if change is Change.LEFT:
            del member.rooms[room], room.presences[member.name]
        else:
            member.rooms[room] = None
            room.presences[member.name] = frame
        for watcher in room.watchers:
            watcher.send(frame)
        if self.links:
            self._tell_links(member.via, presence_frame(room, member, change, room.name))
        if change in (Change.JOINED, Change.BACK):
            self.on_back(room, member)

    def _send_snapshot(self, port: Port, room: Room) -> None:
        if room.presences:
            port.tell(b"".join(room.presences.values()))
        for member in [member for member, _ in room.members() if member.state]:
            for frame in member.state.values():
                port.tell(frame)

    def _tell_state(self, room: Room, member: Member) -> None:
        for frame in member.state.values():
            for watcher in room.watchers:
                watcher.send(frame)

    def _set_state(self, member: Member, key: str, value: bytes) -> None:
        frame = member.state[key] = self._state_frame(member, key, value, 0)
        self._spread_state(member, frame)

    def _delete_state(self, member: Member, key: str) -> None:
        if member.state.pop(key, None) is not None:
            self._spread_state(member, self._state_frame(member, key, b"", GONE))

    def _state_frame(self, member: Member, key: str, value: bytes, flags: int) -> bytes:
        member.version += 1
        text = key.encode()
        return encode_frame(
            Kind.STATE,
            flags=flags,
            id=member.version,
            value=len(text),
            name=member.name,
            data=text + value,
        )

    def _spread_state(self, member: Member, frame: bytes) -> None:
        """To each session that shares a room with it, once, and to links."""
        for watcher in {watcher: None for room in member.rooms for watcher in room.watchers}:
            watcher.send(frame)
        self._tell_links(member.via, frame)

    def _tell_links(self, source: LinkPort | None, frame: bytes) -> None:
        """Pass on what came over `source`, or what happened here (None)."""
        opening = source is not None and not source.synced
        for link in self.links.values():
            if passes(source, link):
                (link.tell if opening else link.send)(frame)

    def _tell_sessions(self, frame: bytes) -> None:
        for session in self.sessions:
            session.send(frame)


def presence_frame(room: Room, member: Member, change: Change, data: str) -> bytes:
    """`data`: the member's hub, for sessions; the room's name, for links."""
    return encode_frame(
        Kind.PRESENCE,
        flags=CHANGES.index(change),
        to=room.number,
        value=room.epoch,
        name=member.name,
        data=data.encode(),
    )
