"""The wire format: frames to bytes and bytes to frames, without IO.

All frames have one layout, so that one `struct` call reads any of them and a hub forwards a message
without looking inside: a header of 20 bytes, a name (UTF-8), and data.

    length:u32  kind:u8  flags:u8  name length:u16  to:u32  id:u32  value:u32   (big-endian)

`length` counts what follows it. What `to`, `id`, `value`, the name and the data mean, by kind,
stands in docs/protocol.md. A stream begins, in both directions, with `MAGIC`.
"""

from __future__ import annotations

import struct
from enum import IntEnum, StrEnum

import msgspec

from tabane.errors import ProtocolError, UsageError

MAGIC = b"\xffmc1"
"""0xFF never begins UTF-8 text, so one byte tells a program from a person who types."""

HEADER = struct.Struct(">IBBHIII")
_LENGTH_BYTES = 4
KIND_AT, FLAGS_AT = 4, 5
_FIXED_BYTES = HEADER.size - _LENGTH_BYTES

DATA_BYTES = 1 << 20
"""Default limit of a frame's data. A larger frame would hold up the small ones behind it: 1 MiB is
8 ms of a 1 Gbit/s line. What is larger goes in pieces, or does not belong in a message. Names do
not count, so that a message that may be sent may be forwarded under any sender's name."""
NAME_BYTES = 255
MAX_U32 = (1 << 32) - 1


class Kind(IntEnum):
    """What a frame is. Gaps are kept for kinds of the same group."""

    HELLO = 1
    WELCOME = 2
    ERROR = 3
    GOODBYE = 4
    PING = 5
    PONG = 6

    JOIN = 10
    LEAVE = 11
    PRESENCE = 12
    STATE = 13
    HUB = 14
    MEMBER = 15
    SYNCED = 16
    FLOW = 17
    STATS = 18

    SAY = 20
    ASK = 21
    CAST = 22
    SEND = 23
    CALL = 24
    POST = 25
    AGREE = 26
    PREPARE = 27
    OUTCOME = 28
    AGREED = 29

    ACK = 30
    NACK = 31
    ANSWER = 32
    RECEIPT = 33

    SERVE = 40
    UNSERVE = 41
    SLEEP = 42
    HUBS = 43


class JoinFlag(IntEnum):
    """Flags of JOIN; with neither, a session may only speak in the room."""

    MEMBER = 1
    WATCH = 2
    DROP_OLDEST = 4
    """When too much waits for this member: its oldest casts are dropped."""
    DISCONNECT = 8
    """It is cut off. With neither, its senders wait."""


class Change(StrEnum):
    """What became of a member of a room."""

    JOINED = "joined"
    LEFT = "left"
    UNKNOWN = "unknown"
    """The link to its hub died: it may be there or not."""
    BACK = "back"
    """It was unknown and is there."""


CHANGES = tuple(Change)
"""A PRESENCE frame's flags are an index into this."""

GONE = 1
"""Flag of STATE (the key is deleted), MEMBER (its session ended) and HUB (it was unlinked)."""
OPEN = 2
"""Flag of HUB: its link is open."""
AGAIN = 1
"""Flag of SYNCED between hubs: tell all once more."""
LOST = 2
"""Flag of MEMBER: it cannot be reached now."""
MORE = 1
"""Flag of RECEIPT and AGREED: another part follows."""
ASLEEP = 1
"""Flag of SLEEP: from now on; without it, awake."""
URGENT = 64
"""Flag of messages: before all that is not urgent and waits."""
STOP = 1
"""Flag of FLOW: say and cast nothing more into the room for now."""
RAISED = 1
"""Flag of NACK: the member's handler raised; the name is the code of its error."""


class Frame(msgspec.Struct, gc=False):
    """One frame. `kind` is a plain number: a kind nobody knows is still a frame."""

    kind: int
    flags: int = 0
    to: int = 0
    id: int = 0
    value: int = 0
    name: str = ""
    data: bytes = b""


def encode_frame(
    kind: int,
    *,
    flags: int = 0,
    to: int = 0,
    id: int = 0,
    value: int = 0,
    name: str = "",
    data: bytes = b"",
) -> bytes:
    """The bytes of one frame. The caller keeps to the limits of sizes and numbers."""
    text = name.encode()
    size = len(text)
    return (
        HEADER.pack(_FIXED_BYTES + size + len(data), kind, flags, size, to, id, value) + text + data
    )


_ACK = encode_frame(Kind.ACK)


def encode_ack(id: int) -> bytes:
    """As `encode_frame(Kind.ACK, id=id)`, of which there are more than of all others."""
    return _ACK[:12] + id.to_bytes(4) + _ACK[16:]


class Decoder:
    """Collects bytes and gives whole frames.

    After the first malformed frame `broken` says what is wrong, and nothing is decoded any more.
    The frames before it are given, however the bytes were cut on their way.
    """

    __slots__ = ("_need", "broken", "limit_bytes", "rest")

    def __init__(self, limit_bytes: int = DATA_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.rest: bytes | bytearray = b""
        """The beginning of a frame that has not come whole."""
        self._need = 0
        self.broken: ProtocolError | None = None

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are complete with `data`."""
        if self.broken is not None:
            return []
        if self.rest:
            self.rest += data
            if len(self.rest) < self._need:
                return []
            data, self.rest = bytes(self.rest), b""
        frames: list[Frame] = []
        start = self._decode(data, frames)
        if start < len(data):
            self.rest = bytearray(data[start:])
        return frames

    def _decode(self, data: bytes, frames: list[Frame]) -> int:
        """Append the whole frames in `data`; return where the first incomplete one starts."""
        start, end, limit, size = 0, len(data), self.limit_bytes, HEADER.size
        while end - start >= size:
            length, kind, flags, name_size, to, id, value = HEADER.unpack_from(data, start)
            stop = start + _LENGTH_BYTES + length
            name_end = start + size + name_size
            if name_end > stop or stop - name_end > limit or name_size > NAME_BYTES:
                self._break(length, name_size)
                return end
            if stop > end:
                self._need = stop - start
                return start
            try:
                name = str(data[start + size : name_end], "utf-8") if name_size else ""
            except UnicodeDecodeError:
                self.broken = ProtocolError(f"a frame of kind {kind} has a name that is not UTF-8")
                return end
            frames.append(Frame(kind, flags, to, id, value, name, data[name_end:stop]))
            start = stop
        self._need = size
        return start

    def _break(self, length: int, name_size: int) -> None:
        size = length - _FIXED_BYTES
        if size < name_size or name_size > NAME_BYTES:
            problem = f"a frame with {size} bytes of name and data has a name of {name_size}"
        else:
            problem = (
                f"a frame has {size - name_size} bytes of data, over the {self.limit_bytes} allowed"
            )
        self.broken = ProtocolError(problem)


def check_name(name: str, what: str = "name") -> str:
    """`name` if it may name a member, hub, room or key. Raises `ProtocolError`."""
    if not name or len(name.encode()) > NAME_BYTES:
        raise ProtocolError(f"a {what} has 1 to {NAME_BYTES} bytes, this one {len(name.encode())}")
    if not name.isprintable():
        raise ProtocolError(f"the {what} {name!r} has characters that cannot be printed")
    return name


def check_given_name(name: str, what: str = "name") -> str:
    """The same for one that our own side was given. Raises `UsageError`."""
    try:
        return check_name(name, what)
    except ProtocolError as error:
        raise UsageError(error.message) from None
