"""Who is where: members, rooms, shared state and hubs, as one hub knows them; without IO.

Each hub is the authority on the members that have a session with it. It tells its links about them
(MEMBER, PRESENCE, STATE), and so every hub has a replica of all. A link that opens first tells
everything and then SYNCED; what the other side knew before and was not told again is gone. While a
link is down its members are *unknown*: kept, and marked. So are those of a hub that was started
again, for the moment they need to come back to it.

Rooms and members have numbers, given by each hub for itself and never given twice, so that a frame
that was on its way when its room ended reaches nobody else. Over a link a frame names its target by
the number of the hub that *receives* it.

`Directory` is told what happened and puts frames into the outboxes of `Port`s. The hub's shell
writes those out, once per port and turn of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count

from tabane.errors import Busy, ProtocolError
from tabane.middlecon.frames import (
    CHANGES,
    GONE,
    OPEN,
    Change,
    Frame,
    JoinFlag,
    Kind,
    check_name,
    encode_frame,
)
from tabane.middlecon.session import Limits

RETURN_S = 5.0
"""How long the members of a hub that was started again may take to come back before they are taken
as left: more than twice the longest pause of a client that dials."""


class Port:
    """One session or link as the decisions see it: a name and an outbox.

    `wake` is called when the empty outbox gets its first frame. `backlog` is what the shell could
    not write yet, in bytes. `dropped` counts casts that were not queued because of it.
    """

    __slots__ = ("backlog", "dropped", "name", "out", "wake")

    def __init__(self, name: str, wake: Callable[[], None]) -> None:
        self.name = name
        self.wake = wake
        self.out: list[bytes] = []
        self.backlog = 0
        self.dropped = 0

    def send(self, frame: bytes) -> None:
        if not self.out:
            self.wake()
        self.out.append(frame)


class SessionPort(Port):
    """A member's session. `rooms` are those it joined, as member or not, by number."""

    __slots__ = ("member", "rooms")
    member: Member

    def __init__(self, name: str, wake: Callable[[], None]) -> None:
        super().__init__(name, wake)
        self.rooms: dict[int, Room] = {}


class LinkPort(Port):
    """A link to the hub `name`, of which `instance` is the running one. `members` are its own."""

    __slots__ = ("instance", "members")

    def __init__(self, name: str, wake: Callable[[], None], instance: str = "") -> None:
        super().__init__(name, wake)
        self.instance = instance
        self.members: dict[str, Member] = {}


class Member:
    """A named process. `port` leads to it (None: unknown); `address` is its number at its hub.
    `asleep`: it is frozen, so nothing is sent to it and its silence means nothing; kept by its own
    hub only."""

    __slots__ = (
        "address",
        "asleep",
        "hub",
        "name",
        "port",
        "rooms",
        "state",
        "unsynced",
        "version",
    )

    def __init__(self, name: str, hub: str, port: Port | None, address: int) -> None:
        self.name = name
        self.hub = hub
        self.port = port
        self.address = address
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
        "name",
        "number",
        "remote",
        "sessions",
        "watchers",
    )

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.number = number
        self.epoch = 0
        self.sessions: dict[Port, None] = {}
        self.watchers: dict[Port, None] = {}
        self.local: dict[Port, Member] = {}
        self.remote: dict[Port, dict[str, Member]] = {}
        self.addresses: dict[Port, int] = {}
        """The room's number at the other end of each link."""
        self.lost: dict[str, Member] = {}
        self.asleep: dict[Port, Member] = {}
        """Those of `local` that are frozen."""

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


class Directory:
    """The decisions about membership and state. `hub` is this hub's own name."""

    def __init__(self, hub: str, limits: Limits) -> None:
        self.hub = hub
        self.limits = limits
        self.members: dict[str, Member] = {}
        self.locals: dict[int, Member] = {}
        """This hub's own members by number."""
        self.rooms: dict[str, Room] = {}
        self.numbered: dict[int, Room] = {}
        self.sessions: dict[SessionPort, None] = {}
        self.links: dict[str, LinkPort] = {}
        self.hubs: dict[str, bool] = {}
        """The peers, and whether their links are open and told everything."""
        self._instances: dict[str, str] = {}
        """Of the peers, as last synced."""
        self._returning: dict[str, float] = {}
        """Peers that were started again, and when what has not come back has left."""
        self._numbers = count(1)

    # Sessions

    def open_session(self, port: SessionPort) -> None:
        """A member is here. The caller made sure that no session of this hub has its name."""
        known = self.members.get(port.name)
        if known is not None:
            self._forget(known)
        member = Member(port.name, self.hub, port, next(self._numbers))
        port.member = self.members[port.name] = self.locals[member.address] = member
        self.sessions[port] = None
        self._tell_links(encode_frame(Kind.MEMBER, to=member.address, name=member.name))

    def close_session(self, port: SessionPort) -> None:
        for room in list(port.rooms.values()):
            self._leave(port, room)
        member = port.member
        del self.sessions[port], self.members[member.name], self.locals[member.address]
        self._tell_links(encode_frame(Kind.MEMBER, flags=GONE, name=member.name))

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
        if flags & JoinFlag.MEMBER and port not in room.local:
            room.local[port] = port.member
            if port.member.asleep:
                room.asleep[port] = port.member
            self._changed(room, port.member, Change.JOINED)
            self._tell_state(room, port.member)
        elif not flags & JoinFlag.MEMBER and port in room.local:
            self._leave_as_member(port, room)
        port.send(encode_frame(Kind.SYNCED, id=id, to=room.number))

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
            elif member.port is not None:
                room.asleep.pop(member.port, None)

    # Links

    def add_hub(self, name: str) -> None:
        """There is such a peer; its link is not open yet."""
        if name not in self.hubs:
            self._set_hub(name, open=False)

    def open_link(self, link: LinkPort) -> None:
        """Tell a peer all about our members. It does the same; SYNCED ends both."""
        self.links[link.name] = link
        self.add_hub(link.name)
        for member in self.locals.values():
            link.send(encode_frame(Kind.MEMBER, to=member.address, name=member.name))
            for frame in member.state.values():
                link.send(frame)
            for room in member.rooms:
                link.send(self._presence_for_links(room, member, Change.JOINED))
        link.send(encode_frame(Kind.SYNCED))

    def close_link(self, link: LinkPort) -> None:
        """A link died: its members become unknown."""
        if self.links.get(link.name) is not link:
            return
        del self.links[link.name]
        self._returning.pop(link.name, None)
        self._set_hub(link.name, open=False)
        for member in link.members.values():
            member.port = None
            for room in member.rooms:
                self._lose(room, member, link)

    def forget_hub(self, name: str) -> None:
        """A peer will not come back (its node's lease ended): its members have left."""
        if self.hubs.pop(name, None) is None:
            return
        self._instances.pop(name, None)
        for member in [m for m in self.members.values() if m.hub == name]:
            self._forget(member)
        self._tell_sessions(encode_frame(Kind.HUB, flags=GONE, name=name))

    def on_member(self, link: LinkPort, frame: Frame) -> None:
        """A peer's member is there, or gone. A name that has a session here is ours."""
        known = self.members.get(frame.name)
        if frame.flags & GONE:
            if known is not None and known.port is link:
                self._forget(known)
        elif known is not None and known.hub == link.name:
            known.port, known.address = link, frame.to
            known.unsynced = set(known.state)
            link.members[frame.name] = known
        elif known is None or known.hub != self.hub:
            if known is not None:
                self._forget(known)
            member = Member(check_name(frame.name), link.name, link, frame.to)
            self.members[member.name] = link.members[member.name] = member

    def on_presence(self, link: LinkPort, frame: Frame) -> None:
        """A peer's member joined a room or left it; `data` is the room's name."""
        member = link.members.get(frame.name)
        if member is None or frame.flags >= len(CHANGES):
            return
        name = _text(frame.data, "room name")
        if CHANGES[frame.flags] is Change.LEFT:
            if (room := self.rooms.get(name)) is not None and room in member.rooms:
                self._remove(room, member)
            return
        room = self._room(name)
        room.addresses[link] = frame.to
        room.remote.setdefault(link, {})[member.name] = member
        if room.lost.pop(member.name, None) is not None:
            self._changed(room, member, Change.BACK)
        elif room not in member.rooms:
            self._changed(room, member, Change.JOINED)
            self._tell_state(room, member)

    def on_state(self, link: LinkPort, frame: Frame) -> None:
        """A peer's member put or deleted a value."""
        member = link.members.get(frame.name)
        if member is None:
            return
        key = _text(frame.data[: frame.value], "state key")
        member.unsynced.discard(key)
        if frame.flags & GONE:
            self._delete_state(member, key)
        else:
            self._set_state(member, key, frame.data[frame.value :])

    def on_synced(self, link: LinkPort, now: float) -> None:
        """The peer has told everything: what it did not name again is gone, or on its way back."""
        before = self._instances.get(link.name, link.instance)
        self._instances[link.name] = link.instance
        if before == link.instance:
            self._settle(link)
        else:
            self._returning[link.name] = now + RETURN_S
        self._set_hub(link.name, open=True)

    def expire(self, now: float) -> None:
        """Take as left what has not come back in time. To be called every second or so."""
        for hub in [hub for hub, until in self._returning.items() if until <= now]:
            del self._returning[hub]
            self._settle(self.links[hub])

    def _settle(self, link: LinkPort) -> None:
        for member in [m for m in self.members.values() if m.hub == link.name]:
            if member.port is not link:
                self._forget(member)
                continue
            for room in [room for room in member.rooms if member.name in room.lost]:
                self._remove(room, member)
            for key in member.unsynced:
                self._delete_state(member, key)
            member.unsynced = set()

    # Decisions they share

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
        if port in room.local:
            self._leave_as_member(port, room)
        del room.sessions[port], port.rooms[room.number]
        self._maybe_end(room)

    def _leave_as_member(self, port: SessionPort, room: Room) -> None:
        del room.local[port]
        room.asleep.pop(port, None)
        self._changed(room, port.member, Change.LEFT)

    def _remove(self, room: Room, member: Member) -> None:
        """Take another hub's member out of a room."""
        if room.lost.pop(member.name, None) is None and member.port is not None:
            del room.remote[member.port][member.name]
            self._prune(room, member.port)
        self._changed(room, member, Change.LEFT)
        self._maybe_end(room)

    def _lose(self, room: Room, member: Member, link: LinkPort) -> None:
        if room.remote.get(link, {}).pop(member.name, None) is not None:
            room.lost[member.name] = member
            self._prune(room, link)
            self._changed(room, member, Change.UNKNOWN)

    def _prune(self, room: Room, link: Port) -> None:
        if not room.remote[link]:
            del room.remote[link], room.addresses[link]

    def _maybe_end(self, room: Room) -> None:
        if room.empty:
            del self.rooms[room.name], self.numbered[room.number]

    def _forget(self, member: Member) -> None:
        """Another hub's member is gone for good."""
        for room in list(member.rooms):
            self._remove(room, member)
        del self.members[member.name]
        if isinstance(member.port, LinkPort):
            member.port.members.pop(member.name, None)

    def _changed(self, room: Room, member: Member, change: Change) -> None:
        """Record and tell a change of membership: to watchers, and of our own members to links."""
        room.epoch += 1
        if change is Change.LEFT:
            del member.rooms[room]
        else:
            member.rooms[room] = None
        frame = self._presence(room, member, change)
        for watcher in room.watchers:
            watcher.send(frame)
        if member.hub == self.hub:
            self._tell_links(self._presence_for_links(room, member, change))

    def _presence(self, room: Room, member: Member, change: Change) -> bytes:
        return encode_frame(
            Kind.PRESENCE,
            flags=CHANGES.index(change),
            to=room.number,
            value=room.epoch,
            name=member.name,
            data=member.hub.encode(),
        )

    def _presence_for_links(self, room: Room, member: Member, change: Change) -> bytes:
        return encode_frame(
            Kind.PRESENCE,
            flags=CHANGES.index(change),
            to=room.number,
            value=room.epoch,
            name=member.name,
            data=room.name.encode(),
        )

    def _send_snapshot(self, port: Port, room: Room) -> None:
        for member, change in room.members():
            port.send(self._presence(room, member, change))
            for frame in member.state.values():
                port.send(frame)

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
        """To each session that shares a room with it, once; of our own members also to links."""
        for watcher in {watcher: None for room in member.rooms for watcher in room.watchers}:
            watcher.send(frame)
        if member.hub == self.hub:
            self._tell_links(frame)

    def _set_hub(self, name: str, *, open: bool) -> None:
        if self.hubs.get(name) is not open:
            self.hubs[name] = open
            self._tell_sessions(encode_frame(Kind.HUB, flags=OPEN if open else 0, name=name))

    def _tell_links(self, frame: bytes) -> None:
        for link in self.links.values():
            link.send(frame)

    def _tell_sessions(self, frame: bytes) -> None:
        for session in self.sessions:
            session.send(frame)


def _text(data: bytes, what: str) -> str:
    try:
        return check_name(data.decode(), what)
    except UnicodeDecodeError:
        raise ProtocolError(f"a {what} is not UTF-8") from None
