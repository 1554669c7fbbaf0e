"""HTTP/1.1 messages without IO: bytes go in, requests and responses come out.

llhttp (through httptools) parses; the two readers add what a gateway needs on top: the limits, the
rules against request smuggling, and messages that wait (pipelining) instead of callbacks that do
not. A reader never raises on bad bytes: it sets `error`, and is deaf afterwards; what came before
the error is whole and may be used.

A limit on *quiet bytes* (fed without a head, a piece of body or an end coming out of them) bounds
at once heads, trailers and chunk extensions, for which llhttp itself has no limit.
"""

from __future__ import annotations

from collections import deque

from httptools import (
    HttpParserError,
    HttpParserInvalidMethodError,
    HttpParserUpgrade,
    HttpRequestParser,
    HttpResponseParser,
)

from tabane.gateway.headers import (
    SPECIAL_IN_REQUESTS,
    SPECIAL_IN_RESPONSES,
    BadMessage,
    connection_options,
    drop_named,
    parse_authority,
    split_target,
)

HEAD_BYTES = 64 << 10
TARGET_BYTES = 16 << 10
REPLAY_BYTES = 64 << 10
"""So much of a request's body is remembered, so that it can be sent again to another instance."""


class _Stop(Exception):
    """Raised in a callback: parse no further."""


class Request:
    """One request as it arrives: its head is whole, its body may still be coming."""

    __slots__ = (
        *("authority", "body", "buffered", "chunked", "complete", "expects_continue", "fields"),
        *("host", "is_http_1_0", "keep_alive", "kept", "length", "lines", "method", "target"),
        *("upgrade",),
    )

    def __init__(self, method: bytes, version: str, lines: list[bytes]) -> None:
        self.method = method
        self.is_http_1_0 = version == "1.0"
        self.lines = lines
        """Header lines that pass through."""
        self.target = b"/"
        self.host = ""
        self.authority = b""
        self.fields: list[tuple[bytes, bytes]] = []
        """The special ones, with names in lower case."""
        self.keep_alive = False
        self.length: int | None = None
        self.chunked = False
        self.expects_continue = False
        self.upgrade = b""
        """The protocol the client wants to change to."""
        self.complete = False
        self.body: list[bytes] = []
        self.buffered = 0
        self.kept: list[bytes] | None = []

    @property
    def path(self) -> str:
        return self.target.partition(b"?")[0].decode("latin-1")

    def take_body(self) -> list[bytes]:
        """The pieces that came since the last call."""
        pieces, self.body = self.body, []
        if self.kept is not None:
            self.kept += pieces
            if self.buffered > REPLAY_BYTES:
                self.kept = None
        return pieces

    @property
    def is_replayable(self) -> bool:
        """All of the body that came is still here."""
        return self.kept is not None

    def rewind(self) -> None:
        """Let `take_body` begin again with the first piece. Only when `is_replayable`."""
        assert self.kept is not None
        self.body, self.kept = self.kept + self.body, []


def interpret(request: Request, url: bytes, fields: list[tuple[bytes, bytes]]) -> None:
    """Fill in what the target and the special fields say. Raises `BadMessage`."""
    request.fields = fields
    if request.method == b"CONNECT":
        raise BadMessage(405, "this gateway opens no tunnels: CONNECT is not served")
    hosts = []
    upgrade = b""
    options: frozenset[bytes] = frozenset()
    for key, value in fields:
        if key == b"host":
            hosts.append(value.strip())
        elif key == b"content-length":
            request.length = int(value)
        elif key == b"transfer-encoding":
            request.chunked = _check_coding(value, 400)
        elif key == b"connection":
            options |= connection_options(value)
        elif key == b"expect":
            request.expects_continue = _check_expectation(request, value)
        elif key == b"upgrade":
            upgrade = value.strip()
    if upgrade and b"upgrade" in options and upgrade.lower() != b"h2c":
        request.upgrade = upgrade
    request.lines = drop_named(request.lines, options)
    _check_framing(request)
    _find_host(request, url, hosts)


def _find_host(request: Request, url: bytes, hosts: list[bytes]) -> None:
    if len(hosts) != 1:
        raise BadMessage(400, f"a request must name one host, this one names {len(hosts)}")
    request.target, authority = split_target(url, request.method)
    request.authority = hosts[0] if authority is None else authority
    request.host = parse_authority(request.authority)


def _check_coding(value: bytes, status: int) -> bool:
    if value.strip().lower() != b"chunked":
        raise BadMessage(status, f"the transfer coding {value[:80]!r} is not served, only chunked")
    return True


def _check_expectation(request: Request, value: bytes) -> bool:
    if request.is_http_1_0:
        return False
    if value.strip().lower() != b"100-continue":
        raise BadMessage(417, f"the expectation {value[:80]!r} cannot be met")
    return True


def _check_framing(request: Request) -> None:
    if request.chunked and request.length is not None:
        raise BadMessage(400, "the request has both a Content-Length and a Transfer-Encoding")
    if request.chunked and request.is_http_1_0:
        raise BadMessage(400, "an HTTP/1.0 request cannot have a Transfer-Encoding")


class RequestReader:
    """The requests of one client connection, in the order they came, in `requests`."""

    def __init__(self) -> None:
        self.requests: deque[Request] = deque()
        self.arriving: Request | None = None
        """The request whose body is not complete yet."""
        self.error: BadMessage | None = None
        self.rest: bytes | None = None
        """After a request to upgrade: what follows it, unparsed, until `resume` or a tunnel."""
        self._parser = HttpRequestParser(self)
        self._url = b""
        self._lines: list[bytes] = []
        self._fields: list[tuple[bytes, bytes]] = []
        self._quiet_bytes = 0

    @property
    def in_head(self) -> bool:
        """A part of a head has come."""
        return self.arriving is None and (self._quiet_bytes > 0 or self._url != b"")

    def feed(self, data: bytes) -> None:
        if self.rest is not None:
            self.rest += data
            return
        if self.error is not None:
            return
        self._quiet_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade as upgrade:
            self.rest = data[upgrade.args[0] :]
        except HttpParserInvalidMethodError:
            self.error = BadMessage(501, "the request's method is not known")
        except HttpParserError as error:
            self.error = self.error or BadMessage(400, f"the request is not HTTP/1.1: {error}")
        if self._quiet_bytes > HEAD_BYTES and self.error is None:
            self.error = self._too_large()

    def resume(self) -> None:
        """The upgrade did not come about: what follows the request is the next one."""
        rest, self.rest = self.rest, None
        if rest:
            self.feed(rest)

    def _too_large(self) -> BadMessage:
        return BadMessage(431, f"the request's header fields take more than {HEAD_BYTES} bytes")

    def on_url(self, part: bytes) -> None:
        self._url = self._url + part if self._url else part
        if len(self._url) > TARGET_BYTES:
            self.error = BadMessage(414, f"the request's target is over {TARGET_BYTES} bytes long")
            raise _Stop

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.arriving is not None:
            return  # a trailer: RFC 9110 section 6.5.1 lets a gateway discard it
        key = name.lower()
        if key in SPECIAL_IN_REQUESTS:
            self._fields.append((key, value))
        else:
            self._lines.append(name + b": " + value)

    def on_headers_complete(self) -> None:
        parser = self._parser
        version = parser.get_http_version()
        request = Request(parser.get_method(), version, self._lines)
        request.keep_alive = parser.should_keep_alive()
        try:
            if version not in ("1.1", "1.0"):
                raise BadMessage(505, f"HTTP/{version} is not served, HTTP/1.1 is")
            if self._quiet_bytes > HEAD_BYTES and sum(map(len, self._lines)) > HEAD_BYTES:
                raise self._too_large()
            interpret(request, self._url, self._fields)
            if parser.should_upgrade() and (request.chunked or request.length):
                raise BadMessage(400, "a request to upgrade the connection must not have a body")
        except BadMessage as error:
            self.error = error
            raise _Stop from None
        self._url, self._lines, self._fields = b"", [], []
        self._quiet_bytes = 0
        self.arriving = request
        self.requests.append(request)

    def on_body(self, piece: bytes) -> None:
        request = self.arriving
        assert request is not None
        self._quiet_bytes = 0
        request.body.append(piece)
        request.buffered += len(piece)

    def on_message_complete(self) -> None:
        assert self.arriving is not None
        self._quiet_bytes = 0
        self.arriving.complete = True
        self.arriving = None


class ResponseReader:
    """The responses of one upstream connection, one at a time: `expect`, then `feed`.

    `status` is 0 until the final response's head is whole. Bytes behind the end of a response make
    `excess` true: the connection cannot be used again.
    """

    def __init__(self) -> None:
        self._is_head = True
        self.expect(b"")

    def expect(self, method: bytes) -> None:
        """Begin with the response to a request with `method`: the first, or when `is_reusable`."""
        if self._is_head:  # llhttp cannot be told that no body comes, it still waits for one
            self._parser = HttpResponseParser(self)
        self._is_head = method == b"HEAD"
        self._lines: list[bytes] = []
        self._fields: list[tuple[bytes, bytes]] = []
        self._reason = b""
        self._quiet_bytes = 0
        self._in_interim = False
        self.interims: list[tuple[int, bytes, list[bytes]]] = []
        """Responses with a 1xx status that came before: status, reason, header lines."""
        self.status = 0
        self.reason = b""
        self.lines: list[bytes] = []
        self.length: int | None = None
        self.chunked = False
        self.has_no_body = False
        self.until_close = False
        self.keep_alive = False
        self.has_begun = False
        """A byte came."""
        self.upgrade = b""
        self.refused = b""
        self.body: list[bytes] = []
        self.trailers: list[bytes] = []
        self.complete = False
        self.excess = False
        self.rest: bytes | None = None
        """After a 101: what followed it."""
        self.error: BadMessage | None = None

    @property
    def is_reusable(self) -> bool:
        """The connection may carry another request."""
        return self.complete and self.keep_alive and not self.excess and self.rest is None

    def feed(self, data: bytes) -> None:
        if self.error is not None or self.rest is not None:
            self.excess = True
            return
        self.has_begun = True
        self._quiet_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade as upgrade:
            self.rest = data[upgrade.args[0] :]
        except HttpParserError as error:
            if self.complete:
                self.excess = True
            else:
                self.error = self.error or BadMessage(502, f"the app's answer is not HTTP: {error}")
        if self._quiet_bytes > HEAD_BYTES and not self.complete and self.error is None:
            self.error = BadMessage(502, f"the app's header fields take over {HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        if self.complete:
            self.excess = True
            raise _Stop

    def on_status(self, part: bytes) -> None:
        self._reason += part

    def on_header(self, name: bytes, value: bytes) -> None:
        key = name.lower()
        if key in SPECIAL_IN_RESPONSES:
            self._fields.append((key, value))
        elif self.status:
            self.trailers.append(name + b": " + value)
        else:
            self._lines.append(name + b": " + value)

    def on_headers_complete(self) -> None:
        parser = self._parser
        status = parser.get_status_code()
        self.keep_alive = parser.should_keep_alive()
        try:
            self._interpret(status)
        except BadMessage as error:
            self.error = error
            raise _Stop from None
        if 100 <= status < 200 and status != 101:
            self.interims.append((status, self._reason, self._lines))
            self._in_interim = True
        else:
            self.status, self.reason, self.lines = status, self._reason, self._lines
            self.has_no_body = self._is_head or status in (101, 204, 304)
            self.until_close = not (self.has_no_body or self.chunked or self.length is not None)
            self.complete = self._is_head
        self._reason, self._lines, self._fields = b"", [], []
        self._quiet_bytes = 0

    def _interpret(self, status: int) -> None:
        if self._quiet_bytes > HEAD_BYTES and sum(map(len, self._lines)) > HEAD_BYTES:
            raise BadMessage(502, f"the app's header fields take over {HEAD_BYTES} bytes")
        options: frozenset[bytes] = frozenset()
        for key, value in self._fields:
            if key == b"content-length":
                self.length = int(value)
            elif key == b"transfer-encoding":
                self.chunked = _check_coding(value, 502)
            elif key == b"connection":
                options |= connection_options(value)
            elif key == b"upgrade":
                self.upgrade = value.strip()
            elif key == b"tabane-refused":
                self.refused = value.strip()
        self._lines = drop_named(self._lines, options)
        if status < 200 or status == 204:
            self.length = None
            self.chunked = False

    def on_body(self, piece: bytes) -> None:
        self._quiet_bytes = 0
        if self._is_head:
            self.excess = True
        else:
            self.body.append(piece)

    def on_message_complete(self) -> None:
        self._quiet_bytes = 0
        if self._in_interim:
            self._in_interim = False
        else:
            self.complete = True

    def end(self) -> bool:
        """The connection was closed in good order. True when that ends the response."""
        if self.until_close and self.error is None:
            self.complete = True
        return self.complete
