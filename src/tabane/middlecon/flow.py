"""Members that are slow: what is done with what waits for them; without IO.

Above `hold_bytes` those who speak in a slow member's rooms are asked to wait (FLOW), over links
too, until all that waited is sent. Who goes on all the same meets the second limit, `queue_bytes`:
a message that wants a receipt fails as overloaded, a cast is dropped and counted. A member may have
asked, when it joined, that its oldest casts are dropped instead, or that it is cut off.
"""

from __future__ import annotations

from tabane.middlecon.directory import Directory
from tabane.middlecon.frames import FLAGS_AT, STOP, URGENT, Frame, JoinFlag, Kind, encode_frame
from tabane.middlecon.ports import LinkPort, Port
from tabane.middlecon.rooms import Room

Slow = Port | tuple[LinkPort]
"""For whom speakers wait: a port with too much in its queue here, or (a link,) whose hub said that
somebody behind it is slow."""


class Flow:
    """The decisions about slow ports. `hold_bytes`: below it nothing is to be decided."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self.hold_bytes = min(directory.limits.hold_bytes, directory.limits.queue_bytes)
        self._queue_bytes = directory.limits.queue_bytes
        self._held: dict[Slow, set[Room]] = {}
        """The rooms whose speakers wait for it."""

    def speaks(self, port: Port, room: Room) -> None:
        """To be called with everything that is sent into a room."""
        if port not in room.speakers:
            room.speakers[port] = None
            if room.slow:
                self._tell(port, room, STOP)

    def offer(self, port: Port, room: Room, copy: bytes) -> bool:
        """Queue a message of this room for a port, if that may be."""
        if copy[FLAGS_AT] & URGENT:
            if port.backlog > self._queue_bytes:
                return False
            port.send_first(copy)
            return True
        if port.backlog <= self.hold_bytes:
            port.send(copy)
            return True
        return self.takes(port, room, copy)

    def takes(self, port: Port, room: Room, copy: bytes) -> bool:
        """The same for one that has more than `hold_bytes` waiting, and what is not urgent."""
        policy = room.when_slow.get(port, 0)
        if port.backlog <= self._queue_bytes:
            if not policy:
                self._hold(port, room)
        elif policy & JoinFlag.DISCONNECT:
            self._directory.cuts.append((port, f"{port.backlog} bytes wait for {port.name}"))
            return False
        elif not (policy and self._drop_oldest(port)):
            return False
        port.send(copy)
        return True

    def _drop_oldest(self, port: Port) -> bool:
        dropped = port.queue is not None and port.queue.drop_cast()
        port.dropped += dropped
        return dropped

    def drained(self, port: Port) -> None:
        """All that waited for it is sent, or it is frozen."""
        for room in tuple(self._held.get(port, ())):
            self._release(port, room)

    def leaves(self, port: Port, room: Room) -> None:
        """It is no member of the room any more, or wants something else to be done."""
        self._release(port, room)

    def closed(self, port: Port) -> None:
        """It is gone."""
        self.drained(port)
        if isinstance(port, LinkPort):
            for room in tuple(self._held.get((port,), ())):
                self._release((port,), room)
            for room in self._directory.rooms.values():
                room.speakers.pop(port, None)

    def on_flow(self, link: LinkPort, frame: Frame) -> None:
        """Somebody behind a link is slow, or is not any more."""
        room = self._directory.rooms.get(frame.name)
        if room is None:
            return
        if frame.flags & STOP:
            self._hold((link,), room)
        else:
            self._release((link,), room)

    def _hold(self, slow: Slow, room: Room) -> None:
        rooms = self._held.setdefault(slow, set())
        if room in rooms:
            return
        rooms.add(room)
        room.slow[slow] = None
        if len(room.slow) <= 2:  # the second may be what a link, the first, was not told of
            self._tell_speakers(room, STOP)

    def _release(self, slow: Slow, room: Room) -> None:
        rooms = self._held.get(slow)
        if rooms is None or room not in rooms:
            return
        rooms.remove(room)
        if not rooms:
            del self._held[slow]
        del room.slow[slow]
        if not room.slow:
            self._tell_speakers(room, 0)

    def _tell_speakers(self, room: Room, flags: int) -> None:
        for port in room.speakers:
            self._tell(port, room, flags)

    def _tell(self, port: Port, room: Room, flags: int) -> None:
        if not isinstance(port, LinkPort):
            port.send_first(encode_frame(Kind.FLOW, flags=flags, to=room.number))
        elif not flags or room.slow.keys() - {port, (port,)}:  # else it is what is behind itself
            port.send_first(encode_frame(Kind.FLOW, flags=flags, name=room.name))
