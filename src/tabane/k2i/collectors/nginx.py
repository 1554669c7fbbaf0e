"""nginx's `stub_status`: connections and requests since its start."""

from __future__ import annotations

from urllib.parse import urlsplit

import httptools

from tabane.errors import Closed, ProtocolError, Refused
from tabane.k2i.collectors.api import MAX_ANSWER_BYTES, Dial, Reading, Setting, Streams
from tabane.k2i.collectors.parse import parse_stub_status

READ_BYTES = 16 << 10


class Answer:
    """What a server answered; fed to httptools' parser."""

    def __init__(self) -> None:
        self.body = b""
        self.is_whole = False

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.is_whole = True


class Nginx:
    """See the module's text. A connection for each reading: what it costs is one request."""

    def __init__(self, url: str, dial: Dial) -> None:
        self._url = url
        self._dial = dial

    async def collect(self) -> list[Reading]:
        streams = await self._dial.connect(self._url)
        try:
            pid = await self._dial.owner(streams)
            facts = parse_stub_status(await get(self._url, streams))
        except ProtocolError as error:
            raise ProtocolError(f"{self._url} {error}") from None
        finally:
            streams[1].close()
        return [Reading(facts, pid)]

    async def aclose(self) -> None:
        """It keeps nothing."""


async def get(url: str, streams: Streams) -> bytes:
    """The body of the answer to a GET. Raises `Refused` unless it is 200, `ProtocolError` when it
    is no HTTP or endless, `Closed`."""
    parts, (reader, writer) = urlsplit(url), streams
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    head = f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nUser-Agent: k2i\r\n"
    writer.write(f"{head}Connection: close\r\n\r\n".encode())
    answer, room = Answer(), MAX_ANSWER_BYTES
    parser = httptools.HttpResponseParser(answer)
    while not answer.is_whole and (data := await reader.read(READ_BYTES)):
        room -= len(data)
        try:
            parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise ProtocolError(f"answers no HTTP: {error}") from None
        if room < 0:
            raise ProtocolError(f"answers more than {MAX_ANSWER_BYTES >> 10} KiB")
    if not parser.get_status_code():
        raise Closed(f"{url} closed the connection without an answer")
    if parser.get_status_code() != 200:
        raise Refused(f"{url} answers {parser.get_status_code()}")
    return answer.body


def make(setting: Setting) -> Nginx:
    return Nginx(setting.collect.url, setting.dial)
