"""What becomes of each message: copies out, fates added up, one receipt back; without IO.

A message that wants an answer is *pending* until the fate of each of its targets is known, at the
latest a moment after its deadline. A `Call` has one target, a `Tally` those of a room: this hub's
own members, and each link that has members behind it, which counts as one and answers with one sum.

What comes over a link goes to this hub's own members, and on over the links that `passes` allows;
the sum of all that goes back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from heapq import nlargest

import msgspec

from tabane.errors import Busy, ProtocolError
from tabane.middlecon.agree import Agreements, make_ids
from tabane.middlecon.chat import LOBBY, Crowd
from tabane.middlecon.directory import Directory
from tabane.middlecon.flow import Flow
from tabane.middlecon.frames import (
    FLAGS_AT,
    GONE,
    MAX_U32,
    URGENT,
    Frame,
    JoinFlag,
    Kind,
    encode_frame,
)
from tabane.middlecon.ports import LinkPort, Port, SessionPort, fan_out, passes
from tabane.middlecon.receipts import Cause, Sum, encode_receipt
from tabane.middlecon.rooms import Member, Room
from tabane.middlecon.tallies import LINK_GRACE_S, Book, Call, Pending, Tally, encode_nack

log = logging.getLogger(__name__)

Handler = Callable[[SessionPort, Frame, float], None]
LinkHandler = Callable[[LinkPort, Frame, float], None]
FanOut = Callable[[Iterable[Port], bytes, int], list[Port]]

STATS_NAMES = 1_000
"""Rooms that are named in statistics at most; links and slow members likewise."""
STATS_BYTES = 480 << 10
"""Of all these names and numbers; the frame takes less than 512 KiB."""
_NUMBER_BYTES = 12
"""Of a number, and of what begins a name, in msgpack at most."""


def _largest(numbers: dict[str, int], limit_bytes: int) -> dict[str, int]:
    """Those with the largest numbers, as many as have room."""
    found: dict[str, int] = {}
    for name in nlargest(STATS_NAMES, numbers, key=numbers.__getitem__):
        limit_bytes -= len(name.encode()) + _NUMBER_BYTES
        if limit_bytes < 0:
            break
        found[name] = numbers[name]
    return found


class Relay:
    """The decisions about messages, and the table of what a frame from a session or link does.

    Handlers take the present moment, raise `ProtocolError` when the other side must be cut off,
    and put frames into outboxes.
    """

    def __init__(self, directory: Directory, instance: str = "") -> None:
        self._directory = directory
        self._limits = directory.limits
        self.pending: Book = {}
        self.flow = Flow(directory)
        directory.on_unheard = self.flow.leaves
        self.fan_out: FanOut = fan_out
        self.agreements = Agreements(self, directory, make_ids(directory.hub, instance))
        directory.on_back = self.agreements.on_back
        directory.on_namesake = lambda port, hub: self.close(port)
        self.crowd: Crowd | None = None
        """This hub's people, where it has chat mode."""
        self._last_id = 0
        self._of_sessions: dict[int, Handler] = {
            Kind.JOIN: self._on_join,
            Kind.LEAVE: lambda port, frame, now: directory.leave(port, frame.to),
            Kind.STATE: self._on_state,
            Kind.SAY: self._on_say,
            Kind.ASK: self._on_say,
            Kind.CAST: self._on_cast,
            Kind.SEND: self._on_call,
            Kind.CALL: self._on_call,
            Kind.POST: self._on_post,
            Kind.ACK: self._on_ack,
            Kind.NACK: self._on_nack,
            Kind.STATS: self._on_stats,
            Kind.AGREE: self.agreements.on_agree,
        }
        self._of_links: dict[int, LinkHandler] = {
            Kind.MEMBER: lambda link, frame, now: directory.on_member(link, frame),
            Kind.PRESENCE: lambda link, frame, now: directory.on_presence(link, frame),
            Kind.STATE: lambda link, frame, now: directory.on_state(link, frame),
            Kind.HUB: lambda link, frame, now: directory.on_hub(link, frame),
            Kind.FLOW: lambda link, frame, now: self.flow.on_flow(link, frame),
            Kind.SYNCED: lambda link, frame, now: directory.on_synced(link, frame, now),
            Kind.SAY: self._on_link_say,
            Kind.ASK: self._on_link_say,
            Kind.CAST: self._on_link_cast,
            Kind.SEND: self._on_link_call,
            Kind.CALL: self._on_link_call,
            Kind.POST: self._on_link_post,
            Kind.PREPARE: self._on_link_say,
            Kind.OUTCOME: self._on_link_outcome,
            Kind.ACK: self._on_ack,
            Kind.NACK: self._on_nack,
            Kind.ANSWER: self._on_answer,
            Kind.RECEIPT: self._on_receipt,
        }

    def handle(self, kind: Kind, handler: Handler) -> None:
        """What frames of sessions of that kind do, which are not the relay's business."""
        self._of_sessions[kind] = handler

    def receive(self, port: SessionPort | LinkPort, frame: Frame, now: float) -> None:
        """Handle one frame. Raises `ProtocolError`: cut the port off."""
        if isinstance(port, SessionPort):
            handler = self._of_sessions.get(frame.kind)
            if handler is not None:
                return handler(port, frame, now)
        elif (on_link := self._of_links.get(frame.kind)) is not None:
            return on_link(port, frame, now)
        raise ProtocolError(f"a frame of kind {frame.kind} is not for this side of the session")

    def acknowledge(self, port: Port, id: int) -> None:
        """The same for an ACK without an answer."""
        if (pending := self.pending.get(id)) is not None:
            pending.on_ack(port, b"")

    def close(self, port: SessionPort | LinkPort) -> None:
        """A session or link is over: settle what waited for it, then take it off the directory."""
        last_id = -1
        while last_id != self._last_id:  # again, if what was settled had something to say
            last_id = self._last_id
            for id in self._concerned(port):
                if (pending := self.pending.get(id)) is not None:
                    try:
                        pending.on_closed(port)
                    except Exception:
                        self._give_up(pending)
        self.flow.closed(port)
        if isinstance(port, SessionPort):
            self._directory.close_session(port)
        else:
            self._directory.close_link(port)

    def expire(self, now: float) -> None:
        """Settle what has passed its deadline: to be called often while `pending` is not empty."""
        for pending in [p for p in self.pending.values() if p.deadline <= now]:
            try:
                pending.on_deadline(now)
            except Exception:
                self._give_up(pending)

    def _concerned(self, port: SessionPort | LinkPort) -> list[int]:
        """What may wait for a port, or be from it, by its ids."""
        if isinstance(port, LinkPort):
            return list(self.pending)
        found = list(port.calls)
        for room in {*port.rooms.values(), *port.left}:
            found += room.pending
        return found

    def _give_up(self, pending: Pending) -> None:
        """A fault of ours costs that message only: who sent it hears nothing more."""
        log.exception("the fate of a message cannot be told")
        with suppress(KeyError):
            pending.forget()

    def check(self, now: float) -> None:
        """Forget what is too old, tell what could not be told: to be called every second or so."""
        self._directory.expire(now)
        self.agreements.expire(now)

    def add_pending(self, pending: Pending, room: Room) -> int:
        """Put it into the books of the hub and a room, and return its id there."""
        id = self._next_id()
        self.pending[id] = room.pending[id] = pending
        return id

    def _on_stats(self, port: SessionPort, frame: Frame, now: float) -> None:
        data = msgspec.msgpack.encode(self.stats())
        port.send(encode_frame(Kind.ACK, id=frame.id, data=data))

    def stats(self) -> dict[str, object]:
        """What there is at this hub, and what waits: counts, and bytes. Of what may be many those
        with the largest numbers are named, as many as one frame can carry; `totals` has all."""
        directory = self._directory
        ports = [*directory.sessions, *directory.links.values()]
        links = {link.name: link.backlog for link in directory.links.values()}
        sizes = {room.name: room.size for room in directory.rooms.values()}
        dropped = {port.name: port.dropped for port in ports if port.dropped}
        named_bytes = min(STATS_BYTES, self._limits.data_bytes // 2) // 4
        rooms = _largest(sizes, named_bytes)
        return {
            "hub": directory.hub,
            "datacenter": directory.datacenter,
            "sessions": len(directory.sessions),
            "members": len(directory.members),
            "links": _largest(links, named_bytes),
            "rooms": rooms,
            "messages": {name: directory.rooms[name].messages for name in rooms},
            "pending": len(self.pending),
            "backlog_bytes": sum(port.backlog for port in ports),
            "dropped": _largest(dropped, named_bytes),
            "totals": {
                "links": len(links),
                "rooms": len(sizes),
                "dropped": sum(dropped.values()),
            },
        }

    # Membership and state

    def _on_join(self, port: SessionPort, frame: Frame, now: float) -> None:
        try:
            if frame.flags & JoinFlag.WATCH and port.backlog > 2 * self._limits.queue_bytes:
                raise Busy(f"{port.backlog} bytes wait for {port.name}: read them before you join")
            self._directory.join(port, frame.name, frame.flags, frame.id)
        except Busy as error:
            port.send(encode_nack(frame.id, Cause.OVERLOADED, error.message))

    def _on_state(self, port: SessionPort, frame: Frame, now: float) -> None:
        try:
            key = frame.data[: frame.value].decode()
            if frame.flags & GONE:
                self._directory.delete(port, key)
            else:
                self._directory.put(port, key, frame.data[frame.value :])
        except UnicodeDecodeError:
            raise ProtocolError(f"{port.name} put a state key that is not UTF-8") from None
        except Busy as error:
            port.send(encode_nack(frame.id, Cause.OVERLOADED, error.message))
        else:
            port.send(encode_frame(Kind.ACK, id=frame.id))

    # To a room

    def _on_say(self, port: SessionPort, frame: Frame, now: float) -> None:
        room = port.rooms.get(frame.to)
        if room is None:
            return port.send(encode_nack(frame.id, Cause.NOT_FOUND, "join the room first"))
        self.flow.speaks(port, room)
        tally = self._count(port, frame, room, port.name, now)
        tally.queue_bytes = self._limits.queue_bytes
        if room.remote or room.lost:
            self._count_links(tally, port, frame, room, port.name, self._directory.height)
        return tally.maybe_end()

    def _on_link_say(self, link: LinkPort, frame: Frame, now: float) -> None:
        if self._may_speak(link, frame):  # else its sender hears of nobody here that it arrived
            self._pass_on(link, frame, now)

    def _on_link_outcome(self, link: LinkPort, frame: Frame, now: float) -> None:
        """To a room (then `flags` says how many links are behind it) or one member, in the name of
        a proposer that need not be there any more."""
        if frame.flags:
            self._pass_on(link, frame, now)
        else:
            self._call_on(link, frame, now)

    def _pass_on(self, link: LinkPort, frame: Frame, now: float) -> None:
        room = self._directory.numbered.get(frame.to)
        if room is None:
            for part in encode_receipt(frame.id, Sum()):
                link.send(part)
        else:
            self.flow.speaks(link, room)
            tally = self._count(link, frame, room, frame.name, now)
            tally.queue_bytes = self._limits.queue_bytes
            self._count_links(tally, link, frame, room, frame.name, frame.flags & ~URGENT)
            tally.maybe_end()

    def say_for(
        self, port: SessionPort, origin: Port, frame: Frame, room: Room, now: float
    ) -> Tally:
        """Say something to all but `port`, which it is from; the receipt goes to `origin`."""
        tally = self._count(port, frame, room, port.name, now)
        tally.report_to(origin)
        self._count_links(tally, port, frame, room, port.name, self._directory.height)
        tally.maybe_end()
        return tally

    def _count_links(
        self, tally: Tally, origin: Port, frame: Frame, room: Room, sender: str, height: int
    ) -> None:
        """Send the copies for those behind links, of which there are `height` to the farthest."""
        asked = self._links_for(room, origin)
        tally.grace_s = LINK_GRACE_S * height
        further = max(height - 1, 1)
        for link in asked:
            tally.expect(link)
            number = room.addresses[link]
            copy = self._copy(frame, number, tally.id, sender, further | frame.flags & URGENT)
            if not self.flow.offer(link, room, copy):
                tally.overloaded_behind(link)
        for name, member in room.lost.items():
            assert member.via is not None
            if member.via not in asked and passes(origin, member.via):
                tally.fail(name, Cause.UNREACHABLE)

    def _count(self, origin: Port, frame: Frame, room: Room, sender: str, now: float) -> Tally:
        """Send the copies to this hub's own members; who is waited for is in the tally."""
        id = self._next_id()
        tally = Tally(self.pending, id, origin, frame, room)
        self.pending[id] = room.pending[id] = tally
        room.messages += 1
        tally.deadline = now + self._timeout_s(frame)
        copy = self._copy(frame, room.number, id, sender, frame.flags & URGENT)
        told = set(room.local)
        told.discard(origin)
        if room.asleep:
            told -= room.asleep.keys()
            tally.add_asleep(m.name for port, m in room.asleep.items() if port is not origin)
        if self.crowd is not None and self.crowd in told:
            told.remove(self.crowd)
            tally.add_told(self.crowd.show(sender, frame.data))
        tally.expect_all(told)
        slow = told if frame.flags & URGENT else self.fan_out(told, copy, self.flow.hold_bytes)
        for port in slow:
            if not self.flow.offer(port, room, copy):
                tally.overloaded(port)
        return tally

    def _on_cast(self, port: SessionPort, frame: Frame, now: float) -> None:
        room = port.rooms.get(frame.to)
        if room is None:
            return
        self._cast(port, room, frame, frame.name if port is self.crowd else port.name)

    def _on_link_cast(self, link: LinkPort, frame: Frame, now: float) -> None:
        room = self._directory.numbered.get(frame.to)
        if room is None:
            return
        is_person = room.name == LOBBY and frame.name not in self._directory.members
        if not is_person and not self._may_speak(link, frame):
            return
        self._cast(link, room, frame, frame.name)

    def _cast(self, origin: Port, room: Room, frame: Frame, sender: str) -> None:
        self.flow.speaks(origin, room)
        room.messages += 1
        flags = frame.flags & URGENT
        copy = self._copy(frame, room.number, 0, sender, flags)
        for port in room.local:
            if port in room.asleep:
                port.dropped += 1
            elif port is not origin:
                self._drop_or_send(port, room, copy)
        for link in self._links_for(room, origin):
            self._drop_or_send(
                link, room, self._copy(frame, room.addresses[link], 0, sender, flags)
            )

    def _links_for(self, room: Room, origin: Port) -> list[LinkPort]:
        """The links that a message goes on over: those with members behind."""
        return [link for link in room.remote if passes(origin, link)]

    def _on_answer(self, link: LinkPort, frame: Frame, now: float) -> None:
        pending = self.pending.get(frame.id)
        if isinstance(pending, Tally):
            pending.on_answer(frame.name, frame.data)

    def _on_receipt(self, link: LinkPort, frame: Frame, now: float) -> None:
        pending = self.pending.get(frame.id)
        if isinstance(pending, Tally):
            pending.on_receipt(link, frame)

    # To one member

    def _on_call(self, port: SessionPort, frame: Frame, now: float) -> None:
        member = self._directory.members.get(frame.name)
        if member is None:
            text = f"there is no member {frame.name}"
            port.send(encode_nack(frame.id, Cause.NOT_FOUND, text))
        elif member.port is None:
            text = f"{frame.name} cannot be reached: the link to hub {member.hub} is down"
            port.send(encode_nack(frame.id, Cause.UNREACHABLE, text))
        else:
            self.call_for(port, frame, member, member.port, port.name, now)

    def _on_link_call(self, link: LinkPort, frame: Frame, now: float) -> None:
        if self._may_speak(link, frame):
            self._call_on(link, frame, now)
        else:
            text = f"{frame.name} is reached in another way by now"
            link.send(encode_nack(frame.id, Cause.UNREACHABLE, text))

    def _call_on(self, link: LinkPort, frame: Frame, now: float) -> None:
        member = self._directory.addressed.get(frame.to)
        if member is None:
            text = "it went away before the message reached it"
            link.send(encode_nack(frame.id, Cause.CLOSED, text))
        elif member.port is None:
            text = f"{member.name} cannot be reached: the link to hub {member.hub} is down"
            link.send(encode_nack(frame.id, Cause.UNREACHABLE, text))
        else:
            self.call_for(link, frame, member, member.port, frame.name, now)

    def call_for(
        self,
        origin: Port,
        frame: Frame,
        member: Member,
        target: Port,
        sender: str,
        now: float,
    ) -> None:
        """Send something to one member; its answer, or why there is none, goes to `origin`."""
        if member.asleep:
            return origin.send(encode_nack(frame.id, Cause.ASLEEP, f"{member.name} is frozen"))
        if target.backlog > self._limits.queue_bytes:
            text = f"too much waits for {member.name}"
            return origin.send(encode_nack(frame.id, Cause.OVERLOADED, text))
        id = self._next_id()
        call = Call(self.pending, id, origin, frame, target, member)
        self.pending[id] = origin.calls[id] = target.calls[id] = call
        call.deadline = now + self._timeout_s(frame)
        self._send(target, self._copy(frame, member.address, id, sender, frame.flags & URGENT))
        return None

    def _on_post(self, port: SessionPort, frame: Frame, now: float) -> None:
        member = self._directory.members.get(frame.name)
        self._post(member, frame, port.name)

    def _on_link_post(self, link: LinkPort, frame: Frame, now: float) -> None:
        if self._may_speak(link, frame):
            self._post(self._directory.addressed.get(frame.to), frame, frame.name)

    def _post(self, member: Member | None, frame: Frame, sender: str) -> None:
        if member is None or member.port is None:
            return
        if member.asleep:
            member.port.dropped += 1
            return
        flags = frame.flags & URGENT
        self._send(member.port, self._copy(frame, member.address, 0, sender, flags))

    def _send(self, port: Port, copy: bytes) -> None:
        if copy[FLAGS_AT] & URGENT:
            port.send_first(copy)
        else:
            port.send(copy)

    # Fates, and what they share

    def _on_ack(self, port: Port, frame: Frame, now: float) -> None:
        if (pending := self.pending.get(frame.id)) is not None:
            pending.on_ack(port, frame.data)

    def _on_nack(self, port: Port, frame: Frame, now: float) -> None:
        if (pending := self.pending.get(frame.id)) is not None:
            pending.on_nack(port, frame)

    def _may_speak(self, link: LinkPort, frame: Frame) -> bool:
        """Whether the sender is one that the hub told of. It may only be another while there are
        two ways to its hub, or were just so."""
        if frame.name in link.members:
            return True
        if not (link.shadowed or link.awaited):
            raise ProtocolError(f"hub {link.name} has no member {frame.name} to speak for")
        return False

    def _copy(self, frame: Frame, to: int, id: int, sender: str, flags: int = 0) -> bytes:
        return encode_frame(
            frame.kind,
            flags=flags,
            to=to,
            id=id,
            value=frame.value,
            name=sender,
            data=frame.data,
        )

    def _drop_or_send(self, port: Port, room: Room, copy: bytes) -> None:
        if not self.flow.offer(port, room, copy):
            port.dropped += 1

    def _timeout_s(self, frame: Frame) -> float:
        return min(frame.value / 1000, self._limits.timeout_s)

    def _next_id(self) -> int:
        self._last_id = self._last_id % MAX_U32 + 1
        return self._last_id
