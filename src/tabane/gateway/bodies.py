"""How long a message's body is: decoders of its framing, without IO."""

from __future__ import annotations

from typing import Protocol

from httptools import HttpParserError, HttpRequestParser

from tabane.gateway.headers import BadMessage

EMPTY_LINE = b"\r\n\r\n"
QUIET_BYTES = 64 << 10
"""So much may come without a byte of body: chunk extensions and trailers."""

_HEAD = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"


class Body(Protocol):
    """A body that arrives. `is_done` once its last byte came."""

    is_done: bool

    def feed(self, data: bytes, start: int, pieces: list[bytes]) -> int:
        """Take what belongs to the body from `data[start:]`; append its content to `pieces`, and
        return where it ended. Raises `BadMessage` with status 400."""


class LengthBody:
    """A body of known length."""

    __slots__ = ("_remaining", "is_done")

    def __init__(self, length: int) -> None:
        self._remaining = length
        self.is_done = length == 0

    def feed(self, data: bytes, start: int, pieces: list[bytes]) -> int:
        piece = data[start : start + self._remaining]
        if piece:
            pieces.append(piece)
        self._remaining -= len(piece)
        self.is_done = self._remaining == 0
        return start + len(piece)


class EndlessBody:
    """A body that ends with its connection."""

    __slots__ = ()

    is_done = False

    def feed(self, data: bytes, start: int, pieces: list[bytes]) -> int:
        pieces.append(data[start:])
        return len(data)


class ChunkedBody:
    """A body in chunks, parsed by llhttp. Trailers are discarded (RFC 9110 section 6.5.1).

    llhttp does not say where a message ends, but one in chunks ends with an empty line: it is fed
    up to each.
    """

    __slots__ = ("_parser", "_pieces", "_quiet", "_tail", "is_done")

    def __init__(self) -> None:
        self.is_done = False
        self._pieces: list[bytes] = []
        self._quiet = 0
        self._tail = b""
        self._parser = HttpRequestParser(self)
        self._parser.feed_data(_HEAD)

    def feed(self, data: bytes, start: int, pieces: list[bytes]) -> int:
        self._pieces = pieces
        while start < len(data) and not self.is_done:
            end = end_of_piece(self._tail, data, start)
            piece = data[start:end]
            before = len(pieces)
            try:
                self._parser.feed_data(piece)
            except HttpParserError as error:
                raise BadMessage(400, f"the body's chunks are broken: {error}") from None
            self._quiet = 0 if len(pieces) > before else self._quiet + len(piece)
            if self._quiet > QUIET_BYTES:
                raise BadMessage(400, f"the body's trailers are over {QUIET_BYTES} bytes long")
            self._tail = (self._tail + piece)[-3:]
            start = end
        return start

    def on_message_begin(self) -> None:
        if self.is_done:  # never: it would take another message's bytes for this one's
            raise ValueError("llhttp was fed beyond the end of a body")

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)

    def on_message_complete(self) -> None:
        self.is_done = True


def end_of_piece(tail: bytes, data: bytes, start: int) -> int:
    """Where the piece of `data` that begins at `start`, behind `tail`, ends: behind the first empty
    line, or with the data."""
    if tail:
        at = (tail + data[start : start + 3]).find(EMPTY_LINE)
        if at >= 0:
            return start + at + 4 - len(tail)
    at = data.find(EMPTY_LINE, start)
    return at + 4 if at >= 0 else len(data)
