"""Members that are slow: what is done with what waits for them; without IO.

Above `hold_bytes` those who speak in a slow member's rooms are asked to wait (FLOW), over links
too, until all that waited is sent. Who goes on all the same meets the second limit, `queue_bytes`:
a message that wants a receipt fails as overloaded, a cast is dropped and counted. A member may have
asked, when it joined, that its oldest casts are dropped instead, or that it is cut off.
"""

from __future__ import annotations

from tabane.middlecon.directory import Directory
from tabane.middlecon.frames import STOP, Frame, JoinFlag, Kind, encode_frame
from tabane.middlecon.rooms import LinkPort, Port, Room


class Flow:
    """The decisions about slow ports. `hold_bytes`: below it nothing is to be decided."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self.hold_bytes = min(directory.limits.hold_bytes, directory.limits.queue_bytes)
        self._queue_bytes = directory.limits.queue_bytes
        self._held: dict[Port, set[Room]] = {}
        """The rooms whose speakers wait for it."""

    def speaks(self, port: Port, room: Room) -> None:
        """To be called with everything that is sent into a room."""
        if port not in room.speakers:
            room.speakers[port] = None
            if room.slow:
                self._tell(port, room, STOP)

    def takes(self, port: Port, room: Room, copy: bytes) -> bool:
        """Queue `copy` for a port that has more than `hold_bytes` waiting, if that may be."""
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

    def _hold(self, port: Port, room: Room) -> None:
        rooms = self._held.setdefault(port, set())
        if room in rooms:
            return
        rooms.add(room)
        room.slow[port] = None
        if len(room.slow) <= 2:  # the second may be what a link, the first, was not told of
            self._tell_speakers(room, STOP)

    def drained(self, port: Port) -> None:
        """All that waited for it is sent, or it is gone."""
        for room in self._held.pop(port, ()):
            del room.slow[port]
            if not room.slow:
                self._tell_speakers(room, 0)

    def on_flow(self, link: LinkPort, frame: Frame) -> None:
        """Somebody behind a link is slow, or is not any more."""
        room = self._directory.numbered.get(frame.to)
        if room is None:
            return
        if frame.flags & STOP:
            self._hold(link, room)
        elif room in self._held.get(link, ()):
            self._held[link].remove(room)
            del room.slow[link]
            if not room.slow:
                self._tell_speakers(room, 0)

    def _tell_speakers(self, room: Room, flags: int) -> None:
        for port in room.speakers:
            self._tell(port, room, flags)

    def _tell(self, port: Port, room: Room, flags: int) -> None:
        number: int | None = room.number
        if isinstance(port, LinkPort):
            if flags and room.slow.keys() == {port}:
                return  # it told us
            number = room.addresses.get(port)
        if number is not None:
            port.send_first(encode_frame(Kind.FLOW, flags=flags, to=number))
