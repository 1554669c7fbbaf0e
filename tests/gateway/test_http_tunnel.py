"""After a 101 both sides talk as they like; the slot is held until both are done."""

from __future__ import annotations

import asyncio

import pytest

from tabane.gateway.limits import HttpLimits
from tabane.testing.http import Script, Wire, answer, echo, http_rig

UPGRADE = (
    b"GET /chat HTTP/1.1\r\nHost: a.test\r\nConnection: keep-alive, Upgrade\r\n"
    b"Upgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n"
)
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: y\r\n\r\n"
)
GET = b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"


async def shouts(wire: Wire) -> None:
    """Answer 101 with a greeting behind it, then send back in capitals until the client ends."""
    _, headers, _ = await wire.head()
    assert (headers["connection"], headers["upgrade"]) == ("upgrade", "websocket")
    assert headers["sec-websocket-key"] == "x"
    await wire.send(SWITCH + b"hello ")
    while data := await wire.reader.read(65_536):
        await wire.send(data.upper())
    await wire.send(b" bye")


async def test_bytes_pass_both_ways_and_each_side_closes_on_its_own() -> None:
    async with http_rig(shouts) as rig:
        wire = await rig.connect()
        await wire.send(UPGRADE + b"early ")
        response = await wire.receive()
        assert response.status == 101
        assert response.headers["upgrade"] == "websocket"
        assert response.headers["connection"] == "upgrade"
        assert response.headers["sec-websocket-accept"] == "y"
        assert await wire.reader.readexactly(12) == b"hello EARLY "
        await wire.send(b"late")
        assert await wire.reader.readexactly(4) == b"LATE"
        assert rig.app.held == 1
        assert rig.gateway.counters.active == 1
        wire.half_close()
        assert await wire.reader.read() == b" bye"
        await rig.settle()
        assert rig.gateway.counters.responses[1] == 1


async def test_much_passes_with_little_held_between() -> None:
    async with http_rig(shouts) as rig:
        wire = await rig.connect()
        await wire.send(UPGRADE)
        await wire.receive()
        wire.writer.write(b"x" * 20_000_000)
        assert await wire.reader.readexactly(6) == b"hello "
        async with asyncio.timeout(60):
            assert await wire.reader.readexactly(20_000_000) == b"X" * 20_000_000


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_leaves_ends_the_tunnel(how: str) -> None:
    async with http_rig(shouts) as rig:
        wire = await rig.connect()
        await wire.ask(UPGRADE)
        getattr(wire, how)()
        await rig.until(lambda: rig.app.held == 0)
        async with asyncio.timeout(60):
            await rig.servers[0].ended.wait()


def switches_and(how: str) -> Script:
    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(SWITCH)
        await wire.reader.readexactly(2)
        getattr(wire, how)()

    return script


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_an_app_that_leaves_ends_the_tunnel(how: str) -> None:
    async with http_rig(switches_and(how)) as rig:
        wire = await rig.connect()
        await wire.ask(UPGRADE)
        await wire.send(b"go")
        await wire.wait_reset()
        wire.close()
        await rig.until(lambda: rig.app.held == 0)


async def test_a_silent_tunnel_is_cut() -> None:
    async with http_rig(shouts, limits=HttpLimits(stream_idle_timeout_s=900)) as rig:
        wire = await rig.connect()
        await wire.ask(UPGRADE)
        rig.pass_time(899)
        await wire.send(b"x")
        await wire.reader.readuntil(b"X")
        rig.pass_time(899)
        assert rig.app.held == 1
        rig.pass_time(2)
        await wire.wait_reset()
        assert rig.app.held == 0


async def test_an_upgrade_that_is_declined_leaves_an_http_connection() -> None:
    declines = answer(
        b"HTTP/1.1 426 Upgrade Required\r\nUpgrade: other\r\nConnection: upgrade\r\n"
        b"Content-Length: 0\r\n\r\n"
    )
    async with http_rig(declines, echo) as rig:
        wire = await rig.connect()
        response = await wire.ask(UPGRADE + GET)
        assert response.status == 426
        assert response.headers["upgrade"] == "other"
        assert (await wire.receive()).body.startswith(b"GET / ")


async def test_h2c_and_upgrades_with_a_body_are_requests_like_others() -> None:
    async with http_rig(echo) as rig:
        wire = await rig.connect()
        for upgrade, length in ((b"h2c", 0), (b"websocket", 4), (b"h2c", 4)):
            request = (
                b"POST / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade, HTTP2-Settings\r\n"
                b"Upgrade: %b\r\nHTTP2-Settings: AAMAAABk\r\nContent-Length: %d\r\n\r\n%b"
            ) % (upgrade, length, b"body"[:length])
            response = await wire.ask(request + GET)
            assert b"pgrade" not in response.body
            assert b"HTTP2" not in response.body
            assert response.body.endswith(b"\r\n\r\n" + b"body"[:length])
            assert (await wire.receive()).body.startswith(b"GET / ")
