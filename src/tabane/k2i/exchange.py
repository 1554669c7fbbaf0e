"""A client's side of k2i's HTTP without IO: requests to bytes, bytes to answers and events."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

import httptools
import msgspec

from tabane import errors
from tabane.errors import ProtocolError, Refused, TabaneError, UsageError, error_of
from tabane.k2i.stream import Changes, Event

LONGEST_EVENT = 64 << 20
_parse_changes = msgspec.json.Decoder(Changes).decode


class Address(NamedTuple):
    """Of a unix socket, or of a host and port."""

    path: str
    host: str
    port: int

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"


class Silent(NamedTuple):
    """Nothing is heard of a node: what was known of its processes may be true no more. When it is
    back, its next `Changes` are `first`."""

    node: str


def parse_url(url: str) -> Address:
    """`unix:///run/k2i.sock` or `http://HOST:PORT`. Raises `UsageError`."""
    parts = urlsplit(url)
    if parts.scheme == "unix" and parts.path and not parts.netloc:
        return Address(parts.path, "", 0)
    try:
        port = parts.port or 80
    except ValueError:
        port = 0
    if parts.scheme != "http" or not parts.hostname or not port or parts.path.strip("/"):
        raise UsageError(f"{url!r} is no k2i's address: write unix:///PATH or http://HOST:PORT")
    return Address("", parts.hostname, port)


def encode_request(
    address: Address, token: str, method: str, target: str, body: Any = None
) -> bytes:
    """Of a connection's only request; `body` is sent as JSON."""
    host = f"[{address.host}]" if ":" in address.host else address.host or "localhost"
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", "Connection: close"]
    data = b"" if body is None else json.dumps(body).encode()
    if token:
        lines.append(f"Authorization: Bearer {token}")
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join([*lines, "", ""]).encode() + data


def encode_target(path: str, params: Mapping[str, Any]) -> str:
    """A path with its query: lists with commas between their values, `True` as `yes`."""
    pairs = {name: _to_text(value) for name, value in params.items() if value is not None}
    return f"{path}?{urlencode(pairs, safe=',/')}" if pairs else path


def _to_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) or not isinstance(value, Iterable):
        return str(value)
    return ",".join(map(str, value))


class Reply:
    """An answer as it comes. `body` is what has come of it and was not taken."""

    def __init__(self) -> None:
        self.body = b""
        self.complete = False
        self._parser = httptools.HttpResponseParser(self)
        self._headed = False

    def feed(self, data: bytes) -> None:
        """What came; nothing stands for the connection's end. Raises `ProtocolError`."""
        try:
            if data:
                self._parser.feed_data(data)
        except httptools.HttpParserError:
            raise ProtocolError("what answers is no k2i: it does not speak HTTP") from None
        if not data and not self.complete:
            raise errors.Closed("k2i broke off within its answer")

    def feed_stream(self, data: bytes) -> None:
        """As `feed`, of an answer that goes on until an error is told."""
        if self.complete:
            raise errors.Closed("k2i has ended the stream")
        self.feed(data)

    @property
    def headed(self) -> bool:
        """Whether its status is known."""
        return self._headed

    @property
    def ok(self) -> bool:
        return bool(200 <= self._parser.get_status_code() < 300)

    def error(self) -> TabaneError:
        """The error that the whole body stands for."""
        status = self._parser.get_status_code()
        try:
            said = json.loads(self.body)
            return error_of(str(said["error"]), str(said["message"]))
        except (ValueError, LookupError, TypeError):
            return Refused(f"k2i answered {status}")

    def take_events(self) -> Iterator[Changes | Silent]:
        """The events that have wholly come. Raises the error that one of them is."""
        *whole, self.body = self.body.split(b"\n\n")
        if len(self.body) > LONGEST_EVENT:
            raise ProtocolError(f"k2i sends an event of more than {LONGEST_EVENT} bytes")
        for text in whole:
            yield _read_event(parse_event(text))

    def on_headers_complete(self) -> None:
        self._headed = True

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.complete = True


def parse_event(text: bytes) -> Event:
    """One event of text/event-stream, as k2i writes them."""
    fields = dict(line.split(b": ", 1) for line in text.split(b"\n") if b": " in line)
    return Event(fields.get(b"event", b"").decode(), fields.get(b"data", b""))


def _read_event(event: Event) -> Changes | Silent:
    try:
        if event.name == "changes":
            return _parse_changes(event.data)
        said = json.loads(event.data)
        if event.name == "silent":
            return Silent(said["node"])
        problem = error_of(said["error"], said["message"])
    except (ValueError, LookupError, msgspec.MsgspecError):
        raise ProtocolError("k2i sends events that are not understood: is it newer?") from None
    raise problem
