"""The hub: accepts sessions and links, and performs what `Relay` and `Directory` decide.

All is done in the callbacks of one event loop; the only tasks are those that dial peers. Who may
come in is decided in `_admit`: with a token, those who have it, and on unix sockets root and the
hub's own user; without one (a hub that stands alone) everyone who reaches a unix socket or the
loopback, and the hub refuses to listen elsewhere.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import socket
import uuid
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from tabane.errors import (
    Busy,
    Closed,
    Conflict,
    Denied,
    ProtocolError,
    Refused,
    TabaneError,
    TimedOut,
    Unauthenticated,
    UsageError,
)
from tabane.middlecon import native
from tabane.middlecon.addresses import BACKLOG, describe, is_loopback, listen_on, parse_url
from tabane.middlecon.agree import mark_of_run
from tabane.middlecon.directory import Directory
from tabane.middlecon.door import Door
from tabane.middlecon.frames import Frame, Kind, check_given_name, check_name
from tabane.middlecon.linking import Linking, Peer, parse_peers
from tabane.middlecon.ports import LinkPort, Port, SessionPort
from tabane.middlecon.reactor import Reactor
from tabane.middlecon.relay import Relay
from tabane.middlecon.serving import Host, Place, Serving
from tabane.middlecon.session import (
    Hello,
    Limits,
    Session,
    Side,
    Welcome,
    agree_version,
    encode_welcome,
    parse_hello,
)
from tabane.middlecon.wire import Flusher, Wire
from tabane.security.identity import Principal, peer_principal
from tabane.supervise import Supervisor

HEARTBEAT_S = 3.0
TICK_S = 0.02
"""How exactly deadlines are kept; there is a tick only while messages are pending."""
HELLO_CHECKS = 5
"""Thirds of a heartbeat that a connection may take to say hello (5 s unless told)."""

_GOODBYE, _ERROR = int(Kind.GOODBYE), int(Kind.ERROR)
_OF_LINKS = frozenset({int(Kind.HUB), int(Kind.SYNCED)})


class _Guest:
    """Who has a connection, as far as known: at first nobody, then a session or a link."""

    __slots__ = ("checks", "instance", "place", "port", "principal")

    def __init__(self, principal: Principal | None, place: Place | None = None) -> None:
        self.principal = principal
        self.place = place
        """The socket it came through, if that is one for a container."""
        self.port: SessionPort | LinkPort | None = None
        self.instance = ""
        self.checks = 0


class Hub:
    """One hub. `async with Hub(...) as hub`, or `start()` and `aclose()`.

    `listen` holds listening (or bound) socket objects, of which the hub takes ownership, and URLs.
    With a `token`, dialers on TCP must have it. Raises `UsageError` for a TCP address that is not
    loopback without a token, and for an empty one. `chat`: whether people may talk in the lobby, of
    whom no token is asked; by default only where nobody needs one.
    """

    def __init__(
        self,
        name: str = "hub",
        *,
        listen: Iterable[socket.socket | str] = (),
        token: str | None = None,
        limits: Limits | None = None,
        heartbeat_s: float = HEARTBEAT_S,
        datacenter: str = "",
        chat: bool | None = None,
    ) -> None:
        self.name = check_given_name(name, "hub name")
        if token is not None and not token:
            raise UsageError("the token of a hub is not empty: whoever shows none would have it")
        self.limits = limits or Limits()
        self.heartbeat_s = heartbeat_s
        self._token = token
        self._instance = uuid.uuid4().hex
        self._listen = list(listen)
        if datacenter:
            check_given_name(datacenter, "data center")
        self._directory = Directory(name, self.limits, datacenter)
        self._relay = Relay(self._directory, self._instance)
        self._acknowledge = self._relay.acknowledge
        self._directory.on_namesake = self._end_namesake
        chat = token is None if chat is None else chat
        self._door = Door(self._directory, self._relay, chat=chat)
        self._wires: dict[Port, Wire] = {}
        host = Host(self._make_wire, self._may_serve, self._guest_at, self._gives_way, self._wires)
        self._serving = Serving(host, self._directory, self._relay)
        self._guests: dict[Wire, _Guest] = {}
        self._addresses: list[str] = []
        self._reactor: Reactor | None = None
        self._bound: list[Path] = []
        self._tasks = Supervisor(f"hub {name}")
        self._linking = Linking(
            self._directory,
            self._instance,
            self._tasks,
            adopt=self._adopt_link,
            close=self._close,
        )
        self._relay.handle(
            Kind.HUBS, self._serving.answering(lambda frame: self.set_peers(parse_peers(frame)))
        )
        self._next_tick: asyncio.TimerHandle | None = None
        self._next_check: asyncio.TimerHandle | None = None
        self._closing = False

    @property
    def peers(self) -> dict[str, bool]:
        """The hubs this one was linked to, and whether the link is open."""
        return dict(self._directory.hubs)

    @property
    def troubles(self) -> dict[str, str]:
        """Why the last attempt to dial a peer failed, for those where it did."""
        return self._linking.troubles

    @property
    def members(self) -> dict[str, str]:
        """All members of the cluster this hub knows, and each one's hub."""
        return {member.name: member.hub for member in self._directory.members.values()}

    @property
    def people(self) -> list[str]:
        """The addresses of those in chat mode."""
        return self._door.people

    @property
    def addresses(self) -> list[str]:
        """Where it listens: `HOST:PORT` or the path of a unix socket."""
        return list(self._addresses)

    # Life

    async def start(self) -> None:
        """Begin to accept. Raises `UsageError` or `Conflict` when an address cannot be had."""
        self._loop = asyncio.get_running_loop()
        self._flusher = Flusher()
        self._reactor = Reactor(self._loop, self._flusher)
        self._serving.start(self._reactor)
        self._linking.start(self._flusher)
        if native.loops is not None:
            self._relay.fan_out = native.loops.fan_out
        try:
            for where in self._listen:
                self._serve(where, self._reactor)
        except BaseException:
            await self.aclose()
            raise
        self._check_silence()

    def _serve(self, where: socket.socket | str, reactor: Reactor) -> None:
        if isinstance(where, str):
            sock = listen_on(parse_url(where))
            if sock.family == socket.AF_UNIX:
                self._bound.append(Path(where.removeprefix("unix://")))
        else:
            sock = where
        if sock.family != socket.AF_UNIX and self._token is None and not is_loopback(sock):
            described = describe(sock.getsockname())
            sock.close()
            raise UsageError(f"{described} is open to others: a hub there needs a token")
        sock.setblocking(False)
        sock.listen(BACKLOG)
        reactor.listen(sock, self._make_wire)
        path = where.removeprefix("unix://") if isinstance(where, str) else ""
        is_unix = sock.family == socket.AF_UNIX
        self._addresses.append(path if path and is_unix else describe(sock.getsockname()))

    def expect(self, peer: str) -> None:
        """There is a hub `peer`, which dials us, or is reached through others."""
        self._linking.expect(peer)

    def link(
        self, peer: str, url: str, token: str | None = None, *, datacenter: str | None = None
    ) -> None:
        """Keep a link to the hub `peer` at `url`, by dialing it whenever there is none.

        Of other data centers it dials one, if it should (see `linking`). Call it after `start`.
        Naming a peer again with another URL or token replaces the first, and leaves an open link
        alone. Raises `UsageError` for a bad URL.
        """
        here = self._directory.datacenter
        self._linking.link(Peer(peer, url, here if datacenter is None else datacenter), token)

    def unlink(self, peer: str) -> None:
        """The peer will not come back: stop dialing, close its link, take its members as left."""
        self._linking.unlink(peer)

    def is_linked(self, peer: str) -> bool:
        return peer in self._directory.links

    def _close(self, port: Port, error: Conflict | None) -> None:
        if (wire := self._wires.get(port)) is not None:
            if error is None:
                wire.close()
            else:
                wire.cut(error)

    def set_peers(self, peers: Sequence[Peer]) -> None:
        """These are all the hubs there are: `link`, `expect` or `unlink` each accordingly. One that
        is linked is not taken for gone before its link is. The token is the hub's own."""
        self._linking.set_peers(peers, self._token)

    async def aclose(self) -> None:
        """Say goodbye to all and stop. Idempotent. Sockets given by descriptor stay bound."""
        self._closing = True
        for timer in (self._next_tick, self._next_check):
            if timer is not None:
                timer.cancel()
        self._addresses.clear()
        self._door.close()
        if self._reactor is not None:
            self._reactor.close_listeners()
        await self._tasks.aclose()
        wires = list(self._guests)
        for wire in wires:
            wire.close()
        for wire in wires:
            await wire.wait_closed()
        if self._reactor is not None:
            self._reactor.close()
        self._serving.close()
        while self._bound:
            self._bound.pop().unlink(missing_ok=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    # Connections

    def _make_wire(self, place: Place | None = None) -> Wire:
        return Wire(
            Session(Side.HUB, self.limits.data_bytes),
            self._flusher,
            self._on_first_frame,
            self._on_lost,
            queue_bytes=self.limits.queue_bytes,
            hold_bytes=self.limits.hold_bytes,
            on_made=self._on_accept if place is None else partial(self._on_accept, place=place),
            on_text=self._door.on_text if place is None else None,
        )

    def _on_accept(self, wire: Wire, place: Place | None = None) -> None:
        sock = wire.transport.get_extra_info("socket")
        is_unix = sock.family == socket.AF_UNIX
        self._guests[wire] = _Guest(peer_principal(sock) if is_unix else None, place)
        if place is not None:
            self._serving.on_accept(place, wire)
        else:
            self._door.on_accept(wire)

    def _on_first_frame(self, wire: Wire, frame: Frame) -> None:
        try:
            hello = parse_hello(frame)
            version = agree_version(hello.versions)
            guest = self._guests[wire]
            if guest.place is not None:
                hello = self._serving.admit(guest.place, hello)
            else:
                check_name(hello.name)
                self._admit(guest.principal, hello)
            if hello.role == "hub":
                self._make_way_for_link(hello)
            else:
                self._make_way_for_member(wire, hello)
        except TabaneError as error:
            wire.cut(error)
            return
        self._open(wire, hello, version)

    def _admit(self, principal: Principal | None, hello: Hello) -> None:
        """Whether the dialer may come in at all. Raises `Unauthenticated` or `Denied`."""
        if self._token is None or hmac.compare_digest(hello.token.encode(), self._token.encode()):
            return
        if hello.token:
            raise Denied(f"the token that {hello.name} shows is not that of this cluster")
        if principal is None:
            raise Unauthenticated(f"hub {self.name} wants the cluster's token")
        if not principal.is_root:
            raise Denied(f"uid {principal.uid} may not use hub {self.name}: show the token")

    def _may_serve(self, port: SessionPort) -> bool:
        """Whether a member may say what this hub serves: root, and who has the token."""
        guest = self._guest_at(port)
        if guest.place is not None:
            return False
        return self._token is not None or (guest.principal is not None and guest.principal.is_root)

    def _guest_at(self, port: Port) -> _Guest:
        return self._guests[self._wires[port]]

    def _make_way_for_member(self, wire: Wire, hello: Hello) -> None:
        """One session per name: a dead one gives way. Raises `Conflict` or `Busy`."""
        self._door.check_name(hello.name)
        member = self._directory.members.get(hello.name)
        if member and isinstance(member.port, LinkPort) and member.run != number_of_run(hello):
            raise Conflict(f"the name {hello.name} is taken by a session of hub {member.hub}")
        other = self._wires.get(member.port) if member and member.port else None
        if other is None or not isinstance(other.port, SessionPort):
            if len(self._directory.sessions) >= self.limits.sessions:
                raise Busy(
                    f"hub {self.name} has {self.limits.sessions} sessions, the most it takes"
                )
        elif self._gives_way(self._guests[other], hello):
            other.cut(Conflict(f"a newer session has taken the name {hello.name}"))
        else:
            raise Conflict(f"the name {hello.name} is taken by another session of this hub")

    def _end_namesake(self, port: SessionPort, hub: str) -> None:
        error = Conflict(f"hub {hub} has a session with the name {port.name}, too: one is enough")
        if (wire := self._wires.get(port)) is not None:  # people share a port that has none
            wire.cut(error)

    def _gives_way(self, old: _Guest, hello: Hello) -> bool:
        """The same run of the program is back, or the old process has ended."""
        if old.instance == hello.instance:
            return True
        return old.principal is not None and not _is_alive(old.principal.pid)

    def _make_way_for_link(self, hello: Hello) -> None:
        """One link per peer. Raises `Conflict`, `Refused`."""
        if hello.name == self.name:
            raise Refused(f"two hubs are named {self.name}")
        if self._linking.is_dialing(hello.name) and self.name < hello.name:
            raise Conflict(f"hub {self.name} is dialing {hello.name} itself")
        if hello.name not in self._directory.links and self._directory.hubs.get(hello.name):
            raise Conflict(f"hub {hello.name} is reached from hub {self.name} already")
        if (port := self._directory.links.get(hello.name)) is not None:
            other = self._wires[port]
            if self._guests[other].instance == hello.instance:
                raise Conflict(f"hubs {self.name} and {hello.name} have a link already")
            other.cut(Conflict(f"hub {hello.name} was started again"))

    def _open(self, wire: Wire, hello: Hello, version: int) -> None:
        guest = self._guests[wire]
        guest.instance = hello.instance
        welcome = Welcome(
            self.name,
            self._instance,
            self._directory.datacenter,
            version,
            heartbeat_s=self.heartbeat_s,
            data_bytes=self.limits.data_bytes,
            hubs=self._directory.hubs,
            name=hello.name if guest.place is not None else "",
        )
        wire.greet(encode_welcome(welcome))
        if hello.role == "hub":
            self._open_link(wire, hello.name, hello.datacenter)
        else:
            port = SessionPort(hello.name, wire.wake, number_of_run(hello))
            self._take(wire, port)
            self._directory.open_session(port)
            if guest.place is not None:
                self._serving.open(guest.place, wire)

    def _adopt_link(self, wire: Wire, peer: str, welcome: Welcome) -> None:
        """A link we dialed is open. Raises `Refused` or `Conflict` when it is not wanted."""
        if welcome.hub != peer:
            raise Refused(f"the hub there is {welcome.hub}, not {peer}")
        if self.is_linked(peer) or not self._linking.wants(peer) or self._closing:
            raise Conflict(f"hubs {self.name} and {peer} have a link already")
        guest = self._guests[wire] = _Guest(None)
        guest.instance = welcome.instance
        wire.on_lost = self._on_lost
        wire.session.set_limit(self.limits.data_bytes)
        self._open_link(wire, peer, welcome.datacenter)

    def _open_link(self, wire: Wire, peer: str, datacenter: str) -> None:
        port = LinkPort(peer, wire.wake, self._guests[wire].instance, datacenter)
        self._take(wire, port)
        self._directory.open_link(port)
        self._linking.on_changed()

    def _take(self, wire: Wire, port: SessionPort | LinkPort) -> None:
        """From now on the wire is the port's, with what was in its outbox before."""
        port.out = wire.port.out
        wire.port = self._guests[wire].port = port
        self._wires[port] = wire
        wire.on_frame = self._on_frame
        wire.on_ack = self._acknowledge
        wire.on_drained = self._relay.flow.drained

    def _on_frame(self, wire: Wire, frame: Frame) -> None:
        port = wire.port
        assert isinstance(port, (SessionPort, LinkPort))
        if frame.kind == _GOODBYE:
            wire.lose(Closed(f"{port.name} said goodbye"), linger=True)
        elif frame.kind == _ERROR:
            wire.lose(ProtocolError(frame.data.decode(errors="replace")), linger=True)
        else:
            self._relay.receive(port, frame, self._loop.time())
            if frame.kind in _OF_LINKS or self._directory.cuts:
                self._linking.on_changed()
            if self._next_tick is None and self._relay.pending:
                self._next_tick = self._loop.call_later(TICK_S, self._tick)

    def _on_lost(self, wire: Wire, error: TabaneError) -> None:
        guest = self._guests.pop(wire)
        self._door.on_lost(wire)
        if guest.place is not None:
            guest.place.wires.discard(wire)
        if guest.port is None or self._closing:
            return
        del self._wires[guest.port]
        self._relay.close(guest.port)
        if isinstance(guest.port, LinkPort):
            self._linking.on_lost(guest.port.name, error.message)

    # Time

    def _tick(self) -> None:
        self._next_tick = None
        self._relay.expire(self._loop.time())
        if self._relay.pending:
            self._next_tick = self._loop.call_later(TICK_S, self._tick)

    def _check_silence(self) -> None:
        self._next_check = self._loop.call_later(self.heartbeat_s / 3, self._check_silence)
        self._relay.check(self._loop.time())
        if self._next_tick is None:
            self._tick()
        for wire, guest in list(self._guests.items()):
            if guest.port is not None:
                if not (isinstance(guest.port, SessionPort) and guest.port.member.asleep):
                    wire.check()
                continue
            if self._door.check(wire):
                continue
            guest.checks += 1
            if guest.checks > HELLO_CHECKS:
                wire.cut(TimedOut("nobody said hello on this connection"))


def number_of_run(hello: Hello) -> int:
    """What marks this run of a program for other hubs."""
    return int.from_bytes(mark_of_run(hello.instance))


def _is_alive(pid: int) -> bool:
    """Whether a process of this pid namespace still runs; one of another (pid 0) is taken to."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
