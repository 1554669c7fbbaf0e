"""nginx and Redis, as sane and as broken as a pretended server can be."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from tests.k2i.collectors.test_parse import INFO, STUB_STATUS

from tabane.errors import TabaneError
from tabane.k2i.collectors import nginx, redis
from tabane.k2i.collectors.api import MAX_ANSWER_BYTES, Collector, Reading, Setting
from tabane.k2i.collectors.command import run_here
from tabane.k2i.collectors.dial import NodeDial, find_inode
from tabane.model import Collect

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(STUB_STATUS), STUB_STATUS)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"


def saying(answer: bytes, ends: bytes = b"\r\n\r\n") -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(ends)
        writer.write(answer)
        writer.close()

    return serve


def server(serve: Serve, path: Path | None = None) -> AbstractAsyncContextManager[str]:
    """Its host and port, or its path."""

    @asynccontextmanager
    async def run() -> AsyncIterator[str]:
        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await serve(reader, writer)
            except (EOFError, ConnectionError):
                pass
            finally:
                writer.close()

        if path is not None:
            listening = await asyncio.start_unix_server(take, path)
            where = str(path)
        else:
            listening = await asyncio.start_server(take, "127.0.0.1", 0)
            host, port = listening.sockets[0].getsockname()
            where = f"{host}:{port}"
        yield where
        listening.close()
        await listening.wait_closed()

    return run()


def made(kind: Callable[[Setting], Collector], url: str, **fields: str) -> Collector:
    return kind(Setting(Collect("any", url=url, **fields), NodeDial(), run_here))


@pytest.mark.parametrize("answer", [OK, CHUNKED % (len(STUB_STATUS), STUB_STATUS)])
async def test_nginx(answer: bytes) -> None:
    async with server(saying(answer)) as where:
        (reading,) = await made(nginx.make, f"http://{where}/status?x=1").collect()
    assert reading.facts["connections.waiting"] == 106
    assert reading.pid == os.getpid()


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"", "closed the connection without an answer"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "answers no HTTP"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "answers 404"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "which is no stub_status"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (MAX_ANSWER_BYTES + 99), "answers more than 256 KiB"),
    ],
)
async def test_what_is_no_nginx(answer: bytes, sentence: str) -> None:
    async with server(saying(answer)) as where:
        with pytest.raises(TabaneError) as caught:
            await made(nginx.make, f"http://{where}/status").collect()
    assert sentence in caught.value.message
    assert where in caught.value.message


async def test_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        await made(nginx.make, f"http://127.0.0.1:{port}/").collect()


async def test_redis_over_tcp_and_a_unix_socket(tmp_path: Path) -> None:
    serve = saying(b"$%d\r\n%b\r\n" % (len(INFO), INFO), ends=b"INFO\r\n")
    async with server(serve) as where:
        (reading,) = await made(redis.make, f"redis://{where}").collect()
    assert (reading.facts["redis_version"], reading.pid) == ("7.0.15", os.getpid())
    async with server(serve, tmp_path / "redis.sock") as where:
        assert await made(redis.make, f"unix://{where}").collect() == [
            Reading(reading.facts, os.getpid())
        ]


async def test_a_password_comes_from_its_file(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("open sesame\n")
    heard = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"sesame\r\n"))
        writer.write(b"+OK\r\n")
        heard.append(await reader.readuntil(b"INFO\r\n"))
        writer.write(b"$3\r\na:1\r\n")

    async with server(serve) as where:
        fields = {"username": "k2i", "password_file": str(secret)}
        (reading,) = await made(redis.make, f"redis://{where}", **fields).collect()
    assert reading.facts == {"a": 1}
    assert heard == [
        b"*3\r\n$4\r\nAUTH\r\n$3\r\nk2i\r\n$11\r\nopen sesame\r\n",
        b"*1\r\n$4\r\nINFO\r\n",
    ]


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"", "closed the connection without an answer"),
        (b"-NOAUTH Authentication required.\r\n", "refuses: NOAUTH Authentication required."),
        (b"HTTP/1.1 400 Bad Request\r\n", "which is not Redis's protocol"),
        (b"$-1\r\n", "which is not Redis's protocol"),
        (b"$99999999\r\n", "answers more than 256 KiB"),
        (b"$20\r\nshort", "ends after"),
        (b"$5\r\nhello\r\n", "'hello' in its INFO"),
        (b"y" * (MAX_ANSWER_BYTES + 99), "a line of more than 256 KiB"),
    ],
)
async def test_what_is_no_redis(answer: bytes, sentence: str) -> None:
    async with server(saying(answer, ends=b"INFO\r\n")) as where:
        with pytest.raises(TabaneError) as caught:
            await made(redis.make, f"redis://{where}").collect()
    assert sentence in caught.value.message
    assert where in caught.value.message


@pytest.mark.parametrize(
    ("bound", "asked"),
    [
        *(("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "::1"), ("::", "::1")),
        ("::", "127.0.0.1"),
    ],
)
def test_the_socket_that_listens(bound: str, asked: str) -> None:
    family = socket.AF_INET6 if ":" in bound else socket.AF_INET
    both = bound == "::"
    with socket.create_server((bound, 0), family=family, dualstack_ipv6=both) as sock:
        port = sock.getsockname()[1]
        inode = str(os.fstat(sock.fileno()).st_ino)
        assert find_inode(Path("/proc"), asked, port) == inode
    assert find_inode(Path("/proc"), asked, port) == ""
