"""Firecracker's REST API over its unix socket: one request, one connection.

What is asked is checked against the contract first, and so is what is answered.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from tabane.errors import Closed, EngineError, ProtocolError, TimedOut, UsageError
from tabane.runtimes.firecracker.contract import CALLS, find_answer_faults, find_call, find_faults
from tabane.unix import connect_unix

CALL_TIMEOUT_S = 10.0
SNAPSHOT_TIMEOUT_S = 300.0
"""It writes or maps all of the machine's memory."""
MOST_BYTES = 51200
"""Of a request: what Firecracker takes (`--http-api-max-payload-size`)."""
READ_BYTES = 64 << 10
MOST_ANSWER_BYTES = 1 << 20
SOCKET_S = 5.0
"""From the jailer's end until Firecracker listens: some milliseconds."""
POLL_S = 0.001


class Api:
    """Keeps no connection."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """One of `CALLS`; its answer, None where there is none.

        Raises `UsageError` for what the contract has not, `EngineError` with Firecracker's words
        for what it refuses, `Closed` when it is not there or went away, `TimedOut`,
        `ProtocolError` for an answer that is none.
        """
        found = find_call(method, path)
        if found is None:
            raise UsageError(f"Firecracker has no call {method} {path}")
        key, parameters = found
        if faults := find_faults(key, body, parameters):
            raise UsageError(f"{method} {path}: {'; '.join(faults)}")
        timeout_s = SNAPSHOT_TIMEOUT_S if "/snapshot/" in key else CALL_TIMEOUT_S
        try:
            async with asyncio.timeout(timeout_s):
                status, content = await self._exchange(encode_request(method, path, body))
        except TimeoutError:
            problem = f"Firecracker did not answer {method} {path} within {timeout_s:g} s"
            raise TimedOut(problem) from None
        except OSError as error:
            raise Closed(f"no Firecracker answers at {self._socket}: {error.strerror}") from error
        return _parse_answer(key, f"{method} {path}", status, content)

    async def _exchange(self, request: bytes) -> tuple[int, bytes]:
        sock = connect_unix(self._socket, 0)
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        try:
            writer.write(request)
            answer = _Answer()
            while not answer.is_whole:
                data = await reader.read(READ_BYTES)
                if not data:
                    raise Closed(f"Firecracker at {self._socket} ended in the middle of an answer")
                answer.feed(data)
            return answer.status, bytes(answer.body)
        finally:
            writer.close()


class _Answer:
    """What `httptools` calls back to."""

    def __init__(self) -> None:
        import httptools

        self._error = httptools.HttpParserError
        self._parser = httptools.HttpResponseParser(self)
        self.body = bytearray()
        self.is_whole = False

    def feed(self, data: bytes) -> None:
        """Raises `ProtocolError`."""
        try:
            self._parser.feed_data(data)
        except self._error as error:
            raise ProtocolError(f"Firecracker's answer is no HTTP: {error}") from None

    @property
    def status(self) -> int:
        return int(self._parser.get_status_code())

    def on_body(self, data: bytes) -> None:
        self.body += data
        if len(self.body) > MOST_ANSWER_BYTES:
            raise ProtocolError(f"Firecracker answers more than {MOST_ANSWER_BYTES} bytes")

    def on_message_complete(self) -> None:
        self.is_whole = self.status >= 200


def encode_request(method: str, path: str, body: Any) -> bytes:
    """Raises `UsageError` when it is larger than Firecracker takes."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
    content = b"" if body is None else msgspec.json.encode(body)
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    request = f"{head}\r\n".encode() + content
    if len(request) > MOST_BYTES:
        raise UsageError(f"{method} {path} has {len(request)} bytes, more than {MOST_BYTES}")
    return request


def _parse_answer(key: str, asked: str, status: int, content: bytes) -> Any:
    if status == 204 and not content:
        return None
    try:
        answer = msgspec.json.decode(content) if content else None
    except msgspec.DecodeError as error:
        raise ProtocolError(f"Firecracker's answer to {asked} is no JSON: {error}") from None
    if status not in (200, 204):
        words = answer.get("fault_message", "") if isinstance(answer, dict) else ""
        words = str(words).strip() or f"status {status}"
        problem = f"Firecracker refused {asked}: {words}"
        raise EngineError(problem, argv=(asked,), status=status, output=words)
    if faults := find_answer_faults(key, answer):
        raise ProtocolError(f"Firecracker's answer to {asked} is not as agreed: {faults[0]}")
    return answer if CALLS[key].answer else None


async def wait_for_socket(path: Path) -> None:
    """Until it is there. Raises `TimedOut`."""
    try:
        async with asyncio.timeout(SOCKET_S):
            while not path.is_socket():  # noqa: ASYNC110 - who makes it tells nobody
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise TimedOut(f"nobody listened at {path} within {SOCKET_S:g} s") from None


async def wait_for_api(path: Path) -> None:
    """Until somebody listens there. Raises `TimedOut`."""
    try:
        async with asyncio.timeout(SOCKET_S):
            while True:
                with suppress(OSError):
                    connect_unix(path, 1.0).close()
                    return
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise TimedOut(f"Firecracker did not listen within {SOCKET_S:g} s") from None
