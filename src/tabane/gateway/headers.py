"""Which HTTP header fields a gateway takes for itself, drops, and adds. Pure functions on bytes.

A header line is kept as `Name: value` without its line end; most lines of a message pass through
untouched, and only the *special* ones, which have a meaning on this hop, are looked into.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from functools import lru_cache

from tabane.errors import ProtocolError
from tabane.gateway.api import FORWARD_HEADERS, REFUSED_HEADER

HOP_BY_HOP = (
    *(b"connection", b"keep-alive", b"proxy-connection", b"te", b"transfer-encoding", b"upgrade"),
    *(b"proxy-authenticate", b"proxy-authorization"),
)
"""RFC 9110 section 7.6.1, and the credentials for a proxy, which end here."""

APPENDED = (b"x-forwarded-for", b"forwarded", b"via")
PROVENANCE = (*APPENDED, b"x-forwarded-proto", b"x-forwarded-host")
"""Who asked, as told by those who forward (RFC 7239; the X- names are older and common). To the
lists among them each forwarder adds its word behind those of the others."""


def _spellings(names: Iterable[bytes]) -> frozenset[bytes]:
    """The names and what CGI and WSGI programs take for the same: `_` in place of any `-`."""
    every = set()
    for name in names:
        words = name.split(b"-")
        for joints in itertools.product((b"-", b"_"), repeat=len(words) - 1):
            every.add(b"".join(itertools.chain(*zip(words, (*joints, b""), strict=True))))
    return frozenset(every)


SPECIAL_IN_REQUESTS = _spellings(
    (
        *HOP_BY_HOP,
        *PROVENANCE,
        *FORWARD_HEADERS,
        REFUSED_HEADER,
        *(b"host", b"content-length", b"expect", b"trailer", b"http2-settings"),
    )
)
"""Never copied as they came. Misspelt ones (with `_`) are dropped: no program may be told, by a
client, what only a gateway may tell it."""

SPECIAL_IN_RESPONSES = frozenset({*HOP_BY_HOP, *FORWARD_HEADERS, REFUSED_HEADER, b"content-length"})

_OWN_CONNECTION_OPTIONS = frozenset({b"close", b"keep-alive", b"upgrade", b""})
_AUTHORITY = re.compile(rb"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,255}?)\.?(?::[0-9]{0,5})?")
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_REASON = re.compile(rb"[\t -~\x80-\xff]*")


class BadMessage(ProtocolError):
    """A message that must not be forwarded. `status` is what its sender is told."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@lru_cache(4096)
def parse_authority(authority: bytes) -> str:
    """The host of `host[:port]`: lower case, no port, no final dot. Raises `BadMessage`."""
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise BadMessage(400, f"the host {authority[:80]!r} is not a host name or address")
    return match[1].decode("ascii").lower()


def split_target(url: bytes, method: bytes) -> tuple[bytes, bytes | None]:
    """A request's target in origin form, and the authority it names if it is in absolute form.

    Raises `BadMessage` for what is neither `/path`, `http://host/path` nor `OPTIONS *`.
    """
    if url.startswith(b"/") and b"#" not in url:
        return url, None
    if url == b"*" and method == b"OPTIONS":
        return url, None
    scheme, separator, rest = url.partition(b"://")
    if not separator or scheme.lower() not in (b"http", b"https") or b"#" in rest:
        raise BadMessage(400, "the request's target must be a path or an http URL, no fragment")
    cut = min((at for at in (rest.find(b"/"), rest.find(b"?")) if at >= 0), default=len(rest))
    path = rest[cut:]
    return (path if path.startswith(b"/") else b"/" + path), rest[:cut]


def connection_options(value: bytes) -> frozenset[bytes]:
    """The options of a Connection field, lower case."""
    return frozenset(option.strip().lower() for option in value.split(b","))


def drop_named(lines: list[bytes], options: frozenset[bytes]) -> list[bytes]:
    """The lines without those that a Connection field names: they were for this hop only."""
    named = tuple(option + b":" for option in options - _OWN_CONNECTION_OPTIONS)
    if not named:
        return lines
    return [line for line in lines if not line.lower().startswith(named)]


@lru_cache(1024)
def describe_client(peer: str, proto: str, authority: bytes) -> dict[bytes, bytes]:
    """What each field of `PROVENANCE` says of a client of ours."""
    node = f'"[{peer}]"' if ":" in peer else peer
    host = authority if _TOKEN.fullmatch(authority) else b'"%b"' % authority
    return {
        b"x-forwarded-for": peer.encode(),
        b"x-forwarded-proto": proto.encode(),
        b"x-forwarded-host": authority,
        b"forwarded": b"for=%b;host=%b;proto=%b" % (node.encode(), host, proto.encode()),
        b"via": b"1.1 tabane",
    }


@lru_cache(1024)
def provenance_lines(peer: str, proto: str, authority: bytes) -> bytes:
    """The header lines that tell an app of a client that came with no such field."""
    fields = describe_client(peer, proto, authority).items()
    return b"\r\n".join(name.title() + b": " + value for name, value in fields)


@lru_cache(256)
def status_line(status: int, reason: bytes) -> bytes:
    """A response's first line. Raises `BadMessage` for what no HTTP response begins with."""
    if not 100 <= status <= 599 or not _REASON.fullmatch(reason):
        raise BadMessage(502, f"the app answered with the status line {status} {reason[:80]!r}")
    return b"HTTP/1.1 %d %b" % (status, reason)
