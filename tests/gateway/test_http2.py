"""What clients that speak HTTP/2 get from the gateway, before apps that speak HTTP/1.1."""

from __future__ import annotations

import asyncio

from hyperframe.frame import GoAwayFrame

from tabane.errors import Busy
from tabane.testing.http import Rig, Wire, answer, echo, http_rig
from tabane.testing.http2 import Http2Wire

CANCEL, INTERNAL_ERROR = 8, 2


async def connect(rig: Rig, *, acknowledges: bool = True) -> Http2Wire:
    http2 = Http2Wire(await rig.connect(), is_client=True, acknowledges=acknowledges)
    await http2.flush()
    return http2


async def test_a_request_reaches_the_app_and_its_answer_the_client() -> None:
    async with http_rig(echo) as rig:
        http2 = await connect(rig)
        found = await http2.exchange(
            (b":path", b"/x?y=1"), (b"x-mine", b"1"), (b"te", b"trailers"), (b"cookie", b"a=1")
        )
        assert found.status == 200
        lines = found.body.decode().split("\r\n")
        assert lines[:2] == ["GET /x?y=1 HTTP/1.1", "Host: a.test"]
        assert {"x-mine: 1", "cookie: a=1", "X-Forwarded-For: 127.0.0.1"} < set(lines)
        assert not any(line.lower().startswith(("te:", "connection:")) for line in lines)
        assert rig.router.asked == [("a.test", "/x")]
        assert [slot.first_bytes for slot in rig.router.slots] == [1]


async def test_the_preface_may_come_byte_by_byte() -> None:
    async with http_rig(echo) as rig:
        http2 = Http2Wire(await rig.connect(), is_client=True)
        for byte in http2.h2.data_to_send():
            await http2.wire.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await http2.exchange()).status == 200


async def test_http2_cannot_follow_a_request_of_http1() -> None:
    async with http_rig(echo) as rig:
        wire = await rig.connect()
        request = b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"
        assert (await wire.ask(request)).status == 200
        response = await wire.ask(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert response.status == 400
        assert await wire.at_end()


async def test_bodies_pass_both_ways_and_are_as_long_as_they_are() -> None:
    body = bytes(range(256)) * 4000
    async with http_rig(echo) as rig:
        http2 = await connect(rig)
        for fields in ((), ((b"content-length", b"%d" % len(body)),)):
            found = await http2.exchange((b":method", b"POST"), *fields, body=body)
            assert found.status == 200
            assert found.body.endswith(b"\r\n\r\n" + body)
        assert (b"Content-Length: %d" % len(body)) in found.body
        assert (await http2.exchange((b":method", b"POST"))).body.count(b"Content-Length: 0\r\n")


async def test_answers_without_a_body_and_of_unknown_length() -> None:
    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        await wire.head()
        await wire.send(b"HTTP/1.1 204 No Content\r\nKeep-Alive: 5\r\n\r\n")
        await wire.head()
        await wire.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
        await wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await wire.send(b"0\r\n\r\n")
        await wire.head()
        await wire.send(b"HTTP/1.0 200 OK\r\n\r\nabc", b"def")

    async with http_rig(script) as rig:
        http2 = await connect(rig)
        head = await http2.exchange((b":method", b"HEAD"))
        assert head.fields == [(b":status", b"200"), (b"content-length", b"100")]
        assert (await http2.exchange()).fields == [(b":status", b"204")]
        chunked = await http2.exchange()
        assert chunked.interims == [[(b":status", b"103"), (b"link", b"</a>")]]
        assert (chunked.fields, chunked.body) == ([(b":status", b"200")], b"abc")
        assert (await http2.exchange()).body == b"abcdef"
        assert rig.servers[0].accepted == 1


async def test_refusals_carry_their_reasons() -> None:
    async with http_rig(echo) as rig:
        http2 = await connect(rig)
        unknown = await http2.exchange((b":authority", b"b.test"))
        assert unknown.status == 404
        assert b"no app has the host name 'b.test'" in unknown.body
        rig.app.error = Busy("the queue is full", retry_after_s=2.2)
        busy = await http2.exchange()
        assert (busy.status, busy.get(b"retry-after")) == (503, b"3")
        assert b"the queue is full" in busy.body
        grpc = await http2.exchange((b"content-type", b"application/grpc+proto"))
        assert grpc.fields[0] == (b":status", b"200")
        assert grpc.get(b"grpc-status") == b"14"
        assert grpc.get(b"grpc-message") == b"the queue is full"
        assert grpc.body == b""
        assert rig.gateway.counters.responses[5] == 2


async def test_each_stream_is_a_session() -> None:
    go = asyncio.Event()

    async def script(wire: Wire) -> None:
        while True:
            await wire.head()
            await go.wait()
            await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async with http_rig(script, concurrency=2) as rig:
        http2 = await connect(rig)
        numbers = [await http2.ask() for _ in range(5)]
        await rig.until(lambda: (rig.app.held, rig.app.waiting) == (2, 3))
        go.set()
        for number in numbers:
            assert (await http2.answer_of(number)).status == 200
        assert rig.app.held == 0
        assert len(rig.router.slots) == 5


async def test_a_stream_that_nobody_reads_holds_up_no_other() -> None:
    sent = 0

    async def endless(wire: Wire) -> None:
        nonlocal sent
        line, _, _ = await wire.head()
        if line.startswith("GET /small"):
            await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nsmall")
            return
        await wire.send(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await wire.send(b"x" * 50_000)
            sent += 50_000

    async with http_rig(endless) as rig:
        http2 = await connect(rig, acknowledges=False)
        stuck = await http2.ask()
        while len(http2.streams[stuck].body) < 65_535:
            await http2.receive()
        http2.h2.increment_flow_control_window(1_000_000)
        for _ in range(20):
            assert (await http2.exchange((b":path", b"/small"))).body == b"small"
        await rig.until(lambda: sent > 100_000)
        held = sent
        for _ in range(20):
            assert (await http2.exchange((b":path", b"/small"))).body == b"small"
        assert sent < held + 8_000_000  # what kernels keep
        assert len(http2.streams[stuck].body) == 65_535


async def test_an_upload_that_the_app_does_not_read_waits_at_the_client() -> None:
    go = asyncio.Event()

    async def script(wire: Wire) -> None:
        line, _, _ = await wire.head()
        if not line.startswith("GET"):
            await go.wait()
            while not (await wire.reader.read(1 << 20)).endswith(b"\r\n0\r\n\r\n"):
                pass
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async with http_rig(script) as rig:
        http2 = await connect(rig)
        slow = await http2.ask((b":method", b"POST"), end=False)
        upload = asyncio.create_task(http2.send_body(slow, b"x" * 12_000_000, end=True))
        await rig.until(lambda: rig.app.held == 1 and http2.h2.local_flow_control_window(slow) == 0)
        quick = await connect(rig)
        assert (await quick.exchange()).status == 200
        assert not upload.done()
        go.set()
        await upload
        assert (await http2.answer_of(slow)).status == 200


async def test_a_stream_that_its_client_gives_up_frees_its_slot() -> None:
    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.reader.read()

    async with http_rig(script) as rig:
        http2 = await connect(rig)
        number = await http2.ask()
        await rig.until(lambda: rig.app.held == 1)
        rig.app.cold = True
        waiting = await http2.ask()
        await rig.until(lambda: rig.app.waiting == 1)
        for one in (number, waiting):
            http2.h2.reset_stream(one, CANCEL)
        await http2.flush()
        await rig.until(lambda: (rig.app.held, rig.app.waiting) == (0, 0))
        rig.app.cold = False
        assert rig.gateway.counters.aborted == 2


async def test_a_truncated_answer_cannot_seem_whole() -> None:
    script = answer(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
    async with http_rig(script) as rig:
        http2 = await connect(rig)
        found = await http2.exchange()
        assert (found.status, found.reset, found.ended) == (200, INTERNAL_ERROR, False)
        assert (await http2.exchange((b":authority", b"b.test"))).status == 404


async def test_an_answer_before_the_end_of_the_upload_is_the_last_word() -> None:
    script = answer(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n")
    async with http_rig(script, echo) as rig:
        http2 = await connect(rig)
        number = await http2.ask((b":method", b"POST"), end=False)
        found = await http2.answer_of(number)
        while found.reset is None:
            await http2.receive()
        assert (found.status, found.ended, found.reset) == (413, True, 0)
        assert (await http2.exchange()).status == 200


async def test_expect_continue_is_answered() -> None:
    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert await wire.reader.readexactly(4) == b"body"
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async with http_rig(script) as rig:
        http2 = await connect(rig)
        fields = ((b"content-length", b"4"), (b"expect", b"100-continue"))
        number = await http2.ask((b":method", b"PUT"), *fields, end=False)
        while not http2.streams[number].interims:
            await http2.receive()
        await http2.send_body(number, b"body", end=True)
        assert (await http2.answer_of(number)).status == 200


async def test_a_drain_lets_streams_end_and_takes_no_more() -> None:
    go = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.head()
        await go.wait()
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with http_rig(script) as rig:
        http2 = await connect(rig)
        number = await http2.ask()
        await rig.until(lambda: rig.app.held == 1)
        drain = asyncio.create_task(rig.gateway.drain(5.0))
        while len(http2.goaways) < 2:
            await http2.receive()
        assert http2.goaways == [((1 << 31) - 1, 0), (number, 0)]
        go.set()
        while not http2.streams[number].ended:
            await http2.receive()
        assert http2.streams[number].body == b"ok"
        await http2.until_closed()
        await drain


async def test_a_client_that_says_goaway_is_drained_like_others() -> None:
    async with http_rig(echo) as rig:
        http2 = await connect(rig)
        await http2.send_frame(GoAwayFrame(0, last_stream_id=0, error_code=0))
        assert (await http2.exchange()).status == 200
        drain = asyncio.create_task(rig.gateway.drain(5.0))
        await http2.until_closed()
        await drain
        assert len(http2.goaways) == 2


async def test_streams_take_turns() -> None:
    async def script(wire: Wire) -> None:
        while True:
            await wire.head()
            await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n" + b"x" * 60_000)

    async with http_rig(script) as rig:
        http2 = await connect(rig, acknowledges=False)
        first = [http2.streams[await http2.ask()] for _ in range(2)]
        while sum(len(stream.body) for stream in first) < 65_535:  # the connection's window
            await http2.receive()
        streams = [http2.streams[await http2.ask()] for _ in range(4)]
        await rig.until(lambda: len(rig.app.slots) == 6 and rig.app.held == 0)
        http2.h2.increment_flow_control_window(6 * 16_384)
        while sum(len(stream.body) for stream in first + streams) < 65_535 + 6 * 16_384:
            await http2.receive()
        assert all(len(stream.body) >= 16_384 for stream in streams)
        assert not any(stream.ended for stream in streams)


async def test_the_access_log_tells_of_each_stream() -> None:
    async with http_rig(echo) as rig:
        http2 = await connect(rig)
        await http2.exchange((b":path", b"/x"))
        await http2.exchange((b":authority", b"b.test"))
        told = [(r.app, r.method, r.host, r.path, r.status) for r in rig.records]
        assert told == [
            ("default/a", "GET", "a.test", "/x", 200),
            (None, "GET", "b.test", "/", 404),
        ]
