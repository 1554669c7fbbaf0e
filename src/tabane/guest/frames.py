"""What host and guest say to each other over a virtio-serial port, as frames. Without IO.

docs/guest-agent.md has the format, with examples. A port has no connections of its own: what one
host wrote half may be followed by what the next one writes. So each side begins with `SILENCE` zero
bytes, more than any frame can have in a row; whoever reads them knows where it is. A frame that was
broken off by them ends in a zero where its end mark should be, and counts for nothing.

A guest is not trusted: what it may make the host keep is bounded by `MAX_PAYLOAD` here, and by the
windows of its conversations and links (`tabane.guest.streams`).
"""

from __future__ import annotations

import re
import struct
from enum import IntEnum
from typing import NamedTuple

from tabane.errors import ProtocolError

VERSION = 1
MAX_PAYLOAD = 16384
SILENCE = bytes(32768)
END_MARK = 0xA5
NONCE_BYTES = 16
WINDOW_BYTES = 65536
"""Of one stream: what may be on its way before its reader takes it."""
LINK_WINDOW_BYTES = 32768
"""Likewise, of each direction of a connection that a program inside has made."""
FIRST_LINK = 1 << 31
"""Channels from here on are numbered by the guest: connections of programs inside."""
MOST_ZEROS = 2 * len(SILENCE)
"""Between two frames: a connection begins with fewer."""

_HEADER = struct.Struct("<BII")
_NO_ZERO = re.compile(rb"[^\0]")
_WELCOME = struct.Struct(f"<H{NONCE_BYTES}s")


class Kind(IntEnum):
    """From the host below 64, from the guest above. The answer to each is in the documentation."""

    HELLO = 1
    EXEC = 2
    PUT = 3
    GET = 4
    LIST = 5
    INPUT = 6
    END_INPUT = 7
    RESIZE = 8
    SIGNAL = 9
    CLOSE = 10
    GRANT = 11
    LISTEN = 12
    STATS = 13
    LIMIT = 14
    CLOCK = 15
    RESEED = 16
    HOLD = 17
    RELEASE = 18
    WELCOME = 64
    OUTPUT = 65
    COMPLAINT = 66
    TAKEN = 67
    ENDED = 68
    ANSWER = 69
    REFUSED = 70
    BEGUN = 71
    DIAL = 72
    END_OUTPUT = 73


class Frame(NamedTuple):
    kind: int
    """A `Kind`, or one of a newer agent."""
    channel: int
    """The conversation or question it belongs to, numbered by the host, or, from `FIRST_LINK` on,
    by the guest; 0: the guest as a whole."""
    payload: bytes = b""


def encode_frame(kind: int, channel: int = 0, payload: bytes = b"") -> bytes:
    """One frame. `payload` has at most `MAX_PAYLOAD` bytes."""
    assert len(payload) <= MAX_PAYLOAD
    return _HEADER.pack(kind, channel, len(payload)) + payload + bytes([END_MARK])


def encode_hello(nonce: bytes) -> bytes:
    """What a connection begins with. The guest's welcome has the same nonce."""
    return SILENCE + encode_frame(Kind.HELLO, 0, _WELCOME.pack(VERSION, nonce))


def parse_welcome(payload: bytes) -> tuple[int, bytes]:
    """The agent's version of the protocol, and the nonce. Raises `ProtocolError`."""
    if len(payload) < _WELCOME.size:
        raise ProtocolError("the guest's welcome is too short")
    version, nonce = _WELCOME.unpack_from(payload)
    return version, nonce


class FrameReader:
    """Bytes to frames: `feed` it what comes. It holds less than two frames."""

    def __init__(self) -> None:
        self._inbox = b""
        self._at = 0
        """Where the next frame begins: thousands of tiny ones at once are not copied for each."""
        self._in_step = False
        self._zeros = 0
        """Since the latest frame."""

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are complete now; none before a silence was heard.

        Raises `ProtocolError` for what is no frame; then it waits for a silence, which may be in
        what it has been given already.
        """
        self._inbox += data
        if not self._in_step and not self._find_silence():
            return []
        frames = []
        try:
            while (frame := self._next()) is not None:
                frames.append(frame)
        finally:
            self._inbox, self._at = self._inbox[self._at :], 0
        return frames

    def _find_silence(self) -> bool:
        at = self._inbox.find(SILENCE)
        if at < 0:
            self._inbox = self._inbox[-len(SILENCE) + 1 :]
            return False
        self._inbox = self._inbox[at + len(SILENCE) :]
        self._in_step = True
        return True

    def _next(self) -> Frame | None:
        inbox, at = self._inbox, self._skip_zeros()
        if len(inbox) < at + _HEADER.size:
            return None
        kind, channel, length = _HEADER.unpack_from(inbox, at)
        if length > MAX_PAYLOAD:
            raise self._lost(f"a frame of {length} bytes, more than {MAX_PAYLOAD}")
        start = at + _HEADER.size
        end = start + length
        if len(inbox) <= end:
            return None
        if inbox[end] != END_MARK:
            raise self._lost("a frame without its end mark")
        self._at = end + 1
        self._zeros = 0
        return Frame(kind, channel, inbox[start:end])

    def _skip_zeros(self) -> int:
        found = _NO_ZERO.search(self._inbox, self._at)
        end = found.start() if found is not None else len(self._inbox)
        self._zeros += end - self._at
        self._at = end
        if self._zeros > MOST_ZEROS:
            raise self._lost("nothing")
        return end

    def _lost(self, what: str) -> ProtocolError:
        self._in_step = False
        self._zeros = 0
        return ProtocolError(f"the guest sent {what}")
