"""Chat mode: people at `nc` and programs in one room, the lobby; without IO.

What a person sends is cut into lines; each is shown to all other people as `ADDRESS: LINE`, and
cast into the room `lobby`. What programs say or cast there is shown to the people as `NAME: LINE`.

To the rest of the hub all its people are one member of that room, the `Crowd`, which is there while
there are any. So rooms, links and receipts need to know next to nothing of them: a copy goes over a
link when there are people behind it, and the sum that comes back says how many were told.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable

from tabane.errors import Busy
from tabane.middlecon.frames import HEADER, NAME_BYTES, Frame, JoinFlag, Kind
from tabane.middlecon.ports import Port, SessionPort
from tabane.middlecon.rooms import Rooms
from tabane.middlecon.session import Mode, sniff

LOBBY = "lobby"
"""The room that people are in."""
CROWD = "people@"
"""A hub's people, as one member, are this and the hub's name."""

INVALID = b"You didn't send valid UTF-8.\n"
SHOWN_LINES = 1000
"""Of one message of a program. Each line is shown with a name of up to 255 bytes before it, so
1 MiB of newlines would become a quarter of a gigabyte for each person."""

CONTROLS = dict.fromkeys(n for n in (*range(0x20), *range(0x7F, 0xA0)) if n not in (0x09, 0x0D))
"""What programs cannot send to people's terminals: control characters other than tab and CR."""
CONTROLS_IN_LINES = {number: None for number in CONTROLS if number != 0x0A}


class Lines:
    """Bytes in, the lines they complete out, without their newlines, however the bytes are cut.

    A line over `limit` bytes is given once, as its first `limit` + 1 bytes; its rest is dropped.
    """

    __slots__ = ("_cut", "_limit", "_rest")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rest = bytearray()
        self._cut = False

    def feed(self, data: bytes) -> list[bytes]:
        *ended, rest = data.split(b"\n")
        lines: list[bytes] = []
        for part in ended:
            self._add(part, lines)
            if not self._cut:
                lines.append(bytes(self._rest))
            self._rest.clear()
            self._cut = False
        self._add(rest, lines)
        return lines

    def end(self) -> list[bytes]:
        """No more bytes come: the last line, if it has no newline."""
        lines = [bytes(self._rest)] if self._rest else []
        self._rest.clear()
        return lines

    def _add(self, part: bytes, lines: list[bytes]) -> None:
        if self._cut:
            return
        self._rest += part[: self._limit + 1 - len(self._rest)]
        if len(self._rest) > self._limit:
            lines.append(bytes(self._rest))
            self._rest.clear()
            self._cut = True


class Person(Port):
    """One connection in chat mode; its name is its address. `lines` is there once it spoke."""

    __slots__ = ("lines", "spoke", "stuck")

    def __init__(self, name: str, wake: Callable[[], None]) -> None:
        super().__init__(name, wake)
        self.lines: Lines | None = None
        self.spoke = False
        """Whether its first line that is not empty was whole, and no HTTP."""
        self.stuck = 0
        """For how many checks in a row too much has waited for it."""


Show = Callable[[str, bytes], int]
Receive = Callable[[SessionPort, Frame, float], None]


class Crowd(SessionPort):
    """All people of a hub, as the one member of the lobby that the others see.

    `show(sender, text)` shows them a program's message and says how many were told. `receive` takes
    the crowd's own frames, as those of any session.
    """

    __slots__ = ("_receive", "show")

    def __init__(self, name: str, show: Show, receive: Receive) -> None:
        super().__init__(name, lambda: None)
        self.show = show
        self._receive = receive

    def send(self, frame: bytes) -> None:
        _, kind, _, size, _, id, _ = HEADER.unpack_from(frame)
        name_end = HEADER.size + size
        if kind == Kind.CAST:
            self.show(frame[HEADER.size : name_end].decode(), frame[name_end:])
        elif kind in (Kind.SEND, Kind.CALL):
            text = b"people can be told something in the room lobby only"
            self._receive(self, Frame(Kind.NACK, id=id, name="refused", data=text), 0.0)

    def send_first(self, frame: bytes) -> None:
        """Nothing waits here, so what is urgent overtakes nothing."""
        self.send(frame)

    def cast(self, sender: str, line: bytes) -> None:
        """To the lobby's members, from the person `sender`."""
        for number in self.rooms:
            self._receive(self, Frame(Kind.CAST, to=number, name=sender, data=line), 0.0)


class Lobby:
    """Who hears what. `people` are this hub's."""

    def __init__(self, rooms: Rooms, receive: Receive) -> None:
        self.people: dict[Person, None] = {}
        self.crowd = Crowd(_crowd_name(rooms.hub), self._show, receive)
        self._rooms = rooms
        self._limits = rooms.limits
        self._line_bytes = min(self._limits.line_bytes, self._limits.data_bytes)

    def enter(self, person: Person) -> None:
        """From now on it hears the others. Raises `Busy` when the hub has no room for it."""
        limits, crowd = self._limits, self.crowd
        if len(self.people) + len(self._rooms.sessions) >= limits.sessions:
            raise Busy(f"This hub has {limits.sessions} sessions, the most it takes.")
        if not self.people:
            self._rooms.open_session(crowd)
            try:
                self._rooms.join(crowd, LOBBY, JoinFlag.MEMBER, 0)
            except Busy:
                self._rooms.close_session(crowd)
                raise
        self.people[person] = None

    def leave(self, person: Person) -> None:
        """It is gone, or was a program. Idempotent."""
        if person in self.people:
            del self.people[person]
            if not self.people:
                self._rooms.close_session(self.crowd)

    def receive(self, person: Person, data: bytes) -> bool:
        """What a person sends. False: it speaks HTTP, and must go."""
        if person.lines is None:
            person.lines = Lines(self._line_bytes)
        return self._hear(person, person.lines.feed(data))

    def end(self, person: Person) -> None:
        """A person sends nothing more: relay its last line."""
        if person.lines is not None:
            self._hear(person, person.lines.end())

    def is_stuck(self, person: Person, checks: int) -> bool:
        """Whether it has not read for so many checks in a row: to be asked at each check."""
        person.stuck = person.stuck + 1 if person.backlog > self._limits.queue_bytes else 0
        return person.stuck > checks

    def _hear(self, person: Person, lines: list[bytes]) -> bool:
        if not lines:
            return True
        if not person.spoke:
            first = next((line for line in lines if line.strip(b"\r")), None)
            if first is not None and sniff(first + b"\n") is Mode.HTTP:
                return False
            person.spoke = first is not None
        told: list[bytes] = []
        for line in lines:
            text = self._check(person, line)
            if text is not None:
                told.append(text)
                self.crowd.cast(person.name, text)
        self._tell(person.name, told, person)
        return True

    def _check(self, person: Person, line: bytes) -> bytes | None:
        """What of a line may be relayed; the person is told what may not."""
        limit = self._line_bytes
        is_cut = len(line) > limit
        try:
            _, size = codecs.utf_8_decode(line[:limit], "strict", not is_cut)
        except UnicodeDecodeError:
            person.send(INVALID)
            return None
        if is_cut:
            person.send(b"Your line has more than %d bytes: its rest was dropped.\n" % limit)
        return line[:size]

    def _show(self, sender: str, data: bytes) -> int:
        text = data.decode(errors="replace").removesuffix("\n").translate(CONTROLS_IN_LINES)
        lines = text.split("\n", SHOWN_LINES)
        if len(lines) > SHOWN_LINES:
            lines[-1] = f"... ({lines[-1].count(chr(10)) + 1} more lines)"
        return self._tell(sender.translate(CONTROLS), [line.encode() for line in lines])

    def _tell(self, sender: str, lines: Iterable[bytes], but: Person | None = None) -> int:
        """Show lines to all people but one; how many that were."""
        prefix = sender.encode() + b": "
        text = b"".join([b"%b%b\n" % (prefix, line) for line in lines])
        if not text:
            return 0
        told = 0
        for person in self.people:
            if person is but:
                continue
            if person.backlog > self._limits.queue_bytes:
                person.dropped += text.count(b"\n")
            else:
                person.send(text)
                told += 1
        return told


def _crowd_name(hub: str) -> str:
    return (CROWD + hub).encode()[:NAME_BYTES].decode(errors="ignore")
