"""Readiness as the kernel and the program itself tell it."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from tabane.model import App, Reactive
from tabane.network import sockets
from tabane.network.sockets import SocketTable
from tabane.node import readiness
from tabane.node.readiness import (
    describe_unready,
    listening_sockets,
    wait_healthy,
    wait_listening,
    wait_ready,
)
from tabane.runtimes.api import Link

ADDRESS, PORT = "100.64.0.5", 8000
IP_FREEBIND, IPV6_FREEBIND = 15, 78

PROGRAM = f"""
import socket, sys
for line in sys.stdin:
    kept = None
    what, address, only6 = line.split()
    if what != "close":
        kept = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        kept.setsockopt(socket.SOL_IP, {IP_FREEBIND}, 1)
        if ":" in address:
            kept.setsockopt(socket.IPPROTO_IPV6, {IPV6_FREEBIND}, 1)
            kept.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(only6))
        kept.bind((address, {PORT}))
        if what == "listen":
            kept.listen()
    print("done", flush=True)
"""


class Instance:
    """A program in a network namespace of its own, that listens as it is told."""

    def __init__(self) -> None:
        argv = ("unshare", "--net", "--", sys.executable, "-ISc", PROGRAM)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True)
        self.tell("close", "-")

    def tell(self, what: str, address: str, *, only6: bool = False) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(what, address, int(only6), file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"

    @property
    def link(self) -> Link:
        return Link(0, ADDRESS, "100.64.0.1", self.process.pid, 0)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def instance() -> Iterator[Instance]:
    instance = Instance()
    yield instance
    instance.end()


@pytest.mark.real
@pytest.mark.parametrize(
    ("address", "only6", "reached"),
    [
        ("0.0.0.0", False, True),
        (ADDRESS, False, True),
        ("100.64.0.6", False, False),
        ("127.0.0.1", False, False),
        ("::", False, True),
        ("::", True, False),
        ("::1", False, False),
        (f"::ffff:{ADDRESS}", False, True),
        ("::ffff:127.0.0.1", False, False),
    ],
)
def test_it_listens_when_a_connection_would_reach_it(
    instance: Instance, address: str, only6: bool, reached: bool
) -> None:
    with SocketTable(instance.process.pid) as table:
        assert not table.listens(ADDRESS, PORT)
        instance.tell("bind", address, only6=only6)
        assert not table.listens(ADDRESS, PORT)
        instance.tell("listen", address, only6=only6)
        assert table.listens(ADDRESS, PORT) is reached
        assert not table.listens(ADDRESS, PORT + 1)
        instance.tell("close", "-")
        assert not table.listens(ADDRESS, PORT)


@pytest.mark.real
async def test_waiting_ends_when_it_listens(instance: Instance) -> None:
    with socket.socket() as elsewhere:
        elsewhere.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        elsewhere.bind(("", PORT))
        elsewhere.listen()
        waiting = asyncio.ensure_future(wait_listening(instance.link, PORT))
        instance.tell("listen", "127.0.0.1")
        await asyncio.sleep(0.02)
        assert not waiting.done()
        instance.tell("listen", "0.0.0.0")
        await waiting


@pytest.mark.real
async def test_a_wait_that_is_given_up_leaves_nothing(instance: Instance) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(wait_listening(instance.link, PORT), 0.01)


@pytest.mark.real
async def test_waiting_fails_when_the_namespaces_are_gone(instance: Instance) -> None:
    instance.end()
    with pytest.raises(FileNotFoundError):
        await wait_listening(instance.link, PORT)


def test_a_kernel_that_refuses_to_say_is_an_error() -> None:
    def refusal(number: int) -> bytes:
        return struct.pack("=IHHIIi", 20, 2, 0, 1, 0, -number)

    assert not sockets.parse_answer(refusal(errno.ENOENT))
    with pytest.raises(PermissionError):
        sockets.parse_answer(refusal(errno.EPERM))


@asynccontextmanager
async def program(*answers: bytes | None) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server that gives each connection the next answer (None: silence), the last for ever."""
    asked: list[bytes] = []
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        answer = answers[min(len(asked), len(answers) - 1)]
        asked.append(await reader.readline())
        if answer is not None:
            writer.write(answer)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], asked
    for writer in writers:
        writer.close()


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.0 204\r\n", b"HTTP/1.1 302 Found\r\n\r\nmore"]
)
async def test_a_good_answer_is_healthy(answer: bytes) -> None:
    async with program(answer) as (port, asked):
        await wait_healthy("127.0.0.1", port, "/healthz?full=1")
    assert asked == [b"GET /healthz?full=1 HTTP/1.1\r\n"]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 500 Oops\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\n\r\n",
        b"",
        b"HTTP/1.1 2",
        b"SSH-2.0 200 server\r\n",
        b"200 200 200 200\r\n",
        b"\0" * 1_000_000,
        None,
    ],
)
async def test_any_other_answer_is_asked_again(
    answer: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "HTTP_ANSWER_S", 0.2)
    good = b"HTTP/1.1 200 OK\r\n\r\n"
    async with program(answer, answer, good) as (port, asked):
        monkeypatch.setattr(readiness, "HTTP_POLL_S", 0.001)
        await wait_healthy("127.0.0.1", port, "/")
    assert len(asked) >= 3


async def test_nobody_there_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0

    async def refuse(*_: object) -> None:
        nonlocal tries
        tries += 1
        raise ConnectionRefusedError if tries < 3 else asyncio.CancelledError

    monkeypatch.setattr(asyncio, "open_connection", refuse)
    with pytest.raises(asyncio.CancelledError):
        await wait_healthy("127.0.0.1", 1, "/")
    assert tries == 3


def app(ready: str, port: int | None = PORT) -> App:
    return App("hello", "host", port=port, reactive=Reactive(ready=ready))


async def test_what_is_waited_for_is_the_apps_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[tuple[object, ...]] = []

    async def note(*what: object) -> None:
        waited.append(what)

    monkeypatch.setattr(readiness, "wait_listening", note)
    monkeypatch.setattr(readiness, "wait_healthy", note)
    link = Link(0, ADDRESS, "100.64.0.1", 1, 0)
    await wait_ready(app("started"), ADDRESS, link)
    await wait_ready(app("listen", port=None), ADDRESS, link)
    assert waited == []
    await wait_ready(app("listen"), ADDRESS, link)
    await wait_ready(app("http:/healthz"), ADDRESS, link)
    assert waited == [(link, PORT), (ADDRESS, PORT, "/healthz")]


@pytest.mark.real
async def test_what_is_seen_of_one_that_is_not_ready(instance: Instance) -> None:
    app = App("a", "host", port=PORT)
    assert await describe_unready(app, ADDRESS, instance.link) == "it listens on no port"
    for address, shown in (("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")):
        instance.tell("listen", address)
        assert listening_sockets(instance.process.pid) == [f"{shown}:{PORT}"]
        seen = await describe_unready(app, ADDRESS, instance.link)
        assert seen == f"it listens on {shown}:{PORT} only"
    instance.tell("listen", "0.0.0.0")
    assert await describe_unready(app, ADDRESS, instance.link) == ""


@pytest.mark.real
@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (b"HTTP/1.1 503 Busy\r\n\r\n", "GET /up is answered 503"),
        (b"not HTTP at all", "GET /up is answered by no HTTP"),
        (b"", "GET /up is not answered"),
    ],
)
async def test_what_a_health_check_saw(answer: bytes, seen: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    app = App("a", "host", port=port, reactive=Reactive(ready="http:/up"))
    link = Link(0, "127.0.0.1", "", os.getpid(), 0)
    assert await describe_unready(app, "127.0.0.1", link) == seen
    server.close()
    await server.wait_closed()
