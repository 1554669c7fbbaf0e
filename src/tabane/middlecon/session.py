"""How a session opens: magic, HELLO, WELCOME; without IO.

The side that dials sends `MAGIC` and HELLO at once; the hub answers with `MAGIC` and WELCOME, or
with `MAGIC` and ERROR and a close. Nothing else may be sent before. A dialer skips text before the
hub's magic, which a hub in chat mode may have sent to what it took for a person.

`Session` checks that order and gives frames. What opened frames mean is not its business.
"""

from __future__ import annotations

import re
from enum import StrEnum

import msgspec

from tabane import errors
from tabane.errors import ProtocolError, TabaneError
from tabane.middlecon.frames import (
    DATA_BYTES,
    MAGIC,
    Decoder,
    Frame,
    Kind,
    check_name,
    encode_frame,
)

VERSIONS = (1,)
FEATURES: tuple[str, ...] = ()
"""Optional parts of the protocol that this side can do; both sides use what both name."""

HELLO_BYTES = 64 << 10
"""The largest data of a frame that a hub takes before it knows who is there."""
ROLES = ("member", "hub")
MOST_HEARTBEAT_S = 24 * 3600.0

SKIPPED_TEXT_BYTES = 1 << 20
"""A dialer that finds no magic in so much text is talking to something that is no hub."""


class Mode(StrEnum):
    """What the first bytes of a connection say about who is there."""

    BINARY = "binary"
    HTTP = "http"
    TEXT = "text"


_HTTP_METHODS = (
    b"GET ",
    b"HEAD ",
    b"POST ",
    b"PUT ",
    b"PATCH ",
    b"DELETE ",
    b"OPTIONS ",
    b"TRACE ",
    b"CONNECT ",
    b"PROPFIND ",
    b"PROPPATCH ",
    b"MKCOL ",
    b"PRI ",
)
_HTTP_LINE = re.compile(rb"(\r?\n)*[^\r\n]* HTTP/1\.[0-9]\r?\n")
"""A request's first line whatever its method is, after empty lines, which servers skip."""


def sniff(first: bytes) -> Mode:
    """The mode that a connection's first bytes ask for. `first` is not empty."""
    if first[0] == MAGIC[0]:
        return Mode.BINARY
    is_http = first.lstrip(b"\r\n").startswith(_HTTP_METHODS) or _HTTP_LINE.match(first)
    return Mode.HTTP if is_http else Mode.TEXT


class Limits(msgspec.Struct, frozen=True):
    """What one hub allows. docs/protocol.md says why the numbers are what they are."""

    data_bytes: int = DATA_BYTES
    hold_bytes: int = 1 << 20
    """Of unsent data for one session or link: above it those who speak in its rooms are asked to
    wait, until all is sent."""
    queue_bytes: int = 8 << 20
    """Of unsent data for one session or link: above it messages to it fail as overloaded and casts
    are dropped; above twice this it is cut off."""
    sessions: int = 10_000
    rooms: int = 100_000
    rooms_per_session: int = 1_000
    state_keys: int = 256
    """Of one member."""
    state_bytes: int = 64 << 10
    """Of one value."""
    agree_bytes: int = 64 << 10
    """Of a value to agree on, which may have to be kept for those who could not be told."""
    untold: int = 1_000
    """Outcomes kept, one for each member that could not be told it."""
    timeout_s: float = 3600.0
    """The longest deadline; longer ones are cut to it."""
    silence_s: float = 0.2
    """How long a new connection may say nothing before it is taken for a person's, who listens."""
    line_bytes: int = 64 << 10
    """Of one line of a person."""


class Hello(msgspec.Struct, omit_defaults=True):
    """Who dials. `instance` names this run of the dialer: a session with the same name and instance
    takes the place of the one before."""

    name: str
    instance: str
    role: str = "member"
    """`member` or `hub`."""
    datacenter: str = ""
    """Of a hub."""
    versions: tuple[int, ...] = VERSIONS
    features: tuple[str, ...] = FEATURES
    token: str = ""
    drawn: bool = False
    """Nobody chose the name: it was drawn at random."""
    was: str = ""
    """What the hub of the last session called it, when that was another name."""


class Welcome(msgspec.Struct, omit_defaults=True):
    """What the hub agrees to. `hubs` are its peers and whether their links are open."""

    hub: str
    instance: str
    datacenter: str = ""
    version: int = VERSIONS[-1]
    features: tuple[str, ...] = ()
    heartbeat_s: float = 3.0
    data_bytes: int = DATA_BYTES
    hubs: dict[str, bool] = {}
    name: str = ""
    """What the member is called, if not what it said: it is a program in a container."""


_parse_hello = msgspec.msgpack.Decoder(Hello)
_parse_welcome = msgspec.msgpack.Decoder(Welcome)


def encode_hello(hello: Hello) -> bytes:
    """The first bytes of a dialer."""
    return MAGIC + encode_frame(Kind.HELLO, data=msgspec.msgpack.encode(hello))


def encode_welcome(welcome: Welcome) -> bytes:
    return encode_frame(Kind.WELCOME, data=msgspec.msgpack.encode(welcome))


def encode_error(error: TabaneError) -> bytes:
    """The last frame of a connection that is about to be cut, or refused."""
    return encode_frame(Kind.ERROR, name=error.code, data=error.message.encode())


def parse_hello(frame: Frame) -> Hello:
    """Raises `ProtocolError`."""
    try:
        hello = _parse_hello.decode(frame.data)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"this HELLO cannot be read: {error}") from None
    if hello.role not in ROLES:
        raise ProtocolError(f"nobody here is a {hello.role!r}: a dialer is {' or '.join(ROLES)}")
    _check_datacenter(hello.datacenter)
    return hello


def parse_welcome(frame: Frame) -> Welcome:
    """The hub's WELCOME. Raises what an ERROR in its place says."""
    if frame.kind == Kind.ERROR:
        raise error_of(frame.name, frame.data.decode(errors="replace"))
    try:
        welcome = _parse_welcome.decode(frame.data)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"this WELCOME cannot be read: {error}") from None
    check_name(welcome.hub, "hub name")
    for name in (welcome.name, *welcome.hubs):
        if name:
            check_name(name)
    _check_datacenter(welcome.datacenter)
    if not 0 < welcome.heartbeat_s <= MOST_HEARTBEAT_S:
        raise ProtocolError(f"{welcome.heartbeat_s} s is no heartbeat")
    return welcome


def _check_datacenter(name: str) -> None:
    """It goes on to all hubs, which cut off who tells a name that may not be."""
    if name:
        check_name(name, "data center")


def agree_version(offered: tuple[int, ...]) -> int:
    """The newest version both sides speak. Raises `ProtocolError`."""
    common = set(offered) & set(VERSIONS)
    if not common:
        raise ProtocolError(
            f"the dialer speaks versions {list(offered)} of the protocol, this hub {list(VERSIONS)}"
        )
    return max(common)


_BY_CODE: dict[str, type[TabaneError]] = {
    kind.code: kind
    for kind in (
        errors.NotFound,
        errors.Conflict,
        errors.Denied,
        errors.Unauthenticated,
        errors.ProtocolError,
        errors.Closed,
        errors.Busy,
        errors.TimedOut,
        errors.Unreachable,
    )
}


def error_of(code: str, text: str) -> TabaneError:
    """The error that an ERROR stands for; `Refused` for a code that is not the hub's own."""
    return _BY_CODE.get(code, errors.Refused)(text)


class Side(StrEnum):
    HUB = "hub"
    DIALER = "dialer"


_OPENERS = {Side.HUB: {Kind.HELLO}, Side.DIALER: {Kind.WELCOME, Kind.ERROR}}


class Session:
    """One side of a connection: bytes in, frames out, the opening checked.

    `broken` is set once the other side broke the protocol; `mode` once its first byte is there
    (a session that is not binary gives no frames; its first bytes are in `text`, for chat).
    """

    __slots__ = (
        "_data_bytes",
        "_first",
        "_openers",
        "_started",
        "_waiting",
        "decoder",
        "mode",
        "side",
        "text",
    )

    def __init__(self, side: Side, data_bytes: int = DATA_BYTES) -> None:
        self.side = side
        self.mode: Mode | None = None
        self.text = b""
        self._data_bytes = data_bytes
        self.decoder = Decoder(data_bytes if side is Side.DIALER else min(data_bytes, HELLO_BYTES))
        self._openers = _OPENERS[side]
        self._first = bytearray()
        self._started = False
        self._waiting = True

    @property
    def broken(self) -> ProtocolError | None:
        return self.decoder.broken

    @property
    def limit_bytes(self) -> int:
        """The largest data of a frame."""
        return self.decoder.limit_bytes

    def set_limit(self, data_bytes: int) -> None:
        """The largest data of a frame that this side takes from now on."""
        self.decoder.limit_bytes = data_bytes

    def receive(self, data: bytes) -> list[Frame]:
        """The frames that are complete with `data`."""
        if not self._waiting:
            return self.decoder.feed(data)
        frames = self.decoder.feed(data) if self._started else self._start(data)
        return self._open(frames) if frames else frames

    def _start(self, data: bytes) -> list[Frame]:
        self._first += data
        if self.side is Side.DIALER:
            return self._skip_text()
        first = bytes(self._first)
        self.mode = sniff(first)
        if self.mode is not Mode.BINARY:
            self.text = first
            self._first.clear()
            return []
        if not MAGIC.startswith(first[: len(MAGIC)]):
            self.decoder.broken = ProtocolError(
                f"the stream begins with {first[:4]!r}, not {MAGIC!r}"
            )
            return []
        return self._after(len(MAGIC)) if len(first) >= len(MAGIC) else []

    def _skip_text(self) -> list[Frame]:
        found = self._first.find(MAGIC)
        if found >= 0:
            self.mode = Mode.BINARY
            return self._after(found + len(MAGIC))
        if len(self._first) > SKIPPED_TEXT_BYTES:
            self.decoder.broken = ProtocolError("what answers there is no hub: it sends only text")
        return []

    def _after(self, offset: int) -> list[Frame]:
        data = bytes(self._first[offset:])
        self._first.clear()
        self._started = True
        return self.decoder.feed(data)

    def _open(self, frames: list[Frame]) -> list[Frame]:
        if frames[0].kind not in self._openers:
            self.decoder.broken = ProtocolError(
                f"the first frame has kind {frames[0].kind}, not {min(self._openers)}"
            )
            return []
        self._waiting = False
        self.decoder.limit_bytes = self._data_bytes
        return frames
