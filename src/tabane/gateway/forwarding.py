"""What a request looks like to the app, and a response to the client. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from tabane.gateway.api import FORWARD_HEADERS
from tabane.gateway.headers import APPENDED, PROVENANCE, describe_client
from tabane.gateway.heads import REMEMBERED, REMEMBERED_BYTES, RequestHead, ResponseHead

LAST_CHUNK = b"0\r\n\r\n"
Extra = tuple[tuple[bytes, bytes], ...]


class Provenance:
    """Where a connection's requests come from. `trusted`: from another gateway, which told it."""

    __slots__ = ("peer", "proto", "trusted")

    def __init__(self, peer: str, proto: str, trusted: bool) -> None:
        self.peer = peer
        self.proto = proto
        self.trusted = trusted


@lru_cache(REMEMBERED)
def provenance_of(peer: str, proto: str, trusted: bool) -> Provenance:
    """The same object for the same client, so that what is encoded for it can be remembered."""
    return Provenance(peer, proto, trusted)


def forward_fields(request: RequestHead) -> dict[bytes, bytes]:
    """What another gateway says about a request."""
    return {key: value for key, value in request.fields if key in FORWARD_HEADERS}


def encode_request(
    request: RequestHead, provenance: Provenance, extra: Extra, expects_continue: bool
) -> bytes:
    """The head to send upstream, with the `extra` fields."""
    if len(request.block) <= REMEMBERED_BYTES:
        return _encode_request(request, provenance, extra, expects_continue)
    return _encode_request.__wrapped__(request, provenance, extra, expects_continue)


@lru_cache(REMEMBERED)
def _encode_request(
    request: RequestHead, provenance: Provenance, extra: Extra, expects_continue: bool
) -> bytes:
    parts = [
        *(request.method, b" ", request.target, b" HTTP/1.1\r\nHost: ", request.authority),
        request.block,
    ]
    if request.length is not None:
        parts.append(b"\r\nContent-Length: %d" % request.length)
    elif request.chunked:
        parts.append(b"\r\nTransfer-Encoding: chunked")
    if expects_continue:
        parts.append(b"\r\nExpect: 100-continue")
    if request.upgrade:
        parts.append(b"\r\nConnection: upgrade\r\nUpgrade: " + request.upgrade)
    parts.append(_provenance(request, provenance))
    parts += [b"\r\n" + name + b": " + value for name, value in extra]
    parts.append(b"\r\n\r\n")
    return b"".join(parts)


def _provenance(request: RequestHead, provenance: Provenance) -> bytes:
    told = [field for field in request.fields if field[0] in PROVENANCE]
    if provenance.trusted:
        return b"".join(b"\r\n" + key + b": " + value for key, value in told)
    own = describe_client(provenance.peer, provenance.proto, request.authority)
    block = b""
    for name, word in own.items():
        before = [value for key, value in told if key == name and name in APPENDED]
        block += b"\r\n" + name.title() + b": " + b", ".join([*before, word])
    return block


class Answer:
    """How a response goes to a client: its head, and what follows."""

    __slots__ = ("chunked", "head", "keep_alive")

    def __init__(self, head: bytes, *, chunked: bool, keep_alive: bool) -> None:
        self.head = head
        self.chunked = chunked
        self.keep_alive = keep_alive


NO_ANSWER = Answer(b"", chunked=False, keep_alive=False)


def encode_response(request: RequestHead, response: ResponseHead, keep_alive: bool) -> Answer:
    """The answer to `request`; `keep_alive` is what the client and the gateway would like."""
    to_head = request.method == b"HEAD"
    if len(response.block) <= REMEMBERED_BYTES:
        return _encode_response(response, keep_alive, to_head, request.is_http_1_0)
    return _encode_response.__wrapped__(response, keep_alive, to_head, request.is_http_1_0)


@lru_cache(REMEMBERED)
def _encode_response(
    response: ResponseHead, keep_alive: bool, to_head: bool, is_http_1_0: bool
) -> Answer:
    delimited = to_head or response.body_length is not None
    chunked = not delimited and not is_http_1_0
    keep_alive = keep_alive and (delimited or chunked)
    head = response.line + response.block
    if response.length is not None:
        head += b"\r\nContent-Length: %d" % response.length
    elif chunked:
        head += b"\r\nTransfer-Encoding: chunked"
    if response.status in (101, 426) and response.upgrade:
        head += b"\r\nConnection: upgrade\r\nUpgrade: " + response.upgrade
    elif not keep_alive:
        head += b"\r\nConnection: close"
    elif is_http_1_0:
        head += b"\r\nConnection: keep-alive"
    return Answer(head + b"\r\n\r\n", chunked=chunked, keep_alive=keep_alive)


def encode_interim(response: ResponseHead) -> bytes:
    """A whole 1xx response."""
    return response.line + response.block + b"\r\n\r\n"


def encode_chunk(pieces: Sequence[bytes]) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (sum(map(len, pieces)), b"".join(pieces))
