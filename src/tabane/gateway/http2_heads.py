"""HTTP/2's lists of fields, from and to the heads that the gateway knows. Pure functions.

A request of HTTP/2 is written down as HTTP/1.1 has it and read by the same rules, so that nothing
comes to an app by one protocol that could not come by the other. What HTTP/2 has of its own is
looked at here (RFC 9113 section 8): pseudo-fields, names in lower case, no field of one hop.
"""

from __future__ import annotations

import http
import re
import urllib.parse
from collections.abc import Iterable, Sequence
from functools import lru_cache

from tabane.gateway.api import REFUSED_HEADER
from tabane.gateway.headers import IN_REQUESTS, IN_RESPONSES, BadMessage
from tabane.gateway.heads import (
    REMEMBERED,
    REMEMBERED_BYTES,
    RequestHead,
    ResponseHead,
    parse_request_head,
    parse_response_head,
)
from tabane.gateway.replies import Reply, encode_reply

Fields = list[tuple[bytes, bytes]]
Trailers = Sequence[tuple[bytes, bytes]]

LIST_BYTES = 64 << 10
"""The longest list of fields, counted as RFC 9113 section 6.5.2 has it."""
OF_ONE_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}
)
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE = re.compile(rb"[^\r\n\0]*")
_TARGET = re.compile(rb"/[^ \r\n\t\0]*|\*")
_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_WITH_BODY = frozenset({b"POST", b"PUT", b"PATCH"})
_GRPC = b"application/grpc"
GRPC_STATUSES = {400: 13, 401: 16, 403: 7, 404: 12, 408: 4, 504: 4}
"""What a gRPC client is told instead of an HTTP status; of others, that the app is unavailable."""
UNAVAILABLE = 14


def parse_request_fields(fields: Iterable[tuple[bytes, bytes]], ended: bool) -> RequestHead:
    """The head that they stand for; `ended`: no body follows. Raises `BadMessage`."""
    pseudo, regular = _take_apart(fields, (b":method", b":scheme", b":authority", b":path"), 400)
    method = pseudo.get(b":method", b"")
    if method == b"CONNECT":
        raise BadMessage(405, "this gateway opens no tunnels: CONNECT is not served")
    target = pseudo.get(b":path", b"")
    if not _METHOD.fullmatch(method) or not _TARGET.fullmatch(target) or b":scheme" not in pseudo:
        raise BadMessage(400, "a request must have a method, a scheme and a path")
    hosts = {value for name, value in regular if name == b"host"}
    authority = pseudo.get(b":authority")
    if authority is not None:
        hosts.add(authority)
    if len(hosts) != 1:
        raise BadMessage(400, f"a request must name one host, this one names {len(hosts)}")
    if any(name == b"te" and value.lower() != b"trailers" for name, value in regular):
        raise BadMessage(400, "of transfer codings, HTTP/2 knows no other than trailers")
    lines = [b"%b %b HTTP/1.1\r\nHost: %b" % (method, target, hosts.pop())]
    lines += [name + b": " + value for name, value in regular if name != b"host"]
    if not any(name == b"content-length" for name, _ in regular):
        if not ended:
            lines.append(b"Transfer-Encoding: chunked")
        elif method in _WITH_BODY:
            lines.append(b"Content-Length: 0")
    return parse_request_head(b"\r\n".join([*lines, b"\r\n"]))


def parse_response_fields(fields: Iterable[tuple[bytes, bytes]]) -> ResponseHead:
    """The head that they stand for. Raises `BadMessage`."""
    pseudo, regular = _take_apart(fields, (b":status",), 502)
    status = pseudo.get(b":status", b"")
    if len(status) != 3 or not status.isdigit() or status == b"101":
        raise BadMessage(502, f"the app answered with the status {status[:80]!r}")
    lines = [b"HTTP/1.1 %b %b" % (status, _phrase(int(status)))]
    lines += [name + b": " + value for name, value in regular]
    return parse_response_head(b"\r\n".join([*lines, b"\r\n"]))


def parse_trailers(fields: Iterable[tuple[bytes, bytes]], *, of_request: bool) -> Fields:
    """Those that are passed on: none that has a meaning on this hop. Raises `BadMessage`."""
    _, regular = _take_apart(fields, (), 400 if of_request else 502)
    special = IN_REQUESTS if of_request else IN_RESPONSES
    return [(name, value) for name, value in regular if not special.match(b"\r\n%b:" % name)]


def _take_apart(
    fields: Iterable[tuple[bytes, bytes]], allowed: tuple[bytes, ...], status: int
) -> tuple[dict[bytes, bytes], Fields]:
    pseudo: dict[bytes, bytes] = {}
    regular: Fields = []
    for name, value in fields:
        if not _VALUE.fullmatch(value):
            raise BadMessage(status, f"the value of {name[:80]!r} has a line break or a NUL")
        if name[:1] == b":":
            if regular or name in pseudo or name not in allowed:
                raise BadMessage(status, f"the pseudo-field {name[:80]!r} has no place there")
            pseudo[name] = value
        elif not _NAME.fullmatch(name):
            raise BadMessage(status, f"{name[:80]!r} is no name of a field")
        elif name in OF_ONE_HOP:
            raise BadMessage(status, f"HTTP/2 has no field {name.decode()}")
        else:
            regular.append((name, value.strip(b" \t")))
    return pseudo, regular


def is_grpc(fields: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(
        name == b"content-type" and value.lower().startswith(_GRPC) for name, value in fields
    )


def _phrase(status: int) -> bytes:
    try:
        return http.HTTPStatus(status).phrase.encode()
    except ValueError:
        return b""


def encode_request_fields(head: RequestHead, encoded: bytes) -> Fields:
    """`encoded` is the request as `forwarding.encode_request` has it."""
    return [
        (b":method", head.method),
        (b":scheme", b"http"),
        (b":authority", head.authority),
        (b":path", head.target),
        *_fields_of(encoded),
        (b"te", b"trailers"),
    ]


def encode_response_fields(status: int, encoded: bytes) -> Fields:
    """`encoded` is the response's head as `forwarding` has it."""
    return [(b":status", b"%d" % status), *_fields_of(encoded)]


def encode_reply_fields(
    reply: Reply, *, is_head: bool, to_grpc: bool, refused: bool
) -> tuple[Fields, bytes]:
    """An answer of the gateway's own, and its body. gRPC has a form of its own for reasons."""
    if not to_grpc:
        encoded = encode_reply(reply, connection=b"", is_head=is_head, refused=refused)
        block, _, body = encoded.partition(b"\r\n\r\n")
        return encode_response_fields(reply.status, block + b"\r\n\r\n"), body
    status = GRPC_STATUSES.get(reply.status, UNAVAILABLE)
    fields = [
        (b":status", b"200"),
        (b"content-type", _GRPC),
        (b"grpc-status", b"%d" % status),
        (b"grpc-message", urllib.parse.quote(reply.reason, safe=" !#$&'()*+,/:;=?@[]\"").encode()),
    ]
    if refused:
        fields.append((REFUSED_HEADER, reply.code.encode()))
    return fields, b""


def _fields_of(encoded: bytes) -> Sequence[tuple[bytes, bytes]]:
    if len(encoded) <= REMEMBERED_BYTES:
        return _parse_lines(encoded)
    return _parse_lines.__wrapped__(encoded)


@lru_cache(REMEMBERED)
def _parse_lines(encoded: bytes) -> Sequence[tuple[bytes, bytes]]:
    """The fields of a head, without those that HTTP/2 says otherwise."""
    fields = []
    for line in encoded.split(b"\r\n")[1:-2]:
        name, _, value = line.partition(b":")
        lower = name.lower()
        if lower not in OF_ONE_HOP and lower != b"host":
            fields.append((lower, value.strip(b" \t")))
    return fields
