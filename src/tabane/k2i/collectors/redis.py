"""Redis's `INFO`, and that of its kin (Valkey, KeyDB).

By hand, in the few lines of its protocol (RESP) that one question needs: the client library cannot
use a connection made inside an instance's network, and would bring all the other commands.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from tabane.errors import Closed, ProtocolError, Refused
from tabane.k2i.collectors.api import MAX_ANSWER_BYTES, Dial, Reading, Setting
from tabane.k2i.collectors.parse import parse_info
from tabane.model import Collect
from tabane.units import shorten


class Redis:
    """See the module's text. A connection for each reading, so that it never counts as a client
    for long."""

    def __init__(self, collect: Collect, dial: Dial) -> None:
        self._collect = collect
        self._dial = dial

    async def collect(self) -> list[Reading]:
        url = self._collect.url
        streams = await self._dial.connect(url)
        reader, writer = streams
        try:
            pid = await self._dial.owner(streams)
            for words in (*self._login(), ("INFO",)):
                writer.write(encode_command(*words))
                answer = await read_answer(reader, url)
            return [Reading(parse_info(answer), pid)]
        except ProtocolError as error:
            raise ProtocolError(f"{url} {error}") from None
        finally:
            writer.close()

    def _login(self) -> list[tuple[str, ...]]:
        if not self._collect.password_file:
            return []
        password = Path(self._collect.password_file).read_text().rstrip("\n")
        return [("AUTH", *filter(None, [self._collect.username]), password)]

    async def aclose(self) -> None:
        """It keeps nothing."""


def encode_command(*words: str) -> bytes:
    """As RESP has it: an array of bulk strings."""
    encoded = [word.encode() for word in words]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in encoded)


async def read_answer(reader: asyncio.StreamReader, url: str) -> bytes:
    """A bulk or simple string. Raises `Refused` for an error, `ProtocolError`, `Closed`."""
    try:
        line = await reader.readuntil(b"\r\n")
        kind, text = line[:1], line[1:-2]
        if kind == b"-":
            raise Refused(f"{url} refuses: {text.decode(errors='replace')}")
        if kind == b"+":
            return text
        if kind != b"$" or not text.isdigit() or len(text) > 9:
            raise ProtocolError(f"answers {shorten(line)}, which is not Redis's protocol")
        if int(text) > MAX_ANSWER_BYTES:
            raise ProtocolError(f"answers more than {MAX_ANSWER_BYTES >> 10} KiB")
        return (await reader.readexactly(int(text) + 2))[:-2]
    except asyncio.LimitOverrunError:
        raise ProtocolError(f"answers a line of more than {MAX_ANSWER_BYTES >> 10} KiB") from None
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise ProtocolError(f"ends after {shorten(error.partial)}") from None
        raise Closed(f"{url} closed the connection without an answer") from None


def make(setting: Setting) -> Redis:
    return Redis(setting.collect, setting.dial)
