"""What a gateway answers itself when there is no app's answer to pass on."""

from __future__ import annotations

import math

import msgspec

from tabane.errors import (
    Denied,
    NotFound,
    PeerError,
    Stale,
    TabaneError,
    Unauthenticated,
    Unavailable,
)
from tabane.gateway.api import REFUSED_HEADER
from tabane.gateway.headers import BadMessage
from tabane.model import Value

PHRASES = {
    400: b"Bad Request",
    401: b"Unauthorized",
    403: b"Forbidden",
    404: b"Not Found",
    405: b"Method Not Allowed",
    408: b"Request Timeout",
    414: b"URI Too Long",
    417: b"Expectation Failed",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
    505: b"HTTP Version Not Supported",
}


class Reply(Value, frozen=True):
    """An answer of the gateway's own. `reason` is one sentence for people, `code` one word."""

    status: int
    code: str
    reason: str
    retry_after_s: float | None = None


STATUSES: tuple[tuple[type[TabaneError], int], ...] = (
    (NotFound, 404),
    (Unauthenticated, 401),
    (Denied, 403),
    (Stale, 503),
    (Unavailable, 503),
    (PeerError, 502),
)


def reply_for(error: TabaneError) -> Reply:
    """What to tell a client whose session ended with `error`."""
    if isinstance(error, BadMessage):
        return Reply(error.status, error.code, error.message)
    status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
    retry_after_s = error.retry_after_s if isinstance(error, Unavailable) else None
    if status == 503 and retry_after_s is None:
        retry_after_s = 1.0
    return Reply(status, error.code, error.message, retry_after_s)


def encode_reply(reply: Reply, *, connection: bytes, is_head: bool, refused: bool) -> bytes:
    """The whole response. `connection` is the Connection field's value, or empty; `refused` tells
    another gateway that no byte of the request reached the app."""
    body = msgspec.json.encode({"error": reply.code, "reason": reply.reason}) + b"\n"
    lines = [
        b"HTTP/1.1 %d %b" % (reply.status, PHRASES[reply.status]),
        b"Content-Type: application/json",
        b"Content-Length: %d" % len(body),
    ]
    if reply.retry_after_s is not None:
        lines.append(b"Retry-After: %d" % max(1, math.ceil(reply.retry_after_s)))
    if reply.status == 401:
        lines.append(b"WWW-Authenticate: Bearer")
    if reply.status == 405:
        lines.append(b"Allow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, TRACE")
    if refused:
        lines.append(REFUSED_HEADER + b": " + reply.code.encode())
    if connection:
        lines.append(b"Connection: " + connection)
    return b"\r\n".join([*lines, b"", b"" if is_head else body])
