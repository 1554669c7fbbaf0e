"""What a request looks like to the app, and a response to the client. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabane.gateway.api import FORWARD_HEADERS
from tabane.gateway.headers import (
    APPENDED,
    PROVENANCE,
    describe_client,
    provenance_lines,
    status_line,
)
from tabane.gateway.http1 import Request, ResponseReader
from tabane.model import Value

LAST_CHUNK = b"0\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Provenance(Value, frozen=True):
    """Where a connection's requests come from. `trusted`: from another gateway, which told it."""

    peer: str
    proto: str
    trusted: bool = False


def forward_fields(request: Request) -> dict[bytes, bytes]:
    """What another gateway says about a request."""
    return {key: value.strip() for key, value in request.fields if key in FORWARD_HEADERS}


def encode_request(
    request: Request, provenance: Provenance, extra: Iterable[tuple[bytes, bytes]]
) -> bytes:
    """The head to send upstream."""
    lines = [
        request.method + b" " + request.target + b" HTTP/1.1",
        b"Host: " + request.authority,
        *request.lines,
    ]
    if request.length is not None:
        lines.append(b"Content-Length: %d" % request.length)
    elif request.chunked:
        lines.append(b"Transfer-Encoding: chunked")
    if request.expects_continue and not request.buffered:
        lines.append(b"Expect: 100-continue")
    if request.upgrade:
        lines.append(b"Connection: upgrade\r\nUpgrade: " + request.upgrade)
    lines += _provenance(request, provenance)
    lines += [name + b": " + value for name, value in extra]
    lines.append(b"\r\n")
    return b"\r\n".join(lines)


def _provenance(request: Request, provenance: Provenance) -> list[bytes]:
    told = [(key, value) for key, value in request.fields if key in PROVENANCE]
    if provenance.trusted:
        return [key + b": " + value for key, value in told]
    if not told:
        return [provenance_lines(provenance.peer, provenance.proto, request.authority)]
    own = describe_client(provenance.peer, provenance.proto, request.authority)
    lines = []
    for name, word in own.items():
        before = [value for key, value in told if key == name and name in APPENDED]
        lines.append(name.title() + b": " + b", ".join([*before, word]))
    return lines


def encode_response(request: Request, reader: ResponseReader, *, keep_alive: bool) -> bytes:
    """The head to send to the client. Raises `BadMessage` for an impossible status line."""
    lines = [status_line(reader.status, reader.reason), *reader.lines]
    if reader.length is not None:
        lines.append(b"Content-Length: %d" % reader.length)
    elif is_chunked(request, reader):
        lines.append(b"Transfer-Encoding: chunked")
    if reader.status in (101, 426) and reader.upgrade:
        lines.append(b"Connection: upgrade\r\nUpgrade: " + reader.upgrade)
    elif not keep_alive:
        lines.append(b"Connection: close")
    elif request.is_http_1_0:
        lines.append(b"Connection: keep-alive")
    lines.append(b"\r\n")
    return b"\r\n".join(lines)


def is_chunked(request: Request, reader: ResponseReader) -> bool:
    """The response's body goes to the client in chunks."""
    return reader.length is None and not reader.has_no_body and not request.is_http_1_0


def is_delimited(request: Request, reader: ResponseReader) -> bool:
    """The client can tell where the response ends without the connection's end."""
    return reader.has_no_body or reader.length is not None or not request.is_http_1_0


def encode_interim(status: int, reason: bytes, lines: list[bytes]) -> bytes:
    """A whole 1xx response. Raises `BadMessage` as `encode_response`."""
    return b"\r\n".join([status_line(status, reason), *lines, b"\r\n"])


def encode_chunk(pieces: Sequence[bytes]) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (sum(map(len, pieces)), b"".join(pieces))


def encode_last_chunk(trailers: list[bytes]) -> bytes:
    return b"\r\n".join([b"0", *trailers, b"\r\n"]) if trailers else LAST_CHUNK
