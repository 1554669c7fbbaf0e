"""A hub's sockets for programs in containers: opens and closes them, and guards what comes in.

What is decided about it stands in `tabane.middlecon.contained`. A socket is bound anew whenever the
hub is told to serve it; who is in the container sees it there, since what is shown to it is the
directory.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from msgspec.structs import replace

from tabane.errors import Busy, Conflict, Denied, NotFound, TabaneError
from tabane.middlecon.addresses import Unix, listen_on
from tabane.middlecon.contained import (
    Served,
    choose_name,
    encode_refusal,
    find_refusal,
    matches,
    parse_served,
)
from tabane.middlecon.directory import Directory
from tabane.middlecon.frames import ASLEEP, Frame, Kind, encode_frame
from tabane.middlecon.ports import Port, SessionPort
from tabane.middlecon.reactor import Reactor
from tabane.middlecon.relay import Relay
from tabane.middlecon.session import Hello
from tabane.middlecon.wire import Wire

EVERYONE = 0o666
"""Users of a container may connect; others do not get through the instance's own directory."""


class Place:
    """One instance's socket: what was said of it, and the connections that came through it."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.sock: socket.socket | None = None
        self.wires: set[Wire] = set()

    def ports(self) -> list[SessionPort]:
        """Of those that have said hello."""
        return [wire.port for wire in self.wires if isinstance(wire.port, SessionPort)]


class Guest(Protocol):
    """What the hub knows of a session's owner."""

    instance: str


GuestT = TypeVar("GuestT", bound=Guest)


@dataclass(frozen=True)
class Host(Generic[GuestT]):
    """What the hub does for it."""

    make_wire: Callable[[Place], Wire]
    may_serve: Callable[[SessionPort], bool]
    """Whether it is root, or has the token."""
    guest_at: Callable[[SessionPort], GuestT]
    gives_way: Callable[[GuestT, Hello], bool]
    wires: Mapping[Port, Wire]


class Serving:
    """See the module's text."""

    def __init__(self, host: Host[Any], directory: Directory, relay: Relay) -> None:
        self._host = host
        self._directory = directory
        self._places: dict[str, Place] = {}
        self._reactor: Reactor | None = None
        relay.handle(Kind.SERVE, self.answering(self._serve))
        relay.handle(Kind.UNSERVE, self.answering(self._unserve))
        relay.handle(Kind.SLEEP, self.answering(self._sleep))

    def start(self, reactor: Reactor) -> None:
        self._reactor = reactor

    def close(self) -> None:
        """The hub ends: its sockets go. Sessions end as the hub's others do."""
        while self._places:
            Path(self._places.popitem()[0]).unlink(missing_ok=True)

    # Connections

    def on_accept(self, place: Place, wire: Wire) -> None:
        """A connection that says nothing takes a descriptor, too."""
        place.wires.add(wire)
        if len(place.wires) > 2 * place.served.sessions:
            wire.lose(Busy(f"too many connections of {place.served.identity}"))

    def admit(self, place: Place, hello: Hello) -> Hello:
        """The HELLO as the hub takes it, under the name it gives. Raises `Denied`, `Busy`."""
        served, ports = place.served, place.ports()
        runs = {self._host.guest_at(port).instance: port.name for port in ports}
        runs.pop("", None)
        if len(ports) >= served.sessions and hello.instance not in runs:
            raise Busy(f"{served.identity} has {served.sessions} sessions, the most it may")
        name = choose_name(
            served.identity, hello, runs, lambda name: self._is_free(place, name, hello)
        )
        return replace(hello, name=name)

    def _is_free(self, place: Place, name: str, hello: Hello) -> bool:
        member = self._directory.members.get(name)
        if member is None or not isinstance(member.port, SessionPort):
            return True
        guest = self._host.guest_at(member.port)
        return member.port in place.ports() and self._host.gives_way(guest, hello)

    def open(self, place: Place, wire: Wire) -> None:
        """Its session is open: from now on the hub gets only what it may send."""
        port, on_frame, directory = wire.port, wire.on_frame, self._directory
        assert isinstance(port, SessionPort)

        def on_any(wire: Wire, frame: Frame) -> None:
            error = find_refusal(place.served, port, frame, directory.members)
            if error is None:
                on_frame(wire, frame)
            elif frame.id:
                port.send(encode_refusal(frame, error))

        wire.on_frame = on_any
        if place.served.asleep:
            self._set_asleep([port], True)

    # What agents say

    def answering(
        self, act: Callable[[Frame], None]
    ) -> Callable[[SessionPort, Frame, float], None]:
        """The handler of a frame that only root, or who has the token, may send."""

        def handle(port: SessionPort, frame: Frame, now: float) -> None:
            try:
                if not self._host.may_serve(port):
                    raise Denied(f"{port.name} may not say what this hub serves: only root may")
                act(frame)
            except TabaneError as error:
                port.send(encode_refusal(frame, error))
            else:
                port.send(encode_frame(Kind.ACK, id=frame.id))

        return handle

    def _serve(self, frame: Frame) -> None:
        served = parse_served(frame)
        place = self._places.get(served.path)
        if place is not None and place.served.identity != served.identity:
            raise Conflict(f"{place.served.identity} is served at {served.path}")
        if place is None:
            place = Place(served)
            self._bind(place)
            self._places[served.path] = place
        place.served = served
        for port in place.ports():
            for number, room in list(port.rooms.items()):
                if not matches(served.rooms, room.name):
                    self._directory.leave(port, number)
        self._set_asleep(place.ports(), served.asleep)

    def _bind(self, place: Place) -> None:
        assert self._reactor is not None
        path = Path(place.served.path)
        place.sock = listen_on(Unix(path))
        path.chmod(EVERYONE)
        place.sock.setblocking(False)
        self._reactor.listen(place.sock, lambda: self._host.make_wire(place))

    def _unserve(self, frame: Frame) -> None:
        path = frame.data.decode(errors="replace")
        place = self._places.pop(path, None)
        if place is None:
            return
        assert self._reactor is not None
        assert place.sock is not None
        self._reactor.close_listener(place.sock)
        Path(path).unlink(missing_ok=True)
        for wire in list(place.wires):
            wire.cut(Denied(f"{place.served.identity} is not served any more"))

    def _sleep(self, frame: Frame) -> None:
        """An instance's members, or one member of this hub."""
        asleep = bool(frame.flags & ASLEEP)
        found = [p for p in self._places.values() if p.served.identity == frame.name]
        ports = [port for place in found for port in place.ports()]
        for place in found:
            place.served.asleep = asleep
        member = self._directory.members.get(frame.name)
        if member is not None and isinstance(member.port, SessionPort):
            ports.append(member.port)
        if not found and not ports:
            raise NotFound(f"this hub serves no {frame.name}, nor has it a member of that name")
        self._set_asleep(ports, asleep)

    def _set_asleep(self, ports: Iterable[SessionPort], asleep: bool) -> None:
        """A thawed member gets the whole time that a silent one has."""
        for port in ports:
            self._directory.set_asleep(port.member, asleep)
            if not asleep:
                self._host.wires[port].forgive()
