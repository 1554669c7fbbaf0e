"""The part of DNS messages (RFC 1035) that the node's resolver reads and writes itself.

It answers for apps and passes all else on as it came, so it needs the header and the one question
of a query, and answers of one address. Without IO: bytes in, values out.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from ipaddress import IPv4Address

from tabane.errors import ProtocolError
from tabane.model import Value

TTL_S = 5
"""Of an app's address: short, since an app may go while its name is in someone's cache."""

_HEADER = struct.Struct(">6H")
_QUESTION = struct.Struct(">2H")
_RESPONSE, _OPCODE, _AUTHORITATIVE, _RECURSION_DESIRED = 0x8000, 0x7800, 0x0400, 0x0100
_RECURSION_AVAILABLE = 0x0080
_POINTER_TO_QUESTION = 0xC000 | _HEADER.size
_MAX_LABEL, _MAX_NAME = 63, 255


class Kind(IntEnum):
    """Record types that are told apart."""

    A = 1
    AAAA = 28
    ANY = 255


class Code(IntEnum):
    """Response codes."""

    NO_ERROR = 0
    FORMAT_ERROR = 1
    SERVER_FAILURE = 2
    NO_SUCH_NAME = 3
    NOT_IMPLEMENTED = 4
    REFUSED = 5


class Query(Value, frozen=True):
    """A question: `name` in lower case without the last dot. `question` is as it came."""

    id: int
    flags: int
    name: str
    kind: int
    question: bytes

    @property
    def is_standard(self) -> bool:
        return not self.flags & _OPCODE


def parse_query(data: bytes) -> Query:
    """Read a query with one question; what follows the question is not looked at.

    Raises `ProtocolError` for anything else.
    """
    if len(data) < _HEADER.size:
        raise ProtocolError("a DNS message is shorter than its header")
    number, flags, questions, *_ = _HEADER.unpack_from(data)
    if flags & _RESPONSE or questions != 1:
        raise ProtocolError("a DNS message is not a query with one question")
    name, end = _parse_name(data, _HEADER.size)
    if end + _QUESTION.size > len(data):
        raise ProtocolError("a DNS question ends early")
    kind, _ = _QUESTION.unpack_from(data, end)
    question = data[_HEADER.size : end + _QUESTION.size]
    return Query(number, flags, name, kind, question)


def _parse_name(data: bytes, at: int) -> tuple[str, int]:
    labels: list[str] = []
    start = at
    while True:
        if at >= len(data):
            raise ProtocolError("a DNS name ends early")
        length = data[at]
        at += 1
        if length == 0:
            return ".".join(labels), at
        if length > _MAX_LABEL or at + length > len(data) or at + length - start > _MAX_NAME:
            raise ProtocolError("a DNS name is compressed, too long or ends early")
        labels.append(data[at : at + length].decode("latin-1").lower())
        at += length


def encode_query(number: int, name: str, kind: int) -> bytes:
    """A standard query that asks for recursion. `name` must be a valid one."""
    labels = [label.encode("latin-1") for label in name.split(".") if label]
    encoded = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    header = _HEADER.pack(number, _RECURSION_DESIRED, 1, 0, 0, 0)
    return header + encoded + _QUESTION.pack(kind, 1)


def encode_answer(query: Query, address: IPv4Address) -> bytes:
    """The app's address for A (and ANY) questions; for all other kinds: there is none."""
    has_one = query.kind in (Kind.A, Kind.ANY)
    header = _header(query, Code.NO_ERROR, _AUTHORITATIVE, int(has_one))
    if not has_one:
        return header + query.question
    record = struct.pack(">3HIH", _POINTER_TO_QUESTION, Kind.A, 1, TTL_S, 4) + address.packed
    return header + query.question + record


def encode_failure(query: Query, code: Code) -> bytes:
    return _header(query, code, 0, 0) + query.question


def encode_format_error(data: bytes) -> bytes | None:
    """The answer to what `parse_query` refused; None when it must not be answered."""
    if len(data) < _HEADER.size:
        return None
    number, flags, *_ = _HEADER.unpack_from(data)
    if flags & _RESPONSE:
        return None
    flags = _RESPONSE | (flags & (_OPCODE | _RECURSION_DESIRED)) | Code.FORMAT_ERROR
    return _HEADER.pack(number, flags, 0, 0, 0, 0)


def answers(query: Query, response: bytes) -> bool:
    """Whether `response` is one to `query`: same id, same question (names in any case)."""
    if len(response) < _HEADER.size + len(query.question):
        return False
    number, flags, questions, *_ = _HEADER.unpack_from(response)
    asked = response[_HEADER.size : _HEADER.size + len(query.question)]
    same = asked.lower() == query.question.lower()
    return number == query.id and bool(flags & _RESPONSE) and questions == 1 and same


def with_id(message: bytes, number: int) -> bytes:
    """The same message under another id."""
    return number.to_bytes(2, "big") + message[2:]


def _header(query: Query, code: Code, flags: int, count: int) -> bytes:
    kept = query.flags & (_OPCODE | _RECURSION_DESIRED)
    flags |= _RESPONSE | kept | _RECURSION_AVAILABLE | code
    return _HEADER.pack(query.id, flags, 1, count, 0, 0)
