"""Instances that end with their network stacks: no FIN and no RST, only the node's word."""

from __future__ import annotations

import asyncio
import socket

import pytest

from tabane.testing.http import Rig, Script, Wire, echo, http_rig

GET = b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 4\r\n\r\nbody"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
UPGRADE = GET[:-2] + b"Connection: upgrade\r\nUpgrade: chat\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: chat\r\nConnection: upgrade\r\n\r\n"


def says(*pieces: bytes, times: int = 1) -> Script:
    """Answer so many requests with these bytes, then take what comes and say nothing, for ever."""

    async def script(wire: Wire) -> None:
        for _ in range(times):
            await wire.head()
            await wire.send(*pieces)
        await asyncio.Event().wait()

    return script


MUTE = says(times=0)


def bury(rig: Rig, number: int = 0) -> None:
    """As the node does when it sees the end of that instance."""
    rig.gateway.break_off(frozenset({f"default/a#{number}"}), complete=False)


async def test_a_request_that_may_be_sent_again_goes_elsewhere_at_once() -> None:
    async with http_rig(MUTE, echo) as rig:
        wire = await rig.connect()
        await wire.send(GET)
        await rig.until(lambda: rig.servers[0].accepted == 1 and rig.app.held == 1)
        bury(rig)
        assert (await wire.receive()).status == 200
        assert [slot.failures for slot in rig.router.slots] == [["its instance ended"], []]
        assert rig.router.slots[0].broke_off == []


async def test_another_request_is_told_at_once() -> None:
    async with http_rig(MUTE, echo) as rig:
        wire = await rig.connect()
        await wire.send(POST)
        await rig.until(lambda: rig.servers[0].accepted == 1)
        bury(rig)
        response = await wire.receive()
        assert response.status == 502 and b"its instance ended" in response.body
        assert rig.servers[1].accepted == 0


async def test_requests_at_other_instances_go_on() -> None:
    async with http_rig(MUTE) as rig:
        wire = await rig.connect()
        await wire.send(POST)
        await rig.until(lambda: rig.servers[0].accepted == 1)
        bury(rig, 1)
        rig.gateway.sweep()
        assert rig.app.held == 1
        bury(rig)
        assert (await wire.receive()).status == 502


async def test_a_kept_connection_is_not_replaced_by_another_to_the_same_instance() -> None:
    async with http_rig(says(OK), echo) as rig:
        first, wire = await rig.connect(), await rig.connect()
        await first.ask(GET)
        rig.app.lead_to(("127.0.0.1", rig.servers[0].port), ("127.0.0.1", rig.servers[1].port))
        await wire.send(GET)
        await rig.until(lambda: rig.app.held == 1 and rig.gateway.pools.idle == 0)
        assert rig.servers[0].accepted == 1
        bury(rig)
        assert (await wire.receive()).body.startswith(b"GET")
        assert rig.servers[0].accepted == 1


async def test_nothing_connects_to_it_until_it_is_forgotten() -> None:
    async with http_rig(echo) as rig:
        bury(rig)
        wire = await rig.connect()
        response = await wire.ask(GET)
        assert response.status == 503 and b"its instance ended" in response.body
        assert rig.servers[0].accepted == 0
        rig.gateway.break_off(frozenset(), complete=True)
        assert (await wire.ask(GET)).status == 200


async def test_who_connects_to_it_goes_elsewhere() -> None:
    deaf = socket.socket()
    deaf.bind(("127.0.0.1", 0))
    deaf.listen(0)
    fillers = [socket.socket() for _ in range(4)]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(deaf.getsockname())
    try:
        async with http_rig(echo) as rig:
            rig.app.lead_to(deaf.getsockname(), ("127.0.0.1", rig.servers[0].port))
            wire = await rig.connect()
            await wire.send(POST)
            await rig.until(lambda: bool(rig.gateway.pools._connecting))
            bury(rig)
            assert (await wire.receive()).status == 200
    finally:
        for sock in (deaf, *fillers):
            sock.close()


async def test_kept_connections_to_it_are_closed() -> None:
    async with http_rig(echo) as rig:
        wire = await rig.connect()
        await wire.ask(GET)
        assert rig.gateway.pools.idle == 1
        bury(rig)
        assert rig.gateway.pools.idle == 0
        await rig.until(lambda: len(rig.gateway.pools) == 0)


async def test_what_it_had_answered_arrives_whole() -> None:
    """The gateway has not read it when the word comes, as when a client is slow."""
    may_answer = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.head()
        await may_answer.wait()
        await wire.send(OK)
        await asyncio.Event().wait()

    async with http_rig(script) as rig:
        wire = await rig.connect()
        await wire.send(GET)
        await rig.until(lambda: len(rig.gateway.pools) == 1)
        (upstream,) = rig.gateway.pools._all
        upstream.read(False)
        may_answer.set()
        await rig.until(upstream.has_news)
        bury(rig)
        upstream.read(True)
        assert (await wire.receive()).body == b"ok"
        await rig.settle()
        assert rig.router.slots[0].failures == []


@pytest.mark.parametrize(
    "length", [b"Content-Length: 100\r\n", b"", b"Transfer-Encoding: chunked\r\n"]
)
async def test_an_answer_that_lacks_its_end_is_cut(length: bytes) -> None:
    """Also one that would end with its connection: this end is none."""
    part = b"5\r\nsome \r\n" if b"chunked" in length else b"some "
    async with http_rig(says(b"HTTP/1.1 200 OK\r\n" + length + b"\r\n" + part)) as rig:
        wire = await rig.connect()
        await wire.send(GET)
        await wire.reader.readuntil(b"some ")
        bury(rig)
        await wire.wait_reset()
        await rig.settle()
        assert rig.gateway.counters.aborted == 1


async def test_a_tunnel_ends_when_the_client_has_what_was_sent() -> None:
    async with http_rig(says(SWITCH, b"last words")) as rig:
        wire = await rig.connect()
        await wire.send(UPGRADE)
        await wire.head()
        bury(rig, 1)
        assert rig.app.held == 1
        bury(rig)
        async with asyncio.timeout(60):
            assert await wire.reader.read() == b"last words"
        await rig.settle()
