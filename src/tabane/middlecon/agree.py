"""Agreements: all members of a room take a value, or none does; without IO.

Two-phase commit, coordinated by the proposer's hub, so that a proposer that dies leaves nobody in
doubt. AGREE begins it. PREPARE goes out as a message of the room, and its sum says who can do it.
The decision is taken once, when that sum is complete: *commit* if every member has acknowledged and
the room's epoch is what it was, else *abort*. OUTCOME goes out in the same way, and AGREED tells
the proposer. Who did not acknowledge OUTCOME is *untold*: the outcome is kept for it, for a while,
and told when a member of that name is seen in the room again.

The two sums come to an `Inside`, a port whose frames go nowhere but here; so a `Tally` and a `Call`
need not know of agreements. An `Agreement` is in the hub's book beside its tallies: it hears of
sessions and links that end as they do, and, as its deadline is always past, of every tick of the
clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from hashlib import blake2b
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from tabane.errors import ProtocolError
from tabane.middlecon.chat import LOBBY
from tabane.middlecon.directory import Directory
from tabane.middlecon.frames import MAX_U32, MORE, Decoder, Frame, Kind, encode_frame
from tabane.middlecon.ports import LinkPort, Port, SessionPort
from tabane.middlecon.receipts import NAMES_PER_PART, Cause, Reason, Sum, parse_receipt
from tabane.middlecon.rooms import Member, Room
from tabane.middlecon.tallies import Tally, encode_nack

if TYPE_CHECKING:
    from tabane.middlecon.relay import Relay

OUTCOME_S = 1.0
"""Members have at least so long to acknowledge an outcome, however late it was decided. It is much
for a handler that takes note of it; the proposer waits for those that are slower."""
TELL_S = 10.0
"""How long one that was untold may take to acknowledge when it is told."""
AGAIN_S = 5.0
"""After so long a member that is there, and could not be told, is told again. That serves those who
did not come back, since they never went: they were frozen, too busy or too slow."""
KEPT_S = 600.0
"""How long an outcome is kept for those untold: longer than a restart or a migration takes. Who is
away longer must ask the others what is so, whatever it was told."""

ID_BYTES = 16
HUB_BYTES, RUN_BYTES = 8, 4
"""An agreement's id begins with marks of its hub's name and of that hub's run, so that its members
see which hub they wait for. The rest counts."""


class Inside(Port):
    """An origin that is no connection: what is sent to it is handled here."""

    __slots__ = ("_take",)

    def __init__(self, take: Callable[[Frame], None]) -> None:
        super().__init__("agreements", lambda: None)
        self._take = take

    def send(self, frame: bytes) -> None:
        for one in Decoder().feed(frame):
            self._take(one)

    def send_first(self, frame: bytes) -> None:
        self.send(frame)


class Verdict(NamedTuple):
    """The outcome of one agreement, as OUTCOME frames tell it."""

    id: bytes
    room: str
    proposer: str
    value: bytes
    committed: bool


class Agreed(msgspec.Struct, array_like=True):
    """What the proposer is told: the body of AGREED, in parts if it names thousands."""

    committed: bool
    changed: bool
    prepared: list[str] = []
    refused: dict[str, Reason] = {}
    unknown: list[str] = []
    asleep: list[str] = []
    untold: list[str] = []

    def add(self, other: Agreed) -> None:
        self.prepared += other.prepared
        self.refused |= other.refused
        self.unknown += other.unknown
        self.asleep += other.asleep
        self.untold += other.untold


_parse_agreed = msgspec.msgpack.Decoder(Agreed)


def encode_agreed(id: int, agreed: Agreed) -> Iterator[bytes]:
    """The AGREED frames: one, unless it names thousands."""
    parts = list(_split(agreed))
    for part in parts:
        flags = 0 if part is parts[-1] else MORE
        yield encode_frame(Kind.AGREED, id=id, flags=flags, data=msgspec.msgpack.encode(part))


def _split(agreed: Agreed) -> Iterator[Agreed]:
    size, committed, changed = NAMES_PER_PART, agreed.committed, agreed.changed
    names = (agreed.prepared, agreed.refused, agreed.unknown, agreed.asleep, agreed.untold)
    if sum(map(len, names)) <= size:
        yield agreed
        return
    for field in ("prepared", "unknown", "asleep", "untold"):
        of_field = getattr(agreed, field)
        for start in range(0, len(of_field), size):
            part = Agreed(committed, changed)
            setattr(part, field, of_field[start : start + size])
            yield part
    refused = list(agreed.refused.items())
    for start in range(0, len(refused) + 1, size // 4):
        yield Agreed(committed, changed, refused=dict(refused[start : start + size // 4]))


def parse_agreed(frame: Frame) -> Agreed:
    """Raises `ProtocolError`."""
    try:
        return _parse_agreed.decode(frame.data)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"this AGREED cannot be read: {error}") from None


def parse_prepare(frame: Frame) -> tuple[bytes, bytes]:
    """The id of an agreement, and the value. Raises `ProtocolError`."""
    if len(frame.data) < ID_BYTES:
        raise ProtocolError("a PREPARE is too short for an id")
    return frame.data[:ID_BYTES], frame.data[ID_BYTES:]


def parse_outcome(frame: Frame) -> Verdict:
    """Raises `ProtocolError`."""
    data, fixed = frame.data, ID_BYTES + 2
    if len(data) < fixed or len(data) < fixed + data[fixed - 1] or data[0] > 1:
        raise ProtocolError("an OUTCOME cannot be read")
    name_end = fixed + data[fixed - 1]
    room = data[fixed:name_end].decode(errors="replace")
    return Verdict(data[1 : fixed - 1], room, frame.name, data[name_end:], bool(data[0]))


def outcome_frame(verdict: Verdict, timeout_s: float) -> Frame:
    room = verdict.room.encode()
    head = bytes([verdict.committed]) + verdict.id + bytes([len(room)])
    milliseconds = round(timeout_s * 1000)
    return Frame(
        Kind.OUTCOME, value=milliseconds, name=verdict.proposer, data=head + room + verdict.value
    )


def mark_of_hub(name: str) -> bytes:
    return blake2b(name.encode(), digest_size=HUB_BYTES).digest()


def mark_of_run(instance: str) -> bytes:
    return blake2b(instance.encode(), digest_size=RUN_BYTES).digest()


def make_ids(hub: str, instance: str) -> Callable[[], bytes]:
    """A source of ids that no other hub, and no other run of this one, gives."""
    marks, numbers = mark_of_hub(hub) + mark_of_run(instance), count(1)
    return lambda: marks + (next(numbers) & MAX_U32).to_bytes(4)


class Agreement:
    """One agreement, from AGREE to AGREED. It is in the hub's book, as what is pending is."""

    deadline = 0.0
    """Always past, so that `on_deadline` hears of each tick."""

    def __init__(
        self, home: Agreements, port: SessionPort, frame: Frame, room: Room, id: bytes
    ) -> None:
        self._home = home
        self._port = port
        self._reply_to = frame.id
        self._value = frame.data
        self._room = room
        self._id = id
        self._book_id = 0
        self._epoch = room.epoch
        self._now = self._until = 0.0
        self._tally: Tally | None = None
        self._gone = self._changed = False
        """Whether the proposer is, and whether the membership has."""
        self._verdict: Verdict | None = None
        self._fates = Sum([], {}, [], [])
        self._told = Sum([], {}, [], [])
        self._asked: dict[str, None] = {}
        """Who may have been. Those who left before a link died are in no sum."""

    def begin(self, book_id: int, frame: Frame, now: float, timeout_s: float) -> None:
        """Ask everyone. `timeout_s` is that of the frame, within the hub's limit."""
        self._book_id, self._now, self._until = book_id, now, now + timeout_s
        self._note_members()
        prepare = Frame(Kind.PREPARE, value=frame.value, data=self._id + self._value)
        origin = Inside(partial(self._on_part, self._fates, self._decide))
        self._tally = self._home.relay.say_for(self._port, origin, prepare, self._room, now)

    def on_ack(self, port: Port, answer: bytes) -> None:
        raise ProtocolError(f"{port.name} answered a message that was not for it")

    def on_nack(self, port: Port, frame: Frame) -> None:
        self.on_ack(port, b"")

    def on_closed(self, port: Port) -> None:
        """Without its proposer, what is not decided is not to be."""
        if port is self._port and not self._gone:
            self._gone = True
            if self._verdict is None and self._tally is not None:
                self._tally.give_up()
            if self._verdict is not None:
                self._home.keep(self._verdict, [port.name], self._now)
        elif isinstance(port, LinkPort) and port in self._room.remote and not self._verdict:
            self._changed = True

    def on_deadline(self, now: float) -> None:
        self._now = now

    def _on_part(self, total: Sum, done: Callable[[], None], frame: Frame) -> None:
        total.add(parse_receipt(frame))
        if not frame.flags & MORE:
            done()

    def _decide(self) -> None:
        """PREPARE's sum is complete. This is the only place where an outcome is made."""
        self._note_members()
        fates = self._fates
        self._changed = self._changed or self._room.epoch != self._epoch
        stands = not (self._changed or self._gone)
        committed = stands and not (fates.failed or fates.unknown or fates.asleep or fates.told)
        proposer = self._port.name
        self._verdict = Verdict(self._id, self._room.name, proposer, self._value, committed)
        timeout_s = OUTCOME_S if self._gone else max(OUTCOME_S, self._until - self._now)
        outcome = outcome_frame(self._verdict, timeout_s)
        origin = Inside(partial(self._on_part, self._told, self._end))
        self._home.relay.say_for(self._port, origin, outcome, self._room, self._now)

    def _end(self) -> None:
        """OUTCOME's sum is complete."""
        assert self._verdict is not None
        self.forget()
        fates = self._fates
        self._asked |= dict.fromkeys([*_names(fates), *_names(self._told)])
        told = set(self._told.acknowledged)
        untold = [name for name in self._asked if name not in told]
        self._home.keep(self._verdict, untold, self._now)
        agreed = Agreed(
            self._verdict.committed,
            self._changed,
            fates.acknowledged,
            fates.failed,
            fates.unknown,
            fates.asleep,
            untold,
        )
        if not self._gone:
            for part in encode_agreed(self._reply_to, agreed):
                self._port.send(part)

    def forget(self) -> None:
        del self._home.relay.pending[self._book_id], self._room.pending[self._book_id]

    def _note_members(self) -> None:
        for member, _ in self._room.members():
            if member.port is not self._port:
                self._asked[member.name] = None


def _names(total: Sum) -> list[str]:
    return [*total.acknowledged, *total.failed, *total.unknown, *total.asleep]


class Untold:
    """An outcome that is kept for the member `name`. `again`: when it may be told once more."""

    __slots__ = ("again", "name", "telling", "until", "verdict")

    def __init__(self, name: str, verdict: Verdict, now: float) -> None:
        self.name = name
        self.verdict = verdict
        self.telling = False
        self.again = now
        self.until = now + KEPT_S


class Agreements:
    """The agreements that this hub coordinates, and the outcomes it keeps for those untold."""

    def __init__(self, relay: Relay, directory: Directory, ids: Callable[[], bytes]) -> None:
        self.relay = relay
        self.forgotten = 0
        """Outcomes that were given up untold, by time or number."""
        self._directory = directory
        self._limits = directory.limits
        self._ids = ids
        self._now = 0.0
        self._kept: dict[Untold, None] = {}
        """The oldest first."""
        self._of: dict[tuple[str, str], dict[bytes, Untold]] = {}
        """The same by room and member, and by id."""

    def __len__(self) -> int:
        """How many outcomes are kept."""
        return len(self._kept)

    def on_agree(self, port: SessionPort, frame: Frame, now: float) -> None:
        """A session proposes a value."""
        room, limit = port.rooms.get(frame.to), self._limits.agree_bytes
        if room is None:
            port.send(encode_nack(frame.id, Cause.NOT_FOUND, "join the room first"))
        elif room.name == LOBBY:
            text = "there may be people in the lobby, who cannot prepare: agree in another room"
            port.send(encode_nack(frame.id, Cause.REFUSED, text))
        elif len(frame.data) > limit:
            text = f"a value to agree on has at most {limit} bytes, this one {len(frame.data)}"
            port.send(encode_nack(frame.id, Cause.REFUSED, text))
        else:
            agreement = Agreement(self, port, frame, room, self._ids())
            book_id = self.relay.add_pending(agreement, room)
            timeout_s = min(frame.value / 1000, self._limits.timeout_s)
            agreement.begin(book_id, frame, now, timeout_s)

    def keep(self, verdict: Verdict, names: Iterable[str], now: float) -> None:
        """These do not know the outcome. Who is in the room is told again at the next `expire`."""
        for name in names:
            untold = Untold(name, verdict, now)
            self._kept[untold] = None
            self._of.setdefault((verdict.room, name), {})[verdict.id] = untold
        while len(self._kept) > self._limits.untold:
            self._give_up(next(iter(self._kept)))

    def on_back(self, room: Room, member: Member) -> None:
        """A member has joined, is back behind a link, or awake."""
        for untold in list(self._of.get((room.name, member.name), {}).values()):
            self._tell(untold, room, member)

    def expire(self, now: float) -> None:
        """Give up what is too old, and tell those who are there: call it every second or so."""
        self._now = now
        for untold in list(self._kept):
            if untold.until <= now:
                self._give_up(untold)
            elif untold.again <= now:
                self._maybe_tell(untold)

    def _maybe_tell(self, untold: Untold) -> None:
        room = self._directory.rooms.get(untold.verdict.room)
        member = self._directory.members.get(untold.name)
        if room is not None and member is not None and room in member.rooms:
            self._tell(untold, room, member)

    def _tell(self, untold: Untold, room: Room, member: Member) -> None:
        if untold.telling or member.port is None or member.name in room.lost:
            return
        untold.telling = True
        frame = outcome_frame(untold.verdict, TELL_S)
        origin = Inside(partial(self._on_answer, untold))
        self.relay.call_for(origin, frame, member, member.port, frame.name, self._now)

    def _on_answer(self, untold: Untold, frame: Frame) -> None:
        untold.telling = False
        untold.again = self._now + AGAIN_S
        if frame.kind == Kind.ACK:
            self._drop(untold)

    def _give_up(self, untold: Untold) -> None:
        self.forgotten += 1
        self._drop(untold)

    def _drop(self, untold: Untold) -> None:
        if self._kept.pop(untold, self) is not self:
            key = (untold.verdict.room, untold.name)
            del self._of[key][untold.verdict.id]
            if not self._of[key]:
                del self._of[key]
