"""Apps that speak HTTP/2 (h2c), and what their clients get, whatever these speak."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from h2.errors import ErrorCodes
from hyperframe.frame import GoAwayFrame

from tabane.gateway.api import H2C
from tabane.gateway.limits import HttpLimits
from tabane.testing.http import Rig, Script, Wire, answer, http_rig
from tabane.testing.http2 import Http2Wire

GET = b"GET /x HTTP/1.1\r\nHost: a.test\r\n\r\n"
POST = ((b":method", b"POST"), (b"content-type", b"application/grpc"))


def speaking(serve: Callable[[Http2Wire], Awaitable[None]], *, acknowledges: bool = True) -> Script:
    """A script that speaks HTTP/2 until its client leaves."""

    async def script(wire: Wire) -> None:
        try:
            await serve(Http2Wire(wire, is_client=False, acknowledges=acknowledges))
        except EOFError:
            pass

    return script


async def mirror(app: Http2Wire) -> None:
    """Answer each request with its fields in order and its body, and its trailers as trailers."""
    while True:
        number = await app.accept()
        asked = await app.answer_of(number)
        told = b"".join(name + b": " + value + b"\n" for name, value in asked.fields)
        trailers = asked.trailers or [(b"x-end", b"1")]
        await app.answer(number, (b"x-app", b"1"), body=told + asked.body, trailers=trailers)


async def connect(rig: Rig, *, acknowledges: bool = True) -> Http2Wire:
    http2 = Http2Wire(await rig.connect(), is_client=True, acknowledges=acknowledges)
    await http2.flush()
    return http2


async def test_clients_of_http1_reach_them() -> None:
    async with http_rig(speaking(mirror), protocol=H2C) as rig:
        wire = await rig.connect()
        response = await wire.ask(GET)
        assert response.status == 200
        assert response.headers["x-app"] == "1"
        assert "x-end" not in response.headers
        seen = response.body.decode().splitlines()
        assert seen[:4] == [":method: GET", ":scheme: http", ":authority: a.test", ":path: /x"]
        assert {"te: trailers", "x-forwarded-for: 127.0.0.1", "via: 1.1 tabane"} < set(seen)
        await wire.send(
            b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n"
            b"Connection: x-mine\r\nX-Mine: 1\r\nX-Kept: A\r\n\r\n",
            b"5\r\nhello\r\n0\r\n\r\n",
        )
        response = await wire.receive()
        assert response.body.endswith(b"\nhello")
        assert b"\nx-kept: A\n" in response.body
        for absent in (b"x-mine", b"transfer-encoding", b"\nhost:", b"connection"):
            assert absent not in response.body
        assert rig.servers[0].accepted == 1


async def test_an_upgrade_is_not_asked_of_them() -> None:
    async with http_rig(speaking(mirror), protocol=H2C) as rig:
        wire = await rig.connect()
        upgrade = b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n"
        response = await wire.ask(GET[:-2] + upgrade)
        assert response.status == 200
        assert b"upgrade" not in response.body


async def test_trailers_pass_both_ways() -> None:
    async with http_rig(speaking(mirror), protocol=H2C) as rig:
        http2 = await connect(rig)
        number = await http2.ask(*POST, body=b"x" * 100_000, end=False)
        trailers = [(b"x-sum", b"7"), (b"tabane-token", b"evil"), (b"content-length", b"1")]
        http2.h2.send_headers(number, trailers, end_stream=True)
        found = await http2.answer_of(number)
        assert found.body.endswith(b"x" * 100_000)
        assert found.trailers == [(b"x-sum", b"7")]


async def test_both_sides_may_speak_at_the_same_time() -> None:
    async def talk(app: Http2Wire) -> None:
        number = await app.accept()
        app.h2.send_headers(number, [(b":status", b"200")])
        said = 0
        while not app.streams[number].ended:
            new = app.streams[number].body[said:]
            said += len(new)
            if new:
                await app.send_body(number, new.upper(), end=False)
            else:
                await app.receive()
        app.h2.send_headers(number, [(b"grpc-status", b"0")], end_stream=True)
        await app.flush()
        await app.accept()

    async with http_rig(speaking(talk), protocol=H2C) as rig:
        http2 = await connect(rig)
        number = await http2.ask(*POST, end=False)
        heard = http2.streams[number]
        for word in (b"one", b"two", b"three"):
            before = len(heard.body)
            await http2.send_body(number, word, end=False)
            while heard.body[before:] != word.upper():
                await http2.receive()
            rig.pass_time(100.0)  # a stream of gRPC's may be silent
        await http2.send_body(number, b"", end=True)
        assert (await http2.answer_of(number)).trailers == [(b"grpc-status", b"0")]
        assert rig.records[0].status == 200


async def test_sessions_of_all_clients_share_a_connection() -> None:
    async def count(app: Http2Wire) -> None:
        numbers = [await app.accept() for _ in range(60)]
        for number in reversed(numbers):
            await app.answer(number, body=b"%d" % number)
        await app.accept()

    async with http_rig(speaking(count), protocol=H2C) as rig:
        clients = [await connect(rig) for _ in range(2)]
        asked = [(client, await client.ask()) for client in clients for _ in range(20)]
        wires = [await rig.connect() for _ in range(20)]
        for wire in wires:
            await wire.send(GET)
        for client, number in asked:
            assert (await client.answer_of(number)).status == 200
        assert len({(await wire.receive()).body for wire in wires}) == 20
        assert rig.servers[0].accepted == 1
        assert len(rig.router.slots) == 60


async def test_another_connection_is_made_when_one_has_as_many_streams_as_the_app_takes() -> None:
    go = asyncio.Event()

    async def few(app: Http2Wire) -> None:
        app.h2.update_settings({3: 2})
        while True:
            first, second = await app.accept(), await app.accept()
            await go.wait()
            for number in (first, second):
                await app.answer(number)

    async with http_rig(speaking(few), protocol=H2C) as rig:
        http2 = await connect(rig)
        numbers = [await http2.ask() for _ in range(2)]
        await rig.until(lambda: rig.app.held == 2)
        shared = rig.gateway.pools._shared
        await rig.until(lambda: bool(shared))
        (connection,) = shared[rig.router.slots[0].pool]
        await rig.until(lambda: connection.h2.remote_settings.max_concurrent_streams == 2)
        numbers += [await http2.ask() for _ in range(2)]
        await rig.until(lambda: rig.servers[0].accepted == 2)
        go.set()
        for number in numbers:
            assert (await http2.answer_of(number)).status == 200


async def test_another_connection_is_made_when_one_has_no_numbers_left() -> None:
    async with http_rig(speaking(mirror), protocol=H2C) as rig:
        http2 = await connect(rig)
        assert (await http2.exchange()).status == 200
        (connection,) = rig.gateway.pools._shared[rig.router.slots[0].pool]
        connection.h2.highest_outbound_stream_id = (1 << 31) - 3
        for connections in (1, 2, 2):
            assert (await http2.exchange()).status == 200
            assert rig.servers[0].accepted == connections


async def test_a_client_that_gives_up_is_told_to_the_app() -> None:
    resets: list[int | None] = []

    asked = asyncio.Event()

    async def wait_for_reset(app: Http2Wire) -> None:
        number = await app.accept()
        asked.set()
        resets.append((await app.answer_of(number)).reset)
        await app.accept()

    async with http_rig(speaking(wait_for_reset), protocol=H2C) as rig:
        http2 = await connect(rig)
        number = await http2.ask(*POST, end=False)
        await asked.wait()
        http2.h2.reset_stream(number, ErrorCodes.CANCEL)
        await http2.flush()
        await rig.until(lambda: resets == [ErrorCodes.CANCEL])
        assert rig.app.held == 0
        assert rig.app.slots[0].failures == []


async def test_a_stream_that_the_app_resets_is_its_own_affair() -> None:
    async def reset(app: Http2Wire) -> None:
        for early in (True, False):
            number = await app.accept()
            if not early:
                app.h2.send_headers(number, [(b":status", b"200")])
            app.h2.reset_stream(number, ErrorCodes.INTERNAL_ERROR)
        await mirror(app)

    async with http_rig(speaking(reset), protocol=H2C) as rig:
        http2 = await connect(rig)
        first = await http2.exchange()
        assert (first.status, b"INTERNAL_ERROR" in first.body) == (502, True)
        second = await http2.exchange()
        assert (second.status, second.reset) == (200, ErrorCodes.INTERNAL_ERROR)
        assert (await http2.exchange()).status == 200
        assert all(slot.failures == [] for slot in rig.app.slots)
        assert rig.servers[0].accepted == 1


async def test_a_refused_stream_is_sent_again_whatever_its_method() -> None:
    refused = 0

    async def refuse(app: Http2Wire) -> None:
        nonlocal refused
        if not refused:
            number = await app.accept()
            await app.answer_of(number)
            app.h2.reset_stream(number, ErrorCodes.REFUSED_STREAM)
            refused += 1
        await mirror(app)

    async with http_rig(speaking(refuse), protocol=H2C) as rig:
        http2 = await connect(rig)
        found = await http2.exchange(*POST, body=b"once")
        assert (found.status, refused) == (200, 1)
        assert found.body.endswith(b"once")
        assert rig.gateway.counters.retries == 1


async def test_an_app_that_goes_ends_its_streams_and_gets_no_more() -> None:
    go = asyncio.Event()
    served: list[int] = []

    async def leave(app: Http2Wire) -> None:
        if served:
            return await mirror(app)
        first, second = await app.accept(), await app.accept()
        served.append(first)
        await app.send_frame(GoAwayFrame(0, last_stream_id=first, error_code=0))
        await go.wait()
        await app.answer(first, body=b"first")
        assert second > first
        await app.accept()

    async with http_rig(speaking(leave), protocol=H2C) as rig:
        http2 = await connect(rig)
        first = await http2.ask(*POST, body=b"1")
        await rig.until(lambda: rig.app.held == 1)
        second = await http2.ask(*POST, body=b"2")
        found = await http2.answer_of(second)
        assert (found.status, found.body[-1:]) == (200, b"2")
        assert (await http2.exchange()).status == 200
        go.set()
        assert (await http2.answer_of(first)).body == b"first"
        assert rig.servers[0].accepted == 2


async def test_a_connection_that_breaks_is_survived_where_that_is_right() -> None:
    broken = 0

    async def once(app: Http2Wire) -> None:
        nonlocal broken
        if broken:
            return await mirror(app)
        await app.answer(await app.accept())
        await app.accept()
        broken += 1
        app.wire.reset()

    async with http_rig(speaking(once), protocol=H2C) as rig:
        http2 = await connect(rig)
        assert (await http2.exchange()).status == 200
        assert (await http2.exchange()).status == 200
        assert (broken, rig.app.slots[1].failures) == (1, [])
        broken = 0
        rig.gateway.pools.close_gone(frozenset({rig.app.slots[0].pool}))
        rig.gateway.pools.close_gone(frozenset())
        assert (await http2.exchange(*POST, body=b"x")).status == 200
        found = await http2.exchange((b":method", b"POST"), body=b"x")
        assert (found.status, b"the app broke off" in found.body) == (502, True)


async def test_what_is_no_http2_is_told_so() -> None:
    async with http_rig(answer(b"HTTP/1.1 400 Bad Request\r\n\r\n"), protocol=H2C) as rig:
        wire = await rig.connect()
        response = await wire.ask(b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 0\r\n\r\n")
        assert response.status == 502
        assert rig.app.slots[0].failures


async def test_an_answer_that_nobody_reads_waits_at_the_app() -> None:
    async def endless(app: Http2Wire) -> None:
        while True:
            number = await app.accept()
            path = dict(app.streams[number].fields)[b":path"]
            if path == b"/small":
                await app.answer(number, body=b"small")
                continue
            app.h2.send_headers(number, [(b":status", b"200")])
            while (window := app.h2.local_flow_control_window(number)) > 0:
                app.h2.send_data(number, b"x" * min(window, 16_384))
                await app.flush()
                windows.append(window)

    windows: list[int] = []
    async with http_rig(speaking(endless), protocol=H2C) as rig:
        http2 = await connect(rig, acknowledges=False)
        stuck = await http2.ask()
        while len(http2.streams[stuck].body) < 65_535:
            await http2.receive()
        for _ in range(5):
            http2.h2.increment_flow_control_window(100)
            assert (await http2.exchange((b":path", b"/small"))).body == b"small"
        stream = next(iter(rig.gateway.pools._shared.values()))[0].streams[1]
        assert len(http2.streams[stuck].body) == 65_535
        assert stream.connection.h2.remote_flow_control_window(1) >= 0


async def test_kept_connections_are_closed_when_unused_and_when_their_pool_is_gone() -> None:
    async with http_rig(speaking(mirror), protocol=H2C) as rig:
        http2 = await connect(rig)
        for forget in ("unused", "gone"):
            assert (await http2.exchange()).status == 200
            assert len(rig.gateway.pools) == 1
            if forget == "unused":
                rig.pass_time(HttpLimits().upstream_idle_s + 1)
            else:
                rig.router.gone = frozenset({rig.app.slots[0].pool})
                rig.gateway.kick()
            await rig.until(lambda: len(rig.gateway.pools) == 0)


async def test_an_instance_that_ended_with_its_network_is_broken_off() -> None:
    asked = asyncio.Event()

    async def hang(app: Http2Wire) -> None:
        await app.accept()
        asked.set()
        await app.accept()

    async with http_rig(speaking(hang), protocol=H2C) as rig:
        http2 = await connect(rig)
        number = await http2.ask((b":method", b"POST"), body=b"x")
        await asked.wait()
        rig.gateway.break_off(frozenset({rig.app.slots[0].pool}), complete=True)
        found = await http2.answer_of(number)
        assert (found.status, b"its instance ended" in found.body) == (502, True)


async def test_gateways_speak_http2_with_each_other_for_such_apps() -> None:
    async with http_rig(speaking(mirror), forward=True, protocol=H2C) as rig:
        rig.router.named[b"g"] = rig.app
        http2 = await connect(rig)
        fields = ((b"tabane-generation", b"g"), (b"tabane-token", b"t"))
        found = await http2.exchange(*fields, (b"x-forwarded-for", b"192.0.2.1"))
        assert b"\nx-forwarded-for: 192.0.2.1\n" in found.body
        assert b"tabane-" not in found.body
        assert found.trailers == [(b"x-end", b"1")]
