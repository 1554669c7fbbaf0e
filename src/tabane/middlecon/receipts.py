"""What a sender is told: receipts, replies, and why a member failed."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

import msgspec

from tabane.errors import ProtocolError
from tabane.middlecon.frames import MORE, Frame, Kind, encode_frame

NAMES_PER_PART = 2000
"""Of a receipt: with names of 255 bytes a part stays below the frame limit of 1 MiB."""


class Cause(StrEnum):
    """Why a member failed."""

    CLOSED = "closed"
    """Its session ended before it acknowledged."""
    TIMED_OUT = "timed_out"
    OVERLOADED = "busy"
    """Too much is waiting for it."""
    REFUSED = "refused"
    """Its handler raised, or it has none."""
    UNREACHABLE = "unreachable"
    """The link to its hub was down: no copy was sent."""
    NOT_FOUND = "not_found"
    DENIED = "denied"
    """The sender may not do that; nobody was told."""
    ASLEEP = "asleep"
    """It is frozen; only of a message to one member, a receipt has its own list."""


class Reason(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a member failed. `code` is the code of the error its handler raised, if it raised one."""

    cause: Cause
    text: str = ""
    code: str = ""

    def __str__(self) -> str:
        words = self.cause.name.lower().replace("_", " ")
        return f"{words}: {self.text}" if self.text else words


class Receipt(msgspec.Struct, frozen=True):
    """The fate of every member that a `say` was meant for. The sender is not among them.

    `acknowledged`: the handler returned. `failed`: it certainly did not, and why. `unknown`: a copy
    left over a link that then died. `asleep`: frozen, so not told. `told`: how many were shown the
    message that can acknowledge nothing (people in chat mode).
    """

    acknowledged: tuple[str, ...] = ()
    failed: dict[str, Reason] = {}
    unknown: tuple[str, ...] = ()
    asleep: tuple[str, ...] = ()
    told: int = 0

    @property
    def complete(self) -> bool:
        """Whether every member has acknowledged."""
        return not (self.failed or self.unknown or self.asleep)


class Replies(Receipt, frozen=True):
    """A receipt with what the members that acknowledged have answered."""

    answers: dict[str, bytes] = {}


class Sum(msgspec.Struct, array_like=True):
    """Fates being added up, and the body of a RECEIPT frame."""

    acknowledged: list[str] = []
    failed: dict[str, Reason] = {}
    unknown: list[str] = []
    asleep: list[str] = []
    told: int = 0

    def add(self, other: Sum) -> None:
        self.acknowledged += other.acknowledged
        self.failed |= other.failed
        self.unknown += other.unknown
        self.asleep += other.asleep
        self.told += other.told

    def settle(self) -> None:
        """Give each name one fate. While links come and go, or a member moves, two hubs may each
        know something of one: what is certain counts, and first of it a failure, so that none of
        two sessions is lost; then doubt, then that it could not be reached."""
        if not (self.failed or self.unknown):
            return
        sure = {n for n, why in self.failed.items() if why.cause is not Cause.UNREACHABLE}
        self.acknowledged = [name for name in self.acknowledged if name not in sure]
        self.asleep = [name for name in self.asleep if name not in sure]
        sure |= {*self.acknowledged, *self.asleep}
        self.unknown = [name for name in dict.fromkeys(self.unknown) if name not in sure]
        better = {*self.acknowledged, *self.asleep, *self.unknown}
        self.failed = {name: why for name, why in self.failed.items() if name not in better}

    def receipt(self) -> Receipt:
        return Receipt(
            tuple(self.acknowledged),
            self.failed,
            tuple(self.unknown),
            tuple(self.asleep),
            self.told,
        )

    def replies(self, answers: dict[str, bytes]) -> Replies:
        return Replies(
            tuple(self.acknowledged),
            self.failed,
            tuple(self.unknown),
            tuple(self.asleep),
            self.told,
            answers,
        )


_parse_sum = msgspec.msgpack.Decoder(Sum)


def encode_receipt(id: int, total: Sum) -> list[bytes]:
    """The RECEIPT frames of `total`: one, unless it names thousands."""
    names = len(total.acknowledged) + len(total.failed) + len(total.unknown) + len(total.asleep)
    if names <= NAMES_PER_PART:
        return [_encode_part(id, total, 0)]
    *parts, last = _split(total)
    return [*(_encode_part(id, part, MORE) for part in parts), _encode_part(id, last, 0)]


def _encode_part(id: int, part: Sum, flags: int) -> bytes:
    return encode_frame(Kind.RECEIPT, id=id, flags=flags, data=msgspec.msgpack.encode(part))


def _split(total: Sum) -> Iterator[Sum]:
    size = NAMES_PER_PART
    for start in range(0, len(total.acknowledged), size):
        yield Sum(acknowledged=total.acknowledged[start : start + size])
    failed = list(total.failed.items())
    for start in range(0, len(failed), size // 4):
        yield Sum(failed=dict(failed[start : start + size // 4]))
    for start in range(0, len(total.unknown), size):
        yield Sum(unknown=total.unknown[start : start + size])
    for start in range(0, len(total.asleep), size):
        yield Sum(asleep=total.asleep[start : start + size])
    yield Sum(told=total.told)


def parse_receipt(frame: Frame) -> Sum:
    """Raises `ProtocolError`."""
    try:
        return _parse_sum.decode(frame.data)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"this RECEIPT cannot be read: {error}") from None
