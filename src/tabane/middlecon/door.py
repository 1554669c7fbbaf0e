"""The door of a hub's lobby: which of its connections are people's, and what they send.

A new connection that says nothing for 200 ms hears the lobby, as does one whose first byte is not
that of the magic. If the first byte of a silent one then is, it was a program after all and leaves.
One timer looks after all new connections, in the order in which they came.

What a person sends goes straight from the transport to the lobby: the way of frames knows nothing
of chat.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from functools import partial

from tabane.errors import Busy, Closed, Conflict
from tabane.middlecon.addresses import describe
from tabane.middlecon.chat import Lobby, Person
from tabane.middlecon.directory import Directory
from tabane.middlecon.frames import MAGIC
from tabane.middlecon.reactor import Transport
from tabane.middlecon.relay import Relay
from tabane.middlecon.session import Mode
from tabane.middlecon.wire import Wire
from tabane.security.identity import peer_principal

STUCK_CHECKS = 5
"""Thirds of a heartbeat for which a person may not read what is above the limit of a queue."""
KEEPALIVE_S = 60
"""People are not pinged: the kernel finds out whether a silent one's machine is still there."""


class Door:
    """Takes a hub's new connections (`on_accept`), and those whose first bytes are text (`on_text`,
    None where there is no chat)."""

    def __init__(self, directory: Directory, relay: Relay, *, chat: bool) -> None:
        self.on_text = self._on_text if chat else None
        self._lobby = Lobby(directory, relay.receive)
        relay.crowd = self._lobby.crowd if chat else None
        self._silence_s = directory.limits.silence_s
        self._new: deque[tuple[float, Wire]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def people(self) -> list[str]:
        return [person.name for person in self._lobby.people]

    def close(self) -> None:
        """The hub closes: who leaves now is not listened to. Idempotent."""
        self._closed = True
        self._new.clear()
        if self._timer is not None:
            self._timer.cancel()

    def check_name(self, name: str) -> None:
        """Raises `Conflict` for the name of the people, which no program may have."""
        if self.on_text is not None and name == self._lobby.crowd.name:
            raise Conflict(f"the name {name} is that of the people in chat mode")

    def on_accept(self, wire: Wire) -> None:
        if self.on_text is None:
            return
        loop = asyncio.get_running_loop()
        self._new.append((loop.time() + self._silence_s, wire))
        if self._timer is None:
            self._timer = loop.call_later(self._silence_s, self._look)

    def _on_text(self, wire: Wire) -> None:
        """The first bytes of a connection have come, and are text."""
        text, wire.session.text = wire.session.text, b""
        person = wire.port if isinstance(wire.port, Person) else self._let_in(wire)
        if person is not None:
            _divert(wire, partial(self._on_line, wire, person))
            self._on_line(wire, person, text)

    def on_lost(self, wire: Wire) -> None:
        if isinstance(wire.port, Person) and not self._closed:
            self._lobby.end(wire.port)
            self._lobby.leave(wire.port)

    def check(self, wire: Wire) -> bool:
        """A third of a heartbeat has passed. False: this is nobody of the lobby's."""
        person = wire.port
        if not isinstance(person, Person) or person not in self._lobby.people:
            return False
        if self._lobby.is_stuck(person, STUCK_CHECKS):
            wire.lose(Closed(f"{person.name} does not read: {person.backlog} bytes wait for it"))
        return True

    def _look(self) -> None:
        """Let in who was silent for long enough."""
        loop, new = asyncio.get_running_loop(), self._new
        now = loop.time()
        while new and new[0][0] <= now:
            _, wire = new.popleft()
            if wire.open and wire.session.mode is None and (person := self._let_in(wire)):
                _divert(wire, partial(self._on_first_bytes, wire, person))
        self._timer = loop.call_at(new[0][0], self._look) if new else None

    def _let_in(self, wire: Wire) -> Person | None:
        try:
            person = Person(_introduce(wire.transport.get_extra_info("socket")), wire.wake)
            self._lobby.enter(person)
        except OSError as error:
            wire.lose(Closed(f"it was gone before it was asked for its address: {error}"))
        except Busy as error:
            wire.transport.write(error.message.encode() + b"\n")
            wire.lose(error, linger=True)
        else:
            wire.port = person
            return person
        return None

    def _on_first_bytes(self, wire: Wire, person: Person, data: bytes) -> None:
        """A silent one speaks: person or program?"""
        if data[0] == MAGIC[0]:
            self._lobby.leave(person)
        _divert(wire, wire.data_received)
        wire.data_received(data)

    def _on_line(self, wire: Wire, person: Person, data: bytes) -> None:
        if not self._lobby.receive(person, data):
            wire.session.mode = Mode.HTTP
            wire.refuse_text()


def _divert(wire: Wire, receive: Callable[[bytes], None]) -> None:
    """From now on `receive` gets what comes on this connection."""
    transport = wire.transport
    assert isinstance(transport, Transport)

    def receive_or_fail(data: bytes) -> None:
        try:
            receive(data)
        except Exception as error:
            wire.fail(error)

    transport.data_received = receive_or_fail


def _introduce(sock: socket.socket) -> str:
    """What a person is called: the address, or on this machine the process, it speaks from."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{peer_principal(sock).pid}"
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
    return describe(sock.getpeername())
