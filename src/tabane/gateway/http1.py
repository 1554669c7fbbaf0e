"""HTTP/1.1 messages without IO: bytes go in, requests and responses come out, one at a time.

A reader never raises on bad bytes: it sets `error`, and is deaf afterwards. What follows a message
is kept as it came, and looked into when the message is done with: pipelined requests cost nothing
before their time, and no byte of one message can be taken for another's.
"""

from __future__ import annotations

from collections.abc import Sequence

from tabane.gateway.bodies import (
    EMPTY_LINE,
    Body,
    ChunkedBody,
    EndlessBody,
    LengthBody,
    end_of_piece,
)
from tabane.gateway.headers import BadMessage
from tabane.gateway.heads import (
    REQUESTS,
    RESPONSES,
    RequestHead,
    ResponseHead,
    check_beginning,
    check_response_beginning,
    end_of_response_head,
    mend_lines,
    parse_request_head,
    parse_response_head,
)

PREFACE = b"PRI * HTTP/2.0\r\n\r\n"
"""Nearly all of what an HTTP/2 connection begins with; the rest is `h2`'s affair."""
REPLAY_BYTES = 64 << 10
"""So much of a request's body is remembered, so that it can be sent again to another instance."""


class Request:
    """One request as it arrives: its head is whole, its body may still be coming."""

    __slots__ = ("_kept", "body", "buffered", "complete", "head", "trailers")

    def __init__(self, head: RequestHead) -> None:
        self.head = head
        self.complete = not head.has_body
        self.trailers: Sequence[tuple[bytes, bytes]] = ()
        """Of HTTP/2; those of HTTP/1.1 are discarded."""
        self.body: list[bytes] = []
        """Pieces that nobody took yet."""
        self.buffered = 0
        """How much of the body came in all."""
        self._kept: list[bytes] | None = []

    def take_body(self) -> list[bytes]:
        """The pieces that came since the last call."""
        pieces, self.body = self.body, []
        if self.buffered > REPLAY_BYTES:
            self._kept = None
        elif self._kept is not None:
            self._kept += pieces
        return pieces

    @property
    def is_replayable(self) -> bool:
        """All of the body that came is still here."""
        return self._kept is not None

    def rewind(self) -> None:
        """Let `take_body` begin again with the first piece. Only when `is_replayable`."""
        assert self._kept is not None
        self.body, self._kept = self._kept + self.body, []


class RequestReader:
    """The requests of one client connection: `request`, then `resume`."""

    __slots__ = ("_body", "_head", "error", "is_http2", "request", "rest")

    def __init__(self) -> None:
        self.request: Request | None = None
        """The current request, from the end of its head to `resume`."""
        self.error: BadMessage | None = None
        """What came is no request, or `request` cannot be completed."""
        self.rest = b""
        """What follows the current request."""
        self.is_http2 = False
        """What came is the beginning of an HTTP/2 connection, `PREFACE` and `rest`."""
        self._head = b""
        self._body: Body | None = None

    @property
    def in_head(self) -> bool:
        """A part of a head has come."""
        return self._head != b""

    def feed(self, data: bytes) -> None:
        request = self.request
        if request is None and not self._head:
            head = REQUESTS.get(data)
            if head is not None and not head.has_body:  # in most cases; the rest is the rule
                self.request = Request(head)
                return
        if self.error is not None:
            return
        try:
            if request is None:
                self._feed_head(data)
            elif request.complete:
                self.rest += data
            else:
                self._feed_body(request, data, 0)
        except BadMessage as error:
            self.error = error

    def resume(self) -> None:
        """Go on to the next request. The current one must be complete."""
        self.request = None
        if self.rest:
            rest, self.rest = self.rest, b""
            self.feed(rest)

    def _feed_head(self, data: bytes) -> None:
        if not self._head:
            data = data.lstrip(b"\r\n")  # RFC 9112 section 2.2
        end = end_of_piece(self._head[-3:], data, 0)
        head = self._head + data[:end]
        if not head.endswith(EMPTY_LINE):
            check_beginning(head)
            self._head = head
            return
        self._head = b""
        if head == PREFACE:
            self.is_http2 = True
            self.rest = data[end:]
            return
        self.request = request = Request(parse_request_head(head))
        if request.complete:
            self.rest = data[end:]
        else:
            self._body = _body_of(request.head)
            self._feed_body(request, data, end)

    def _feed_body(self, request: Request, data: bytes, start: int) -> None:
        assert self._body is not None
        end = self._body.feed(data, start, request.body)
        request.buffered += end - start
        if self._body.is_done:
            self._body = None
            request.complete = True
            self.rest = data[end:]


def _body_of(head: RequestHead) -> Body:
    return ChunkedBody() if head.chunked else LengthBody(head.length or 0)


class Response:
    """The response to one request, as far as it came."""

    head: ResponseHead | None = None
    """Of the final response, once it is whole."""
    complete = False
    rest = b""
    """What followed its end: after a 101 the new protocol, else nothing good."""
    trailers: Sequence[tuple[bytes, bytes]] = ()
    """Of HTTP/2; those of HTTP/1.1 are discarded."""
    has_begun = False
    """A byte came."""
    error: BadMessage | None = None

    interims: Sequence[ResponseHead] = ()
    """Responses with a 1xx status, which came before, and nobody took yet."""

    def __init__(self) -> None:
        self.body: list[bytes] = []
        """Pieces that nobody took yet."""


class ResponseReader(Response):
    """The response to one request, on an upstream connection."""

    is_reusable = False
    """The connection may carry another request."""
    _partial = b""
    _body: Body | None = None

    def __init__(self, method: bytes) -> None:
        self._is_head = method == b"HEAD"
        self.body = []

    @property
    def has_no_body(self) -> bool:
        """Whatever its head says of one."""
        assert self.head is not None
        return self._is_head or self.head.has_no_body

    def feed(self, data: bytes) -> None:
        if not self.has_begun:
            self.has_begun = True
            end = data.find(EMPTY_LINE) + 4
            head = RESPONSES.get(data[:end])
            if (
                head is not None
                and head.body_length == len(data) - end
                and head.status >= 200
                and not self._is_head
            ):  # a head seen before and its whole body, as in most cases; the rest is the rule
                self.head = head
                self.complete = True
                self.is_reusable = head.keep_alive
                self.body.append(data[end:])
                return
        if self.error is not None:
            return
        try:
            if self.complete:
                self.rest += data
                self.is_reusable = False
            elif self._body is not None:
                self._feed_body(data, 0)
            else:
                self._feed_head(data)
        except BadMessage as error:
            self.error = BadMessage(502, error.message)

    def _feed_head(self, data: bytes) -> None:
        start = 0
        while self.head is None and start < len(data):
            end = end_of_response_head(self._partial[-2:], data, start)
            head = mend_lines(self._partial + data[start:end])
            start = end
            if not head.endswith(EMPTY_LINE):
                check_response_beginning(head)
                self._partial = head
                return
            self._partial = b""
            parsed = parse_response_head(head)
            if parsed.is_interim:
                self.interims = [*self.interims, parsed]
            else:
                self.head = parsed
                self._begin_body(parsed)
        if self.head is not None:
            self._feed_body(data, start)

    def _begin_body(self, head: ResponseHead) -> None:
        if self.has_no_body:
            self._body = LengthBody(0)
        elif head.chunked:
            self._body = ChunkedBody()
        elif head.length is not None:
            self._body = LengthBody(head.length)
        else:
            self._body = EndlessBody()

    def _feed_body(self, data: bytes, start: int) -> None:
        body = self._body
        assert body is not None
        if start < len(data):
            start = body.feed(data, start, self.body)
        if body.is_done:
            self.complete = True
            self.rest = data[start:]
            self.is_reusable = not self.rest and self.head is not None and self.head.keep_alive

    def end(self) -> None:
        """The connection was closed in good order, which ends some responses."""
        if type(self._body) is EndlessBody and self.error is None:
            self.complete = True
