"""The resolver over real sockets on loopback, with an upstream made here."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tabane.gateway import dns
from tabane.gateway import dns_message as message
from tabane.gateway.dns import Resolver, find_upstreams
from tabane.gateway.dns_message import Code, Kind
from tabane.network.addresses import DENIED, EGRESS, GATEWAY
from tabane.supervise import Supervisor

FREE, BOUND = str(EGRESS[5]), str(DENIED[5])
APPS = {"hello.test", "hello.tabane", "hello.default.tabane"}
SAID = b"what upstream says"
ANSWER_S = 60.0


class FakeUpstream(asyncio.DatagramProtocol):
    """Answers with what `respond` makes of the query: any number of datagrams."""

    def __init__(self, respond: Callable[[bytes], list[bytes]]) -> None:
        self.respond = respond
        self.asked: list[bytes] = []

    def connection_made(self, transport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr) -> None:
        self.asked.append(data)
        for response in self.respond(data):
            self.transport.sendto(response, addr)


def say(data: bytes) -> bytes:
    return message.encode_answer(message.parse_query(data), GATEWAY) + SAID


@contextlib.asynccontextmanager
async def upstream(respond=lambda data: [say(data)]) -> AsyncIterator[tuple]:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(
        lambda: FakeUpstream(respond), local_addr=("127.0.0.1", 0)
    )
    try:
        yield protocol, transport.get_extra_info("sockname")
    finally:
        transport.close()


def code(response: bytes) -> int:
    return response[3] & 0xF


async def ask(resolver: Resolver, data: bytes, source: str) -> bytes:
    decided = resolver.decide(data, source)
    if isinstance(decided, message.Query):
        decided = await resolver.forward(decided, data, stream=False)
    assert isinstance(decided, bytes)
    return decided


@pytest.fixture
async def tasks() -> AsyncIterator[Supervisor]:
    async with Supervisor("dns test") as supervisor:
        yield supervisor


@pytest.mark.parametrize("name", ["hello.test", "HELLO.tabane", "hello.Default.Tabane"])
@pytest.mark.parametrize("source", [FREE, BOUND])
async def test_everyone_finds_apps_by_name(tasks: Supervisor, name: str, source: str) -> None:
    resolver = Resolver(APPS.__contains__, tasks)
    response = await ask(resolver, message.encode_query(1, name, Kind.A), source)
    assert response.endswith(GATEWAY.packed)
    empty = await ask(resolver, message.encode_query(1, name, Kind.AAAA), source)
    assert (code(empty), empty[6:8]) == (Code.NO_ERROR, b"\0\0")


async def test_other_names_go_upstream_for_those_with_egress_only(tasks: Supervisor) -> None:
    data = message.encode_query(7, "elsewhere.test", Kind.A)
    async with upstream() as (server, address):
        resolver = Resolver(APPS.__contains__, tasks, upstreams=[address])
        assert code(await ask(resolver, data, BOUND)) == Code.REFUSED
        assert not server.asked
        response = await ask(resolver, data, FREE)
        assert response.endswith(SAID)
        assert response[:2] == data[:2]
        assert server.asked[0][2:] == data[2:]


async def test_names_of_apps_that_are_not_there_are_never_asked_elsewhere(
    tasks: Supervisor,
) -> None:
    async with upstream() as (server, address):
        resolver = Resolver(APPS.__contains__, tasks, upstreams=[address])
        for name in ("nobody.tabane", "tabane"):
            response = await ask(resolver, message.encode_query(7, name, Kind.A), FREE)
            assert code(response) == Code.NO_SUCH_NAME
        assert not server.asked


async def test_the_next_upstream_is_asked_when_one_is_silent(
    tasks: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dns, "UPSTREAM_TIMEOUT_S", 0.05)
    data = message.encode_query(7, "elsewhere.test", Kind.A)
    async with upstream(lambda data: []) as (silent, first), upstream() as (_, second):
        resolver = Resolver(APPS.__contains__, tasks, upstreams=[first, second])
        assert (await ask(resolver, data, FREE)).endswith(SAID)
        assert len(silent.asked) == 1
        alone = Resolver(APPS.__contains__, tasks, upstreams=[first])
        assert code(await ask(alone, data, FREE)) == Code.SERVER_FAILURE


async def test_an_upstream_that_refuses_is_passed_over(tasks: Supervisor) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = closed.getsockname()
    async with upstream() as (_, address):
        resolver = Resolver(APPS.__contains__, tasks, upstreams=[nobody, address])
        data = message.encode_query(7, "elsewhere.test", Kind.A)
        assert (await ask(resolver, data, FREE)).endswith(SAID)


async def test_forged_responses_are_not_heard(tasks: Supervisor) -> None:
    def respond(data: bytes) -> list[bytes]:
        forged = message.with_id(say(data), int.from_bytes(data[:2], "big") ^ 1) + b"forged"
        other = say(message.encode_query(int.from_bytes(data[:2], "big"), "other.test", Kind.A))
        return [b"", b"x", forged, other, say(data)]

    async with upstream(respond) as (_, address):
        resolver = Resolver(APPS.__contains__, tasks, upstreams=[address])
        data = message.encode_query(7, "elsewhere.test", Kind.A)
        response = await ask(resolver, data, FREE)
        assert response == message.with_id(say(data), 7)


async def test_too_many_questions_at_once_fail(
    tasks: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dns, "MAX_IN_FLIGHT", 0)
    async with upstream() as (server, address):
        resolver = Resolver(APPS.__contains__, tasks, upstreams=[address])
        data = message.encode_query(7, "elsewhere.test", Kind.A)
        assert code(await ask(resolver, data, FREE)) == Code.SERVER_FAILURE
        assert not server.asked


async def test_nonsense_gets_a_format_error_and_updates_are_not_implemented(
    tasks: Supervisor,
) -> None:
    resolver = Resolver(APPS.__contains__, tasks)
    assert resolver.decide(b"short", FREE) is None
    assert code(await ask(resolver, bytes(12), FREE)) == Code.FORMAT_ERROR
    update = bytearray(message.encode_query(7, "hello.test", Kind.A))
    update[2] |= 5 << 3
    assert code(await ask(resolver, bytes(update), FREE)) == Code.NOT_IMPLEMENTED


async def test_over_udp(tasks: Supervisor) -> None:
    loop = asyncio.get_running_loop()
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.setblocking(False)
    async with upstream() as (_, address):
        resolver = Resolver(
            APPS.__contains__, tasks, upstreams=[address], may_leave=lambda source: True
        )
        transport, _ = await loop.create_datagram_endpoint(
            lambda: resolver, local_addr=("127.0.0.1", 0)
        )
        with client:
            client.connect(transport.get_extra_info("sockname"))
            for name, end in (("hello.test", GATEWAY.packed), ("elsewhere.test", SAID)):
                await loop.sock_sendall(client, message.encode_query(9, name, Kind.A))
                async with asyncio.timeout(ANSWER_S):
                    response = await loop.sock_recv(client, 512)
                assert response.endswith(end)
                assert response[:2] == b"\0\x09"
        transport.close()


async def test_over_tcp_one_question_after_the_other(tasks: Supervisor) -> None:
    async def upstream_stream(reader, writer) -> None:
        size = int.from_bytes(await reader.readexactly(2), "big")
        response = say(await reader.readexactly(size))
        writer.write(len(response).to_bytes(2, "big") + response)
        await writer.drain()
        writer.close()

    elsewhere = await asyncio.start_server(upstream_stream, "127.0.0.1", 0)
    address = elsewhere.sockets[0].getsockname()
    resolver = Resolver(APPS.__contains__, tasks, upstreams=[address], may_leave=lambda _: True)
    server = await asyncio.start_server(resolver.serve_stream, "127.0.0.1", 0)
    async with elsewhere, server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        for name, end in (("hello.test", GATEWAY.packed), ("elsewhere.test", SAID)):
            data = message.encode_query(9, name, Kind.A)
            writer.write(len(data).to_bytes(2, "big") + data)
            size = int.from_bytes(await reader.readexactly(2), "big")
            assert (await reader.readexactly(size)).endswith(end)
        writer.write(b"\0\x05short")
        assert await reader.read() == b"", "what cannot be answered ends the connection"
        writer.close()
        await writer.wait_closed()


async def test_one_source_has_only_so_many_connections(
    tasks: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dns, "MAX_STREAMS", 2)
    resolver = Resolver(APPS.__contains__, tasks)
    server = await asyncio.start_server(resolver.serve_stream, "127.0.0.1", 0)
    data = message.encode_query(9, "hello.test", Kind.A)

    async def connect(source: str) -> tuple[bytes, asyncio.StreamWriter]:
        """What a question over a new connection is answered with."""
        reader, writer = await asyncio.open_connection(
            *server.sockets[0].getsockname(), local_addr=(source, 0)
        )
        try:
            writer.write(len(data).to_bytes(2, "big") + data)
            return await reader.read(1000), writer
        except ConnectionError:
            return b"", writer

    async with server:
        first, one = await connect("127.0.0.1")
        second, two = await connect("127.0.0.1")
        third, three = await connect("127.0.0.1")
        other, four = await connect("127.0.0.2")
        assert [bool(answer) for answer in (first, second, third, other)] == [1, 1, 0, 1]
        one.close()
        while not (again := await connect("127.0.0.1"))[0]:
            again[1].close()
        for writer in (two, three, four, again[1]):
            writer.close()


def test_stubs_on_loopback_are_not_upstreams(tmp_path: Path) -> None:
    stub, real, missing = tmp_path / "stub", tmp_path / "real", tmp_path / "missing"
    stub.write_text("# made by hand\nnameserver 127.0.0.53\nnameserver ::1\noptions edns0\n")
    real.write_text("search test\nnameserver 192.0.2.7\nnameserver\nnameserver 2001:db8::7\n")
    assert find_upstreams(missing, stub, real) == (("192.0.2.7", 53), ("2001:db8::7", 53))
    assert find_upstreams(stub) == ()
