"""The heads of requests and responses: whole heads in, what they mean out. Pure functions.

llhttp (through httptools) decides whether a head is HTTP/1; on top come this gateway's rules, the
ones against request smuggling among them. A client repeats itself, and so does an app, so the last
few heads are remembered with their meaning: a head seen before costs a look into a dictionary.
"""

from __future__ import annotations

import re
from typing import TypeVar

from httptools import (
    HttpParserError,
    HttpParserInvalidMethodError,
    HttpParserUpgrade,
    HttpRequestParser,
    HttpResponseParser,
)

from tabane.gateway.headers import (
    IN_REQUESTS,
    IN_RESPONSES,
    BadMessage,
    Fields,
    connection_options,
    cut_head,
    drop_named,
    parse_authority,
    parse_status_line,
    split_target,
)

HEAD_BYTES = 64 << 10
TARGET_BYTES = 16 << 10
IDEMPOTENT = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"})
HEAD_END = re.compile(rb"\n\r?\n")
LONE_LF = re.compile(rb"(?<!\r)\n")
T = TypeVar("T")
REMEMBERED = 512
"""Heads, of each kind, of at most `REMEMBERED_BYTES` each."""
REMEMBERED_BYTES = 2048


class Memory(dict[bytes, T]):
    """The last heads and what they mean; it forgets all when it is full."""

    def keep(self, head: bytes, meaning: T) -> T:
        if len(head) <= REMEMBERED_BYTES:
            if len(self) >= REMEMBERED:
                self.clear()
            self[head] = meaning
        return meaning


class RequestHead:
    """What a request's head says. Not changed once it is parsed: requests share it."""

    __slots__ = (
        *("authority", "block", "chunked", "expects_continue", "fields", "has_body", "host"),
        *(
            "is_http_1_0",
            "is_idempotent",
            "keep_alive",
            "length",
            "method",
            "path",
            "target",
            "upgrade",
        ),
    )

    def __init__(self, method: bytes, target: bytes, block: bytes, fields: Fields) -> None:
        self.method = method
        self.is_idempotent = method in IDEMPOTENT
        self.target = target
        """In origin form."""
        self.block = block
        """The lines that pass through (see `tabane.gateway.headers`)."""
        self.fields = fields
        self.host = ""
        self.authority = b""
        self.path = ""
        self.is_http_1_0 = False
        self.keep_alive = False
        self.length: int | None = None
        self.chunked = False
        self.has_body = False
        self.expects_continue = False
        self.upgrade = b""
        """The protocol that the client wants to change to."""


REQUESTS: Memory[RequestHead] = Memory()


def parse_request_head(head: bytes) -> RequestHead:
    """Raises `BadMessage` for a head that must not be served."""
    return REQUESTS.get(head) or REQUESTS.keep(head, _parse_request_head(head))


def too_long(head: bytes) -> BadMessage:
    """Why a head, or the beginning of one, is refused for its length."""
    if b"\r\n" in head[:TARGET_BYTES]:
        return BadMessage(431, f"the request's head is longer than {HEAD_BYTES} bytes")
    return BadMessage(414, f"the request's target is longer than {TARGET_BYTES} bytes")


def check_beginning(head: bytes) -> None:
    """Raises `BadMessage` if nothing that begins so is a request's head."""
    if len(head) > HEAD_BYTES:
        raise too_long(head)
    try:
        HttpRequestParser(object()).feed_data(head)
    except HttpParserUpgrade:
        pass  # a whole head, to llhttp's mind, which may ask for whatever it wants
    except HttpParserInvalidMethodError:
        status = 501 if head[:1].isalpha() else 400
        raise BadMessage(status, "the request does not begin with a method of HTTP") from None
    except HttpParserError as error:
        raise BadMessage(400, f"the request is not HTTP/1.1: {error}") from None


def _parse_request_head(head: bytes) -> RequestHead:
    check_beginning(head)
    line, block, fields = cut_head(IN_REQUESTS, head)
    words = line.split()
    if len(words) != 3 or words[2] not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise BadMessage(505, "only HTTP/1.1 and HTTP/1.0 are served")
    if len(words[1]) > TARGET_BYTES:
        raise BadMessage(414, f"the request's target is longer than {TARGET_BYTES} bytes")
    if words[0] == b"CONNECT":
        raise BadMessage(405, "this gateway opens no tunnels: CONNECT is not served")
    request = RequestHead(words[0], words[1], block, fields)
    request.is_http_1_0 = words[2] == b"HTTP/1.0"
    _find_host(request)
    _interpret_options(request)
    _interpret_framing(request)
    return request


def _find_host(request: RequestHead) -> None:
    hosts = [value for key, value in request.fields if key == b"host"]
    if len(hosts) != 1:
        raise BadMessage(400, f"a request must name one host, this one names {len(hosts)}")
    request.target, authority = split_target(request.target, request.method)
    request.authority = hosts[0] if authority is None else authority
    request.host = parse_authority(request.authority)
    request.path = request.target.partition(b"?")[0].decode("latin-1")


def _interpret_options(request: RequestHead) -> None:
    options = connection_options(request.fields)
    request.keep_alive = options.keep_alive if request.is_http_1_0 else not options.close
    if options.named:
        request.block = drop_named(request.block, options.named)
    for key, value in request.fields:
        if key == b"upgrade" and options.upgrade:
            request.upgrade = value
        elif key == b"expect" and not request.is_http_1_0:
            if value.lower() != b"100-continue":
                raise BadMessage(417, f"the expectation {value[:80]!r} cannot be met")
            request.expects_continue = True


def _interpret_framing(request: RequestHead) -> None:
    for key, value in request.fields:
        if key == b"content-length":
            request.length = int(value)
        elif key == b"transfer-encoding":
            _check_coding(value, 501)
            request.chunked = True
    if request.chunked and (request.length is not None or request.is_http_1_0):
        raise BadMessage(400, "the request's Transfer-Encoding does not go with its other fields")
    request.has_body = request.chunked or bool(request.length)
    if request.has_body or request.upgrade.lower() == b"h2c":
        request.upgrade = b""  # whoever is asked may ignore it


def _check_coding(value: bytes, status: int) -> None:
    if value.lower() != b"chunked":
        raise BadMessage(status, f"the transfer coding {value[:80]!r} is not served, only chunked")


class ResponseHead:
    """What a response's head says. Not changed once it is parsed: responses share it."""

    __slots__ = (
        *("block", "body_length", "chunked", "has_no_body", "keep_alive", "length", "line"),
        *("refused", "status", "upgrade"),
    )

    def __init__(self, status: int, line: bytes, block: bytes) -> None:
        self.status = status
        self.has_no_body = status < 200 or status in (204, 304)
        """To any request; a HEAD request's response has none either."""
        self.line = line
        """The status line as the client is to see it."""
        self.block = block
        """The lines that pass through."""
        self.length: int | None = None
        """As the head says; `body_length` is what follows, None if that is not known."""
        self.body_length: int | None = 0 if self.has_no_body else None
        self.chunked = False
        self.keep_alive = False
        """The app keeps the connection, if the body's end can be told without its end."""
        self.upgrade = b""
        self.refused = b""

    @property
    def is_interim(self) -> bool:
        return self.status < 200 and self.status != 101


RESPONSES: Memory[ResponseHead] = Memory()
CONTINUE = ResponseHead(100, b"HTTP/1.1 100 Continue", b"")


def parse_response_head(head: bytes) -> ResponseHead:
    """Raises `BadMessage` for a head that cannot be passed on."""
    return RESPONSES.get(head) or RESPONSES.keep(head, _parse_response_head(head))


def end_of_response_head(tail: bytes, data: bytes, start: int) -> int:
    """Where the part of a response's head that begins at `data[start]`, behind `tail` (its last two
    bytes), ends: behind the empty line, or with the data."""
    if tail:
        match = HEAD_END.search(tail + data[start : start + 2])
        if match is not None:
            return start + match.end() - len(tail)
    match = HEAD_END.search(data, start)
    return match.end() if match is not None else len(data)


def mend_lines(head: bytes) -> bytes:
    """A response's head, or its beginning, with CRLF where a line ends in LF alone. CGI programs
    write such, and a recipient may take them (RFC 9112 section 2.2); requests get no such leave."""
    if head.count(b"\n") == head.count(b"\r\n"):
        return head
    return LONE_LF.sub(b"\r\n", head)


def check_response_beginning(head: bytes) -> None:
    """Raises `BadMessage` if nothing that begins so is a response's head."""
    if len(head) > HEAD_BYTES:
        raise BadMessage(502, f"the head of the app's answer is over {HEAD_BYTES} bytes long")
    try:
        HttpResponseParser(object()).feed_data(head)
    except HttpParserUpgrade:
        pass
    except HttpParserError as error:
        raise BadMessage(502, f"the app's answer is not HTTP/1.1: {error}") from None


def _parse_response_head(head: bytes) -> ResponseHead:
    check_response_beginning(head)
    line, block, fields = cut_head(IN_RESPONSES, head)
    status = parse_status_line(line)
    options = connection_options(fields)
    if options.named:
        block = drop_named(block, options.named)
    response = ResponseHead(status.code, status.line, block)
    response.keep_alive = options.keep_alive if status.is_http_1_0 else not options.close
    for key, value in fields:
        if key == b"content-length":
            response.length = int(value)
        elif key == b"transfer-encoding":
            _check_coding(value, 502)
            response.chunked = True
        elif key == b"upgrade":
            response.upgrade = value
        elif key == b"tabane-refused":
            response.refused = value
    if status.code < 200 or status.code == 204:
        response.length, response.chunked = None, False
    if not response.has_no_body:
        response.body_length = response.length
    return response
