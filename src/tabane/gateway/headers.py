"""Which HTTP header fields a gateway takes for itself, drops, and adds. Pure functions on bytes.

Most lines of a head pass through untouched and unseen. Only the *special* ones, which have a
meaning on this hop, are cut out, by one regular expression: once llhttp has accepted a head, each
of its lines begins behind a CRLF with `name:`, so what does not match is not special.
A block of lines is kept with a CRLF before each line and none behind the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

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
ONLY_FROM_GATEWAYS = (b"x-forwarded-", b"tabane-")
"""Beginnings of names that no client may use, but for `PROVENANCE`: apps believe what stands there,
as `X-Forwarded-Port`, and `X-Real-Ip` too."""

Fields = list[tuple[bytes, bytes]]
"""Special fields: names in lower case, values without white space around."""


def _special(names: Iterable[bytes], beginnings: Iterable[bytes] = ()) -> re.Pattern[bytes]:
    """Matches lines with these names, and names with these beginnings, or with `_` for `-`, which
    CGI and WSGI programs take for the same: no client may tell an app, by a misspelling, what only
    a gateway may tell it."""
    every = [*sorted(set(names)), *(beginning + b"[^:\r]*" for beginning in beginnings)]
    initials = b"".join({name[:1] for name in every})
    spellings = b"|".join(name.replace(b"-", b"[-_]") for name in every)
    return re.compile(rb"(?i)\r\n(?=[%b])(%b):([^\r]*)" % (initials, spellings))


IN_REQUESTS = _special(
    (
        *HOP_BY_HOP,
        *PROVENANCE,
        *FORWARD_HEADERS,
        REFUSED_HEADER,
        *(b"host", b"content-length", b"expect", b"trailer", b"http2-settings", b"x-real-ip"),
    ),
    ONLY_FROM_GATEWAYS,
)
IN_RESPONSES = _special(
    (*HOP_BY_HOP, *FORWARD_HEADERS, REFUSED_HEADER, b"content-length", b"trailer")
)

_OWN_OPTIONS = frozenset({b"close", b"keep-alive", b"upgrade", b""})
_AUTHORITY = re.compile(rb"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,255}?)\.?(?::[0-9]{0,5})?")
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: ([\t -~\x80-\xff]*))?")


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


def cut_head(pattern: re.Pattern[bytes], head: bytes) -> tuple[bytes, bytes, Fields]:
    """A head in three parts: its first line, the block that passes through, the special fields."""
    first, *found = pattern.split(head)
    fields = [
        (name.lower(), value.strip()) for name, value in zip(found[::3], found[1::3], strict=True)
    ]
    line, separator, block = b"".join((first, *found[2::3]))[:-4].partition(b"\r\n")
    return line, separator + block, fields


class Options(NamedTuple):
    """What a Connection field says."""

    close: bool
    keep_alive: bool
    upgrade: bool
    named: tuple[bytes, ...]
    """Fields that are for this hop only."""


NO_OPTIONS = Options(False, False, False, ())


@lru_cache(1024)
def parse_connection(value: bytes) -> Options:
    """The options of a Connection field (or of several, joined by commas)."""
    options = {option.strip().lower() for option in value.split(b",")}
    return Options(
        b"close" in options,
        b"keep-alive" in options,
        b"upgrade" in options,
        tuple(sorted(options - _OWN_OPTIONS)),
    )


def connection_options(fields: Fields) -> Options:
    """What all Connection fields say together."""
    values = [value for key, value in fields if key == b"connection"]
    return parse_connection(b",".join(values)) if values else NO_OPTIONS


def drop_named(block: bytes, names: Iterable[bytes]) -> bytes:
    """The block without the lines of these fields."""
    for name in names:
        block = re.sub(rb"(?i)\r\n" + re.escape(name) + rb":[^\r]*", b"", block)
    return block


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


class Status(NamedTuple):
    """A response's first line: its status, and the line as this gateway says it."""

    code: int
    line: bytes
    is_http_1_0: bool


@lru_cache(256)
def parse_status_line(line: bytes) -> Status:
    """Raises `BadMessage` for what no HTTP/1 response begins with."""
    match = _STATUS_LINE.fullmatch(line)
    if match is None:
        raise BadMessage(502, f"the app answered with the status line {line[:80]!r}")
    minor, code, reason = match.groups()
    return Status(int(code), b"HTTP/1.1 %b %b" % (code, reason or b""), minor == b"0")
