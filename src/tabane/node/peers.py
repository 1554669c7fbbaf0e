"""Requests to other nodes' control API, whose answers are streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from httptools import HttpParserError, HttpResponseParser

from tabane.errors import Refused, Unreachable, error_of
from tabane.node.config import API_PORT, Peer

CONNECT_TIMEOUT_S = 5.0
SILENCE_S = 60.0
"""A node that sends nothing for so long in the middle of an answer is taken for dead."""
BLOCK_BYTES = 256 << 10
OK = range(200, 300)


class Answer:
    """What a node answers: its head is there, its body is read as it comes."""

    def __init__(self, peer: Peer, reader: asyncio.StreamReader) -> None:
        self.status = 0
        self._peer = peer
        self._reader = reader
        self._parser = HttpResponseParser(self)
        self._blocks: list[bytes] = []
        self._is_complete = False

    async def read_head(self) -> None:
        """Raises `Unreachable`, or what the node refuses with."""
        while not self.status:
            await self._read()
        if self.status not in OK:
            body = b"".join([block async for block in self.blocks()])
            raise self._refusal(body)

    def _refusal(self, body: bytes) -> Exception:
        try:
            said = msgspec.json.decode(body, type=dict[str, str])
        except msgspec.DecodeError:
            return Refused(f"{self._peer.key} answered {self.status}")
        return error_of(said.get("error", ""), f"{self._peer.key}: {said.get('message', '')}")

    async def blocks(self) -> AsyncIterator[bytes]:
        """Raises `Unreachable` when it breaks off."""
        while True:
            blocks, self._blocks = self._blocks, []
            for block in blocks:
                yield block
            if self._is_complete:
                return
            await self._read()

    async def lines(self) -> AsyncIterator[bytes]:
        """The same, by lines."""
        rest = b""
        async for block in self.blocks():
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                yield line

    async def _read(self) -> None:
        try:
            async with asyncio.timeout(SILENCE_S):
                data = await self._reader.read(BLOCK_BYTES)
            if not data:
                raise ConnectionResetError("it closed the connection in the middle")
            self._parser.feed_data(data)
        except TimeoutError:
            raise Unreachable(f"{self._peer.key} was silent for {SILENCE_S:g} s") from None
        except (OSError, HttpParserError) as error:
            raise Unreachable(f"{self._peer.key} broke off: {error}") from error

    # The parser's

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, block: bytes) -> None:
        self._blocks.append(block)

    def on_message_complete(self) -> None:
        self._is_complete = True


@asynccontextmanager
async def ask_peer(
    peer: Peer, token: str, method: str, target: str, body: bytes = b""
) -> AsyncIterator[Answer]:
    """Ask a node. Raises `Unreachable`, or what it refuses with."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(peer.address, API_PORT)
    except OSError as error:
        reason = error.strerror or str(error) or "it does not answer"
        raise Unreachable(f"{peer.key} cannot be reached: {reason}") from None
    try:
        head = {
            "Host": "tabane",
            "Authorization": f"Bearer {token}",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        writer.write(f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode() + body)
        answer = Answer(peer, reader)
        await answer.read_head()
        yield answer
    finally:
        writer.transport.abort()
