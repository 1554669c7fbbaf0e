"""The frames of a conversation with an instance: a command's streams, or a copy's.

A frame is a letter, the length of what follows (4 bytes, big-endian), and that. The client's:

    B   begin: JSON, what to do. The first, and only once
    I   input
    E   the input has ended
    W   the terminal's size: rows and columns, 2 bytes each
    S   a signal for the program: its number, 1 byte

The node's:

    O   output: stdout
    R   stderr
    C   the program has taken so many more bytes of input: 4 bytes
    X   it has ended, with this exit code: 4 bytes. Nothing comes after it
    F   it was ended, or never was: JSON, as the body of an error. Nothing comes after it

The client never has more than `WINDOW` bytes of input on the way that were not confirmed by C. So
the node always reads, whatever the program does, and sees at once that a client is gone.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from tabane.errors import ProtocolError

BEGIN, INPUT, END, SIZE, SIGNAL = b"B", b"I", b"E", b"W", b"S"
OUTPUT, ERROR, CREDIT, EXIT, FAILURE = b"O", b"R", b"C", b"X", b"F"
CLIENTS = frozenset((BEGIN, INPUT, END, SIZE, SIGNAL))
NODES = frozenset((OUTPUT, ERROR, CREDIT, EXIT, FAILURE))
WINDOW = 256 << 10
MAX_BYTES = 4 << 20
"""Of a frame; of input and output there are never more than 64 KiB in one."""
HEAD = struct.Struct(">cI")
_PAIR, _NUMBER = struct.Struct(">HH"), struct.Struct(">I")

Frame = tuple[bytes, bytes]
"""Its letter, and what it carries."""


def encode(kind: bytes, data: bytes = b"") -> bytes:
    return HEAD.pack(kind, len(data)) + data


def encode_size(rows: int, columns: int) -> bytes:
    return encode(SIZE, _PAIR.pack(rows, columns))


def encode_number(kind: bytes, number: int) -> bytes:
    """C and X."""
    return encode(kind, _NUMBER.pack(number))


def parse_size(data: bytes) -> tuple[int, int]:
    """Rows and columns, above 0. Raises `ProtocolError`."""
    if len(data) != _PAIR.size or 0 in (size := _PAIR.unpack(data)):
        raise ProtocolError("a size is two numbers above 0, of 2 bytes each")
    rows, columns = size
    return rows, columns


def parse_number(data: bytes) -> int:
    """Raises `ProtocolError`."""
    if len(data) != _NUMBER.size:
        raise ProtocolError("a number is 4 bytes")
    number: int = _NUMBER.unpack(data)[0]
    return number


class Parser:
    """Bytes as they come in, whole frames out. `kinds`: those that the other side may send."""

    def __init__(self, kinds: frozenset[bytes]) -> None:
        self._kinds = kinds
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete now. Raises `ProtocolError`; all is over then."""
        self._rest += data
        while len(self._rest) >= HEAD.size:
            kind, length = HEAD.unpack_from(self._rest)
            if kind not in self._kinds or length > MAX_BYTES:
                raise ProtocolError(f"{kind!r} with {length} bytes is no frame of a conversation")
            end = HEAD.size + length
            if len(self._rest) < end:
                return
            frame, self._rest = (kind, self._rest[HEAD.size : end]), self._rest[end:]
            yield frame
