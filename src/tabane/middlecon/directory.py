"""What linked hubs tell each other of members, rooms, state and hubs; without IO.

A hub tells its links about its members (MEMBER, PRESENCE, STATE) and passes on what other links
told it (`ports.passes`), so every hub has a replica of all. A link that opens first tells
everything and then SYNCED; what the other side knew before and was not told again is gone. While a
link is down what is behind it is *unknown*: kept, and marked. So are the members of a hub that was
started again, for the moment they need to come back to it.

Between data centers there must be one way only. If there are two for a moment, what comes on the
second is not believed, and of two links of one data center that of the hub with the larger name is
cut (`cuts`). When the first way ends, the second is asked to tell again; until it names a hub
again, what it still says of its members was on its way before, and counts for nothing.

A name belongs to one session in all hubs (docs/decisions/one-name.md). Who has the name of a member
elsewhere is not let in, unless it is the same run of it, so two hubs can have one name only if they
could not hear of each other, or the member has moved. A hub that hears of another session with the
name of one of its own ends its own.
"""

from __future__ import annotations

from collections.abc import Callable

from tabane.errors import ProtocolError
from tabane.middlecon.frames import (
    AGAIN,
    CHANGES,
    GONE,
    LOST,
    OPEN,
    Change,
    Frame,
    Kind,
    check_name,
    encode_frame,
)
from tabane.middlecon.ports import LinkPort, Port, Reach, SessionPort, passes
from tabane.middlecon.rooms import Member, Room, Rooms, presence_frame
from tabane.middlecon.session import Limits

RETURN_S = 5.0
"""How long the members of a hub that was started again may take to come back before they are taken
as left: more than twice the longest pause of a client that dials."""


MOST_LINKS = 64
"""To the farthest hub. A tree of data centers is far lower, and what messages count has 6 bits."""


class Directory(Rooms):
    """All members and hubs, this hub's own and those behind its links."""

    def __init__(self, hub: str, limits: Limits, datacenter: str = "") -> None:
        super().__init__(hub, limits)
        self.datacenter = datacenter
        self.hubs: dict[str, bool] = {}
        """The other hubs, and whether they can be reached: all links there are open, and synced."""
        self.cuts: list[tuple[Port, str]] = []
        """Links and sessions that the shell must cut now, and why."""
        self.on_namesake: Callable[[SessionPort, str], None] = lambda port, hub: None
        """Ends a session here at once, whose name is that of one of the other hub."""
        self._ways: dict[str, LinkPort] = {}
        """The link that leads to each hub, or led there last."""
        self._instances: dict[str, str] = {}
        """Of the peers, as last synced."""
        self._returning: dict[str, float] = {}
        """Peers that were started again, and when what has not come back has left."""

    @property
    def height(self) -> int:
        """Over how many links the farthest hub is; at least 1."""
        reaches = (reach for link in self.links.values() for reach in link.hubs.values())
        return max((reach.distance for reach in reaches if reach.open), default=1)

    # Links that open and close

    def add_hub(self, name: str) -> None:
        """There is such a hub; it cannot be reached yet."""
        if name not in self.hubs:
            self._set_hub(name, open=False)

    def open_link(self, link: LinkPort) -> None:
        """Tell a peer all we know. It does the same; SYNCED ends both."""
        self.links[link.name] = link
        self._lead(link, link.name)
        self._set_reach(link, link.name, Reach(False, 1, link.datacenter))
        self._tell_all(link)

    def _tell_all(self, link: LinkPort) -> None:
        for name, way in self._ways.items():
            if passes(way, link):
                link.tell(_hub_frame(name, way.hubs[name]._replace(open=self.hubs[name])))
        for member in self.members.values():
            if member.via is not link and passes(member.via, link):
                self._tell_of_member(link, member)
        link.send(encode_frame(Kind.SYNCED))

    def _tell_of_member(self, link: LinkPort, member: Member) -> None:
        link.tell(self._member_frame(member))
        for frame in member.state.values():
            link.tell(frame)
        for room in member.rooms:
            change = Change.UNKNOWN if member.name in room.lost else Change.JOINED
            link.tell(presence_frame(room, member, change, room.name))

    def close_link(self, link: LinkPort) -> None:
        """A link died: what is behind it becomes unknown."""
        if self.links.get(link.name) is not link:
            return
        del self.links[link.name]
        self._returning.pop(link.name, None)
        for member in list(link.members.values()):
            self._lose_member(member)
        for name, reach in link.hubs.items():
            if self._ways.get(name) is link:
                self._set_reach(link, name, reach._replace(open=False))
                self._look_elsewhere(name)

    def forget_hub(self, name: str) -> None:
        """A hub will not come back (its node's lease ended): its members have left."""
        if self.hubs.pop(name, None) is None:
            return
        self._instances.pop(name, None)
        self._ways.pop(name, None)
        for member in [m for m in self.members.values() if m.hub == name]:
            self._forget(member)
        self._tell_sessions(encode_frame(Kind.HUB, flags=GONE, name=name))

    # What a peer tells

    def on_hub(self, link: LinkPort, frame: Frame) -> None:
        """A hub behind the peer can be reached, or not any more."""
        name = frame.name
        if name in (self.hub, link.name):
            return
        if frame.value >= MOST_LINKS:
            raise ProtocolError(f"hub {link.name} told of {name} over {frame.value} links")
        datacenter = parse_text(frame.data, "data center") if frame.data else ""
        reach = Reach(bool(frame.flags & OPEN), frame.value + 1, datacenter)
        way = self._ways.get(name)
        if way not in (None, link) and (name in self.links or self.hubs.get(name)):
            link.shadowed.add(name)
            if reach.open:
                self._on_second_way(way, link, name)
            return
        self._lead(link, name)
        if link.synced:
            self._set_reach(link, name, reach)
        else:  # it counts as open when all that is behind it has been told
            if not self.hubs.get(name):
                self._set_reach(link, name, reach._replace(open=False))
            link.hubs[name] = reach

    def _lead(self, link: LinkPort, name: str) -> None:
        """From now on `link` leads to that hub."""
        before = self._ways.get(name)
        if before is not None and before is not link:
            before.hubs.pop(name, None)
            before.shadowed.add(name)
        link.shadowed.discard(name)
        link.awaited.discard(name)
        self._ways[name] = link

    def _on_second_way(self, way: LinkPort | None, link: LinkPort, name: str) -> None:
        """`link` leads to a hub that `way` leads to."""
        assert way is not None
        far, near = (link, way) if link.datacenter != self.datacenter else (way, link)
        if far.datacenter == self.datacenter or near.datacenter != self.datacenter:
            return  # what is told of an old way, or those who have the two ways see to it
        if near.name < self.hub:
            self.cuts.append((far, f"hub {name} is reached through {near.name} already"))

    def on_member(self, link: LinkPort, frame: Frame) -> None:
        """A member is there, cannot be reached, or is gone."""
        known = self.members.get(frame.name)
        if frame.flags & GONE:
            if known is not None and known.via is link:
                self._forget(known)
            return
        origin = parse_text(frame.data, "hub name") if frame.data else link.name
        is_elsewhere = known is not None and known.hub != origin and known.port is not None
        if origin == self.hub or link.disbelieves(origin) or (is_elsewhere and frame.flags & LOST):
            return
        if origin != link.name and origin not in link.hubs:
            raise ProtocolError(f"hub {link.name} did not say that it leads to hub {origin}")
        if known is not None and isinstance(known.port, SessionPort):
            self.on_namesake(known.port, origin)
            known = self.members.get(frame.name)
            if known is not None:
                return
        if known is not None and known.hub == origin:
            self._find_again(link, known)
        else:
            if known is not None:
                self._forget(known)
            known = self._add_member(frame.name, origin, link, frame.value)
        known.address = frame.to
        known.run = frame.value
        link.members[known.name] = known
        if frame.flags & LOST:
            self._lose_member(known)
        else:
            self._tell_links(link, self._member_frame(known))

    def _find_again(self, link: LinkPort, member: Member) -> None:
        if member.via is not None and member.via is not link:
            self._lose_member(member)
            member.via.members.pop(member.name, None)
        member.via = member.port = link
        if not link.synced:
            member.unsynced = set(member.state)

    def on_presence(self, link: LinkPort, frame: Frame) -> None:
        """A member joined a room, left it or cannot be reached; `data` is the room's name."""
        member = link.members.get(frame.name)
        if member is None or frame.flags >= len(CHANGES):
            return
        name = parse_text(frame.data, "room name")
        change = CHANGES[frame.flags]
        if change is Change.LEFT:
            if (room := self.rooms.get(name)) is not None and room in member.rooms:
                self._remove(room, member)
            return
        room = self._room(name)
        if change is Change.UNKNOWN or member.port is None:
            if room not in member.rooms:
                room.lost[member.name] = member
                self._changed(room, member, Change.UNKNOWN)
            else:
                self._lose(room, member, link)
            return
        room.addresses[link] = frame.to
        room.remote.setdefault(link, {})[member.name] = member
        if room.lost.pop(member.name, None) is not None:
            self._changed(room, member, Change.BACK)
        elif room not in member.rooms:
            self._changed(room, member, Change.JOINED)
            self._tell_state(room, member)

    def on_state(self, link: LinkPort, frame: Frame) -> None:
        """A member put or deleted a value."""
        member = link.members.get(frame.name)
        if member is None:
            return
        key = parse_text(frame.data[: frame.value], "state key")
        member.unsynced.discard(key)
        if frame.flags & GONE:
            self._delete_state(member, key)
        else:
            self._set_state(member, key, frame.data[frame.value :])

    def on_synced(self, link: LinkPort, frame: Frame, now: float) -> None:
        """The peer has told everything: what it did not name again is gone, or on its way back.
        Or it wants to be told again."""
        if frame.flags & AGAIN:
            self._tell_all(link)
            return
        link.tellings -= 1
        if link.tellings > 0:
            return
        before = self._instances.get(link.name, link.instance)
        self._instances[link.name] = link.instance
        link.synced = True
        if before == link.instance:
            self._settle(link)
        else:
            self._returning[link.name] = now + RETURN_S
        link.hubs[link.name] = link.hubs[link.name]._replace(open=True)
        for name, reach in list(link.hubs.items()):
            self._set_reach(link, name, reach)

    def expire(self, now: float) -> None:
        """Take as left what has not come back in time. To be called every second or so."""
        for hub in [hub for hub, until in self._returning.items() if until <= now]:
            del self._returning[hub]
            self._settle(self.links[hub])

    def _settle(self, link: LinkPort) -> None:
        """Of all that this link leads to, what it did not tell is gone."""
        for member in [m for m in self.members.values() if m.hub in link.hubs]:
            if member.name not in link.members:
                if member.port is None:
                    self._forget(member)
            elif member.port is link:
                for room in [room for room in member.rooms if member.name in room.lost]:
                    self._remove(room, member)
                for key in member.unsynced:
                    self._delete_state(member, key)
                member.unsynced = set()

    # What they share

    def _lose_member(self, member: Member) -> None:
        link, member.port = member.via, None
        assert link is not None
        self._tell_links(link, self._member_frame(member))
        for room in list(member.rooms):
            self._lose(room, member, link)

    def _lose(self, room: Room, member: Member, link: LinkPort) -> None:
        if room.remote.get(link, {}).pop(member.name, None) is not None:
            room.lost[member.name] = member
            self._prune(room, link)
            self._changed(room, member, Change.UNKNOWN)

    def _set_reach(self, link: LinkPort, name: str, reach: Reach) -> None:
        link.hubs[name] = reach
        self._set_hub(name, open=reach.open)
        self._tell_links(link, _hub_frame(name, reach))

    def _set_hub(self, name: str, *, open: bool) -> None:
        if self.hubs.get(name) is open:
            return
        self.hubs[name] = open
        self._tell_sessions(encode_frame(Kind.HUB, flags=OPEN if open else 0, name=name))
        if not open:
            self._look_elsewhere(name)

    def _look_elsewhere(self, name: str) -> None:
        """A hub is not reached any more: what was told of it elsewhere may be believed now."""
        for link in self.links.values():
            if name in link.shadowed:
                link.awaited |= link.shadowed
                link.shadowed.clear()
                link.synced = False
                link.tellings += 1
                link.send(encode_frame(Kind.SYNCED, flags=AGAIN))


def _hub_frame(name: str, reach: Reach) -> bytes:
    return encode_frame(
        Kind.HUB,
        flags=OPEN if reach.open else 0,
        value=reach.distance,
        name=name,
        data=reach.datacenter.encode(),
    )


def parse_text(data: bytes, what: str) -> str:
    """A name in a frame's data. Raises `ProtocolError`."""
    try:
        return check_name(data.decode(), what)
    except UnicodeDecodeError:
        raise ProtocolError(f"a {what} is not UTF-8") from None
