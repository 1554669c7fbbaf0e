"""What the gateway refuses: smuggling, oversize, slowness, crowds."""

from __future__ import annotations

import asyncio

import pytest

from tabane.gateway.limits import HttpLimits
from tabane.testing.http import Rig, Wire, echo, http_rig

GET = b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
POST = b"POST / HTTP/1.1\r\nHost: a.test\r\n"


@pytest.mark.parametrize(
    ("status", "request_bytes"),
    [
        (400, b"GET / HTTP/1.1\r\n\r\n"),
        (400, b"GET / HTTP/1.0\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nHost: a.test\r\nHost: a.test\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nHost: a.test\r\nhost: b.test\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nHost:\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nHost: a.test/x\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nHost: a.test, b.test\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nHost: u@a.test\r\n\r\n"),
        (400, b"GET http:///x HTTP/1.1\r\nHost: a.test\r\n\r\n"),
        (400, b"GET ftp://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n"),
        (400, b"GET /x#y HTTP/1.1\r\nHost: a.test\r\n\r\n"),
        (400, b"GET * HTTP/1.1\r\nHost: a.test\r\n\r\n"),
        (400, b"GET /a b HTTP/1.1\r\nHost: a.test\r\n\r\n"),
        (400, b"GET /\xff HTTP/1.1\r\nHost: a.test\r\n\r\n"),
        (400, POST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        (400, POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"),
        (400, POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"),
        (400, POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello"),
        (400, POST + b"Content-Length: 5, 5\r\n\r\nhello"),
        (400, POST + b"Content-Length: +5\r\n\r\nhello"),
        (400, POST + b"Content-Length: 0x5\r\n\r\nhello"),
        (400, POST + b"Content-Length: 99999999999999999999\r\n\r\nhello"),
        (400, POST + b"Content-Length:\r\n\r\n"),
        (400, POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
        (400, POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
        (400, POST + b"Transfer-Encoding: identity\r\n\r\n"),
        (501, POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
        (400, POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n"),
        (400, POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n"),
        (400, POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n"),
        (400, POST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        (400, POST + b"X: a\r\n folded: b\r\n\r\n"),
        (400, POST + b"X : a\r\n\r\n"),
        (400, POST + b": a\r\n\r\n"),
        (400, POST + b"no colon\r\n\r\n"),
        (400, POST + b"X\x00: a\r\n\r\n"),
        (400, POST + b"X: \x00\r\n\r\n"),
        (400, POST + b"X: a\rb\r\n\r\n"),
        (400, POST + b"X: a\nTransfer-Encoding: chunked\r\n\r\n"),
        (400, b"GET / HTTP/1.1\nHost: a.test\n\n"),
        (400, b"\x16\x03\x01\x02\x00\x01\x00"),
        (505, b"GET / HTTP/2.0\r\nHost: a.test\r\n\r\n"),
        (505, b"GET /\r\n\r\n"),
        (505, b"GET / RTSP/1.0\r\nHost: a.test\r\n\r\n"),
        (501, b"BREW / HTTP/1.1\r\nHost: a.test\r\n\r\n"),
        (405, b"CONNECT a.test:80 HTTP/1.1\r\nHost: a.test:80\r\n\r\n"),
        (417, POST + b"Expect: the-unexpected\r\nContent-Length: 0\r\n\r\n"),
        (414, b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: a.test\r\n\r\n"),
        (414, b"GET /" + b"x" * 100_000),
        (431, POST + b"X: " + b"x" * 70_000 + b"\r\n\r\n"),
        (431, POST + b"X: y\r\n" * 20_000),
    ],
)
async def test_what_must_not_be_served_is_refused(status: int, request_bytes: bytes) -> None:
    async with http_rig(echo) as rig:
        wire = await rig.connect()
        response = await wire.ask(request_bytes)
        assert response.status == status
        assert response.headers["connection"] == "close"
        assert b'"reason":"' in response.body
        assert await wire.at_end()
        assert rig.router.slots == []


async def test_a_refused_request_follows_the_answers_before_it() -> None:
    async with http_rig(echo) as rig:
        wire = await rig.connect()
        await wire.send(GET + GET + b"GET / HTTP/1.1\r\n\r\n" + GET)
        assert [(await wire.receive()).status for _ in range(3)] == [200, 200, 400]
        assert await wire.at_end()


async def test_a_head_may_have_64_kib() -> None:
    async with http_rig(echo) as rig:
        wire = await rig.connect()
        response = await wire.ask(POST + b"X: " + b"x" * 60_000 + b"\r\n\r\n")
        assert response.status == 200
        assert b"x" * 60_000 in response.body


async def test_trailers_and_chunk_extensions_are_bounded() -> None:
    async with http_rig(echo) as rig:
        for flood in (b"0\r\n" + b"X: y\r\n" * 50_000, b"3;" + b"x" * 300_000):
            wire = await rig.connect()
            await wire.send(POST + b"Transfer-Encoding: chunked\r\n\r\n")
            assert (await wire.ask(flood)).status == 400


async def test_slow_heads_get_408_and_silent_connections_are_closed() -> None:
    async with http_rig(echo, limits=HttpLimits(header_timeout_s=10)) as rig:
        fresh, slow = await rig.connect(), await rig.connect()
        await rig.until(lambda: len(rig.gateway.connections) == 2)
        rig.pass_time(5)
        await slow.send(b"GET / HT")
        await rig.until(lambda: any(c.reader.in_head for c in rig.gateway.connections))
        rig.pass_time(6)
        assert await fresh.at_end()
        await slow.send(b"TP")
        rig.pass_time(5)
        assert (await slow.receive()).status == 408
        assert await slow.at_end()


async def test_idle_connections_are_closed() -> None:
    async with http_rig(echo, limits=HttpLimits(idle_timeout_s=75, upstream_idle_s=30)) as rig:
        wire = await rig.connect()
        assert (await wire.ask(GET)).status == 200
        rig.pass_time(31)
        await rig.until(lambda: len(rig.gateway.pools) == 0)
        assert len(rig.gateway.connections) == 1
        rig.pass_time(45)
        assert await wire.at_end()


async def test_a_body_that_stops_coming_gets_408() -> None:
    async with http_rig(echo, limits=HttpLimits(body_idle_timeout_s=60)) as rig:
        wire = await rig.connect()
        await wire.send(POST + b"Content-Length: 10\r\n\r\nhello")
        await rig.until(lambda: rig.app.held == 1 and len(rig.gateway.pools) == 1)
        rig.pass_time(50)
        await wire.send(b"wor")
        await rig.until(lambda: any(c.deadline > rig.clock.now() + 55 for c in clients(rig)))
        rig.pass_time(50)
        assert rig.app.held == 1
        rig.pass_time(11)
        assert (await wire.receive()).status == 408
        assert await wire.at_end()


async def trickle(rig: Rig, wire: Wire, piece: bytes, pause_s: float, times: int) -> None:
    """Send a body piece by piece, each once the last was passed on."""
    for _ in range(times):
        before = rig.gateway.counters.received_bytes
        await wire.send(piece)
        await rig.until(lambda: rig.gateway.counters.received_bytes >= before + len(piece))  # noqa: B023
        rig.pass_time(pause_s)


LIMITS = HttpLimits(body_idle_timeout_s=60, upload_grace_s=120, upload_bytes_per_s=500)


async def test_a_body_that_drips_holds_its_slot_only_so_long() -> None:
    async with http_rig(echo, limits=LIMITS) as rig:
        wire = await rig.connect()
        await wire.send(POST + b"Content-Length: 1000\r\n\r\n")
        await rig.until(lambda: rig.app.held == 1 and len(rig.gateway.pools) == 1)
        await trickle(rig, wire, b"x", 50, 2)
        assert rig.app.held == 1
        await trickle(rig, wire, b"x", 25, 1)
        assert (await wire.receive()).status == 408
        assert rig.app.held == 0


async def test_a_slow_body_that_keeps_to_the_least_rate_is_let_through() -> None:
    async with http_rig(echo, limits=LIMITS) as rig:
        wire = await rig.connect()
        await wire.send(POST + b"Content-Length: 250000\r\n\r\n")
        await rig.until(lambda: rig.app.held == 1 and len(rig.gateway.pools) == 1)
        await trickle(rig, wire, bytes(25_000), 49, 10)
        answer = await wire.receive()
        assert answer.status == 200
        assert answer.body.endswith(bytes(250_000))


def clients(rig: Rig) -> list[object]:
    return list(rig.gateway.connections)


async def endless(wire: Wire) -> None:
    await wire.head()
    await wire.send(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        await wire.send(b"x" * 65_536)


async def test_a_client_that_does_not_read_is_cut() -> None:
    async with http_rig(endless, limits=HttpLimits(body_idle_timeout_s=60)) as rig:
        wire = await rig.connect(receive_buffer=4096)
        wire.writer.transport.pause_reading()
        await wire.send(GET)
        await rig.until(lambda: any(c.is_full for c in rig.gateway.connections))
        rig.pass_time(59)
        assert rig.app.held == 1

        def is_cut() -> bool:
            rig.pass_time(61)  # again, when the kernel took some more bytes in between
            return rig.app.held == 0

        await rig.until(is_cut)
        assert rig.gateway.counters.aborted == 1


async def test_a_slow_reader_that_gets_on_is_not_cut() -> None:
    async with http_rig(endless, limits=HttpLimits(body_idle_timeout_s=60)) as rig:
        wire = await rig.connect(receive_buffer=4096)
        wire.writer.transport.pause_reading()
        await wire.send(GET)
        await rig.until(lambda: any(c.is_full for c in rig.gateway.connections))
        for _ in range(4):
            rig.pass_time(31)
            wire.writer.transport.resume_reading()
            async with asyncio.timeout(60):
                await wire.reader.readexactly(20_000)
            wire.writer.transport.pause_reading()
            rig.pass_time(31)
            assert rig.app.held == 1
        rig.pass_time(61)
        rig.pass_time(61)
        assert rig.app.held == 0


async def test_an_app_that_falls_silent_in_its_answer_is_cut() -> None:
    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(b"HTTP/1.1 200 OK\r\n\r\nfirst")
        await asyncio.Event().wait()

    async with http_rig(script, limits=HttpLimits(stream_idle_timeout_s=900)) as rig:
        wire = await rig.connect()
        await wire.send(GET)
        await wire.head()
        rig.pass_time(899)
        assert rig.app.held == 1
        rig.pass_time(2)
        await wire.wait_reset()
        assert rig.app.held == 0


async def test_an_app_that_does_not_read_the_body_gets_cut_and_the_client_504() -> None:
    connected = asyncio.Event()

    async def deaf(wire: Wire) -> None:
        wire.writer.transport.pause_reading()
        connected.set()
        await asyncio.Event().wait()

    async with http_rig(deaf, limits=HttpLimits(body_idle_timeout_s=60)) as rig:
        wire = await rig.connect()
        wire.writer.write(POST + b"Content-Length: 90000000\r\n\r\n" + b"x" * 20_000_000)
        await connected.wait()
        await rig.until(lambda: rig.app.held == 1 and any(c.is_deaf for c in clients(rig)))
        rig.pass_time(30)
        rig.pass_time(31)
        assert (await wire.receive()).status == 504


async def test_connections_beyond_the_limit_get_503() -> None:
    async with http_rig(echo, limits=HttpLimits(max_connections=3)) as rig:
        wires = [await rig.connect() for _ in range(3)]
        assert (await wires[2].ask(GET)).status == 200
        surplus = await rig.connect()
        assert (await surplus.receive()).status == 503
        assert await surplus.at_end()
        assert (await wires[0].ask(GET)).status == 200
        assert rig.gateway.counters.refused_connections == 1
        surplus.close()
        wires[1].close()
        await rig.until(lambda: len(rig.gateway.connections) == 2)
        late = await rig.connect()
        assert (await late.ask(GET)).status == 200


async def test_memory_stays_flat_while_one_side_waits() -> None:
    """20 MB one way and 20 MB back through a client that reads late: little is held between."""

    async with http_rig(echo) as rig:
        wire = await rig.connect()
        rig.app.cold = True
        size = 20_000_000
        wire.writer.write(POST + b"Content-Length: %d\r\n\r\n" % size + b"x" * size)
        await rig.until(lambda: any(c.is_deaf for c in clients(rig)))
        client = next(iter(rig.gateway.connections))
        assert client.exchange.request.buffered < 600_000
        rig.app.cold = False
        _, headers, _ = await wire.head()
        await rig.until(lambda: client.is_full)
        assert client.transport.get_write_buffer_size() < 1_000_000
        async with asyncio.timeout(60):
            body = await wire.reader.readexactly(int(headers["content-length"]))
        assert body.endswith(b"\r\n\r\n" + b"x" * size)
