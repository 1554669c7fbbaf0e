"""The API's port cuts those who say nothing, and takes only so many at a time."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tabane.api import guard
from tabane.api.guard import Guard
from tabane.api.server import ApiServer
from tabane.security.identity import Principal
from tabane.supervise import Supervisor

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
Connect = Callable[[], Any]


async def hello(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Connects to a server that says `ok`."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    writers: list[asyncio.StreamWriter] = []

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writers.append(writer)
        return reader, writer

    async with Supervisor("test") as tasks:
        server = ApiServer(Guard(hello, "secret", frozenset()), tasks)  # type: ignore[arg-type]
        server.serve([listener])
        yield connect
        for writer in writers:
            writer.close()
        await server.aclose()
    listener.close()


async def end_of(reader: asyncio.StreamReader) -> bytes:
    """What comes until the connection is closed, or cut."""
    said = b""
    async with asyncio.timeout(60):
        while True:
            try:
                block = await reader.read(1000)
            except ConnectionError:
                return said
            if not block:
                return said
            said += block


@pytest.mark.parametrize("before", [b"", b"GET / HTTP", GET, GET + b"\r\n" + GET])
async def test_who_sends_no_whole_head_is_cut(
    before: bytes, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "HEAD_TIMEOUT_S", 0.05)
    reader, writer = await connect()
    writer.write(before)
    said = await end_of(reader)
    assert said.endswith(b"ok") == (before.count(GET) == 2)


async def test_a_head_without_end_is_cut(connect: Connect) -> None:
    reader, writer = await connect()
    writer.write(GET + b"X: " + b"x" * (guard.MAX_HEAD_BYTES + 1))
    assert await end_of(reader) == b""


async def test_what_is_no_request_is_refused_with_a_sentence(connect: Connect) -> None:
    reader, writer = await connect()
    writer.write(b"\x16\x03\x01\r\n\r\n")
    said = await end_of(reader)
    assert said.startswith(b"HTTP/1.1 400 ")
    assert json.loads(said.partition(b"\r\n\r\n")[2])["error"] == "usage"


async def test_connections_beyond_the_limit_are_told_so(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MAX_CONNECTIONS", 2)
    kept = [await connect() for _ in range(2)]
    for reader, writer in kept:
        writer.write(GET + b"\r\n")
        assert b"200 OK" in await reader.readline()
    reader, _ = await connect()
    assert (await end_of(reader)).startswith(b"HTTP/1.1 503 ")


async def test_who_is_refused_is_not_listened_to_any_more(connect: Connect) -> None:
    reader, writer = await connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nsome")
    assert (await end_of(reader)).startswith(b"HTTP/1.1 401 ")


async def test_a_user_leaves_room_for_others_at_the_local_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MAX_OF_ONE_USER", 2)
    ann, bob, root = (Principal("peer", uid) for uid in (54001, 54002, os.geteuid()))
    coming = [ann, ann, ann, bob, root, root, root]
    answers: list[bytes] = []
    monkeypatch.setattr(guard, "peer_principal", lambda _: coming[len(answers)])
    writers: list[asyncio.StreamWriter] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()
        async with Supervisor("test") as tasks:
            server = ApiServer(hello, tasks)
            server.serve([listener])
            for _ in coming:
                reader, writer = await asyncio.open_unix_connection(tmp_path / "sock")
                writers.append(writer)
                writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answers.append((await reader.readline())[9:12])
            for writer in writers:
                writer.close()
            await server.aclose()
    assert answers == [b"200", b"200", b"503", b"200", b"200", b"200", b"200"]
