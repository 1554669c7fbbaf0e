"""Messages whose fate is not known yet: one target (`Call`) or those of a room (`Tally`).

Each is in the book of its hub under the id that its copies carry, from the first copy until the
answer or the receipt goes to its origin, which is a session or a link. Without IO.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from tabane.errors import ProtocolError
from tabane.middlecon.frames import MORE, RAISED, Frame, Kind, encode_frame
from tabane.middlecon.ports import LinkPort, Port
from tabane.middlecon.receipts import Cause, Reason, Sum, encode_receipt, parse_receipt
from tabane.middlecon.rooms import Member, Room

LINK_GRACE_S = 0.5
"""How much longer than its deadline a room message waits for the sums of open links, for each link
that is behind them: the hubs there count to the same deadline, and their sums then have to travel
(200 ms one way between far data centers). What they know is better than `unknown`."""

QUEUE_BYTES = 8 << 20
"""How much may wait for who asked, unless told, before answers are not sent on."""

_CAUSES = frozenset(Cause)
_ASK = int(Kind.ASK)

REASON_CHARS = 300
"""Of the text of a reason: enough for a sentence, and it keeps receipts small."""


class Pending(Protocol):
    """A message whose fate is not known yet."""

    deadline: float

    def on_ack(self, port: Port, answer: bytes) -> None: ...
    def on_nack(self, port: Port, frame: Frame) -> None: ...
    def on_closed(self, port: Port) -> None: ...
    def on_deadline(self, now: float) -> None: ...
    def forget(self) -> None:
        """It is over: take it out of the hub's book, and its room's or ports'."""


Book = dict[int, Pending]


def encode_nack(id: int, cause: Cause, text: str) -> bytes:
    return encode_frame(Kind.NACK, id=id, name=cause, data=text.encode())


def parse_reason(frame: Frame) -> Reason:
    """Why a member failed, as a NACK says it."""
    text = frame.data.decode(errors="replace")[:REASON_CHARS]
    if not frame.flags & RAISED and frame.name in _CAUSES:
        return Reason(Cause(frame.name), text)
    return Reason(Cause.REFUSED, text, frame.name)


class Call:
    """A `send` or `call`: one target, which is a member's session, or the link towards it."""

    __slots__ = ("_book", "_id", "_member", "_origin", "_reply_to", "_target", "deadline")

    def __init__(
        self, book: Book, id: int, origin: Port, frame: Frame, target: Port, member: Member
    ) -> None:
        self._book = book
        self._id = id
        self._origin = origin
        self._reply_to = frame.id
        self._target = target
        self._member = member
        self.deadline = 0.0

    def on_ack(self, port: Port, answer: bytes) -> None:
        self._check(port)
        self._end(encode_frame(Kind.ACK, id=self._reply_to, data=answer))

    def on_nack(self, port: Port, frame: Frame) -> None:
        self._check(port)
        self._end(
            encode_frame(
                Kind.NACK, id=self._reply_to, flags=frame.flags, name=frame.name, data=frame.data
            )
        )

    def on_closed(self, port: Port) -> None:
        if port is self._origin:
            self.forget()
        elif port is self._target and isinstance(port, LinkPort):
            text = f"the link to hub {port.name} died: {self._member.name} may have got it or not"
            self._end(encode_nack(self._reply_to, Cause.CLOSED, text))
        elif port is self._target:
            text = f"{self._member.name} went away before it answered"
            self._end(encode_nack(self._reply_to, Cause.CLOSED, text))

    def on_deadline(self, now: float) -> None:
        text = f"{self._member.name} did not answer in time"
        self._end(encode_nack(self._reply_to, Cause.TIMED_OUT, text))

    def _check(self, port: Port) -> None:
        if port is not self._target:
            raise ProtocolError(f"{port.name} answered a message that was not for it")

    def forget(self) -> None:
        del self._book[self._id]
        for port in {self._origin, self._target}:
            del port.calls[self._id]

    def _end(self, frame: bytes) -> None:
        self.forget()
        self._origin.send_first(frame)


class Tally:
    """A `say` or `ask`: fates are added up until nobody is waited for."""

    __slots__ = (
        "_asking",
        "_book",
        "_late",
        "_origin",
        "_reply_to",
        "_room",
        "_total",
        "_unheard",
        "_waiting",
        "deadline",
        "grace_s",
        "id",
        "queue_bytes",
    )

    def __init__(self, book: Book, id: int, origin: Port, frame: Frame, room: Room) -> None:
        self._book = book
        self.id = id
        self._origin = origin
        self._reply_to = frame.id
        self._asking = frame.kind == _ASK
        self._room = room
        self._total = Sum([], {}, [], [])
        self._waiting: set[Port] = set()
        self._late = False
        self.deadline = 0.0
        self.grace_s = LINK_GRACE_S
        self._unheard: set[str] = set()
        """Whose answers were not sent on, as the one who asked does not read."""
        self.queue_bytes = QUEUE_BYTES

    def expect(self, port: Port) -> None:
        self._waiting.add(port)

    def expect_all(self, ports: Iterable[Port]) -> None:
        self._waiting.update(ports)

    def report_to(self, origin: Port) -> None:
        """The receipt goes there."""
        self._origin = origin

    def give_up(self) -> None:
        """End now: who was silent so far has failed, or is unknown."""
        for _ in range(2):
            if self._waiting:
                self.on_deadline(0.0)

    def add_asleep(self, names: Iterable[str]) -> None:
        self._total.asleep += names

    def add_told(self, count: int) -> None:
        """People were shown the message."""
        self._total.told += count

    def overloaded_behind(self, link: LinkPort) -> None:
        """The same for all that are behind a link."""
        self._waiting.remove(link)
        for name in self._room.remote.get(link, ()):
            self.fail(name, Cause.OVERLOADED)

    def overloaded(self, port: Port) -> None:
        """Too much waits for it: no copy was sent."""
        self._waiting.remove(port)
        self.fail(port.name, Cause.OVERLOADED)

    def fail(self, name: str, cause: Cause, text: str = "") -> None:
        self._total.failed[name] = Reason(cause, text)

    def on_ack(self, port: Port, answer: bytes) -> None:
        waiting = self._waiting
        if port not in waiting:
            self._on_surprise(port)
            return
        waiting.remove(port)
        if not self._asking or self.on_answer(port.name, answer):
            self._total.acknowledged.append(port.name)
        if not waiting:
            self.maybe_end()

    def on_nack(self, port: Port, frame: Frame) -> None:
        if port not in self._waiting:
            self._on_surprise(port)
            return
        self._waiting.remove(port)
        self._total.failed[port.name] = parse_reason(frame)
        self.maybe_end()

    def on_answer(self, name: str, data: bytes) -> bool:
        """Send it on, unless too much waits for who asked: then the member has failed."""
        if self._origin.backlog > self.queue_bytes:
            self._unheard.add(name)
            self.fail(name, Cause.OVERLOADED, f"its answer: too much waits for {self._origin.name}")
            return False
        self._origin.send(encode_frame(Kind.ANSWER, id=self._reply_to, name=name, data=data))
        return True

    def on_receipt(self, link: LinkPort, frame: Frame) -> None:
        """A part of the sum of all that is behind a link."""
        if link not in self._waiting:
            raise ProtocolError(f"hub {link.name} summed up a message that was not for it")
        part = parse_receipt(frame)
        if self._unheard:
            part.acknowledged = [n for n in part.acknowledged if n not in self._unheard]
        self._total.add(part)
        if not frame.flags & MORE:
            self._waiting.remove(link)
            self.maybe_end()

    def on_closed(self, port: Port) -> None:
        if port is self._origin:
            self.forget()
        elif port in self._waiting:
            self._waiting.remove(port)
            if isinstance(port, LinkPort):
                self._lose(port)
            else:
                self.fail(port.name, Cause.CLOSED)
            self.maybe_end()
        elif not self._waiting:  # a fault kept it from ending
            self.maybe_end()

    def on_deadline(self, now: float) -> None:
        silent = list(self._waiting)
        for port in silent:
            if not isinstance(port, LinkPort):
                self.fail(port.name, Cause.TIMED_OUT)
                self._waiting.remove(port)
            elif self._late:
                self._lose(port)
                self._waiting.remove(port)
        self._late = True
        self.deadline = now + self.grace_s
        self.maybe_end()

    def maybe_end(self) -> None:
        """The receipt, when nobody is waited for any more."""
        if not self._waiting:
            self._total.settle()
            parts = encode_receipt(self._reply_to, self._total)
            self.forget()
            for part in parts:
                self._origin.send(part)

    def forget(self) -> None:
        del self._book[self.id], self._room.pending[self.id]

    def _on_surprise(self, port: Port) -> None:
        """An answer from one that is not waited for. A late one changes nothing."""
        if not self._late:
            raise ProtocolError(f"{port.name} answered twice, or a message that was not for it")

    def _lose(self, link: LinkPort) -> None:
        total = self._total
        told = {*total.acknowledged, *total.failed, *total.unknown, *total.asleep}
        behind = [*self._room.remote.get(link, {})]
        behind += [name for name, member in self._room.lost.items() if member.via is link]
        total.unknown += [name for name in behind if name not in told]
