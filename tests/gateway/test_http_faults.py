"""Clients that leave and apps that break, at every step: nothing hangs, no slot is lost.

The rig itself asserts, at the end of each test, that each slot was released exactly once.
"""

from __future__ import annotations

import asyncio
import socket

import pytest

from tabane.errors import TimedOut
from tabane.gateway.limits import HttpLimits
from tabane.testing.http import Rig, Script, Wire, answer, echo, http_rig

GET = b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 4\r\n\r\nbody"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def silent(wire: Wire) -> None:
    """Read everything, answer nothing."""
    await wire.reader.read()


async def deaf(wire: Wire) -> None:
    """Read nothing, answer nothing."""
    await asyncio.Event().wait()


# The client leaves.


@pytest.mark.parametrize("how", ["close", "reset", "half_close"])
@pytest.mark.parametrize("request_bytes", [GET, POST[:-2]], ids=["whole", "in its body"])
async def test_a_client_that_leaves_the_queue_frees_its_place(
    how: str, request_bytes: bytes
) -> None:
    async with http_rig(echo) as rig:
        rig.app.cold = True
        wire = await rig.connect()
        await wire.send(request_bytes)
        await rig.until(lambda: rig.app.waiting == 1)
        getattr(wire, how)()
        await rig.until(lambda: rig.app.waiting == 0)
        await rig.settle()
        rig.app.cold = False
        assert rig.router.slots == []
        assert rig.servers[0].accepted == 0


async def test_a_client_that_leaves_while_nobody_reads_is_noticed() -> None:
    async with http_rig(echo) as rig:
        rig.app.cold = True
        wire = await rig.connect()
        await wire.send(b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 900000\r\n\r\n")
        await wire.send(b"x" * 100_000)
        await rig.until(lambda: rig.app.waiting == 1)
        await rig.until(lambda: any(c.is_deaf for c in rig.gateway.connections))
        wire.close()
        await wire.writer.wait_closed()
        rig.gateway.sweep()
        await rig.until(lambda: rig.app.waiting == 0)


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("request_bytes", [GET, POST[:-2]], ids=["whole", "in its body"])
async def test_a_client_that_leaves_a_busy_app_frees_its_slot(
    how: str, request_bytes: bytes
) -> None:
    async with http_rig(silent) as rig:
        wire = await rig.connect()
        await wire.send(request_bytes)
        await rig.until(lambda: rig.servers[0].accepted == 1 and rig.app.held == 1)
        getattr(wire, how)()
        await rig.until(lambda: rig.app.held == 0)
        async with asyncio.timeout(60):
            await rig.servers[0].ended.wait()


async def test_a_client_that_leaves_while_the_gateway_connects_frees_its_slot() -> None:
    backlogged = socket.socket()
    backlogged.bind(("127.0.0.1", 0))
    backlogged.listen(0)
    fillers = [socket.socket() for _ in range(4)]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(backlogged.getsockname())
    try:
        async with http_rig(echo) as rig:
            rig.app.targets[0] = backlogged.getsockname()
            wire = await rig.connect()
            await wire.send(GET)
            await rig.until(lambda: rig.app.held == 1)
            wire.close()
            await rig.until(lambda: rig.app.held == 0)
    finally:
        for sock in (backlogged, *fillers):
            sock.close()


async def test_a_client_that_leaves_in_the_answer_frees_its_slot() -> None:
    async def endless(wire: Wire) -> None:
        await wire.head()
        await wire.send(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await wire.send(b"x" * 10_000)

    async with http_rig(endless) as rig:
        wire = await rig.connect()
        await wire.send(GET)
        await wire.head()
        wire.reset()
        await rig.until(lambda: rig.app.held == 0)
        async with asyncio.timeout(60):
            await rig.servers[0].ended.wait()


# The app breaks.


async def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


async def test_a_refused_connection_is_tried_elsewhere_whatever_the_method() -> None:
    async with http_rig(echo) as rig:
        rig.app.lead_to(("127.0.0.1", await closed_port()), ("127.0.0.1", rig.servers[0].port))
        wire = await rig.connect()
        response = await wire.ask(POST)
        assert response.body.endswith(b"body")
        assert [len(slot.failures) for slot in rig.router.slots] == [1, 0]
        assert rig.router.slots[0].broke_off == []
        assert rig.gateway.counters.retries == 1


async def test_tries_end() -> None:
    async with http_rig(echo, limits=HttpLimits(max_tries=3)) as rig:
        rig.app.lead_to(("127.0.0.1", await closed_port()))
        wire = await rig.connect()
        response = await wire.ask(GET)
        assert response.status == 503
        assert "retry-after" in response.headers
        assert b"the app cannot be reached" in response.body
        assert len(rig.router.slots) == 3


async def test_tries_end_with_the_start_timeout() -> None:
    async with http_rig(echo, start_timeout_s=5.0) as rig:
        rig.app.lead_to(("127.0.0.1", await closed_port()))
        rig.app.cold = True
        wire = await rig.connect()
        await wire.send(GET)
        await rig.until(lambda: rig.app.waiting == 1)
        rig.clock.advance(6.0)
        rig.app.cold = False
        assert (await wire.receive()).status == 503
        assert len(rig.router.slots) == 1


def closes(wire: Wire) -> None:
    wire.close()


def resets(wire: Wire) -> None:
    wire.reset()


def breaks(how: str) -> Script:
    async def script(wire: Wire) -> None:
        await wire.head()
        getattr(wire, how)()

    return script


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_an_idempotent_request_goes_elsewhere_when_no_answer_came(how: str) -> None:
    async with http_rig(breaks(how), echo) as rig:
        wire = await rig.connect()
        put = POST.replace(b"POST", b"PUT")
        assert (await wire.ask(put)).body.endswith(b"\r\n\r\nbody")
        assert [len(slot.broke_off) for slot in rig.router.slots] == [1, 0]


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_another_request_is_not_sent_twice(how: str) -> None:
    async with http_rig(breaks(how), echo) as rig:
        wire = await rig.connect()
        response = await wire.ask(POST)
        assert response.status == 502
        assert rig.servers[1].accepted == 0
        assert (await wire.ask(POST)).status == 200


async def test_a_body_that_is_not_whole_any_more_is_not_sent_twice() -> None:
    async def reads_much(wire: Wire) -> None:
        await wire.head()
        await wire.reader.readexactly(200_000)
        wire.reset()

    async with http_rig(reads_much, echo) as rig:
        wire = await rig.connect()
        await wire.send(b"PUT / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 200000\r\n\r\n")
        await wire.send(b"x" * 200_000)
        assert (await wire.receive()).status == 502
        assert rig.servers[1].accepted == 0


async def test_a_request_that_got_a_byte_of_an_answer_is_not_sent_twice() -> None:
    async with http_rig(answer(b"HTTP/1.1 2"), echo) as rig:
        wire = await rig.connect()
        assert (await wire.ask(GET)).status == 502
        assert rig.servers[1].accepted == 0


async def test_a_kept_connection_that_was_closed_is_replaced() -> None:
    async def once(wire: Wire) -> None:
        await wire.head()
        await wire.send(OK)
        await wire.head()

    async with http_rig(once) as rig:
        wire = await rig.connect()
        assert (await wire.ask(GET)).status == 200
        assert (await wire.ask(GET)).status == 200
        assert rig.servers[0].accepted == 2
        assert [slot.failures for slot in rig.router.slots] == [[], []]


async def test_a_post_does_not_go_into_a_connection_that_the_app_closed() -> None:
    async with http_rig(answer(OK)) as rig:
        wire = await rig.connect()
        for _ in range(20):
            assert (await wire.ask(POST)).status == 200
        assert rig.servers[0].accepted == 20


@pytest.mark.parametrize(
    "sent",
    [
        b"garbage\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"HTTP/1.1 999 Odd\r\n\r\n",
        b"HTTP/1.1 200 \x01\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX : a\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"[:-6] + b"\x00",
    ],
)
async def test_an_answer_that_is_not_http_becomes_502(sent: bytes) -> None:
    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(sent)
        await wire.reader.read()

    async with http_rig(script) as rig:
        wire = await rig.connect()
        response = await wire.ask(GET)
        assert response.status == 502
        assert len(rig.router.slots[0].broke_off) == 1


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n",
    ],
)
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
async def test_a_truncated_answer_is_seen_as_one(sent: bytes, version: bytes) -> None:
    async with http_rig(answer(sent)) as rig:
        wire = await rig.connect()
        await wire.send(GET.replace(b"1.1", version))
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await wire.receive()
        await rig.settle()
        assert rig.gateway.counters.aborted == 1


async def test_an_answer_until_the_close_is_cut_by_a_reset() -> None:
    go = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(b"HTTP/1.1 200 OK\r\n\r\nabc")
        await go.wait()
        wire.reset()

    async with http_rig(script) as rig:
        wire = await rig.connect()
        await wire.send(GET)
        await wire.head()
        go.set()
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await wire._chunks()


@pytest.mark.parametrize(
    "behind", [b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", b"x", b"\r\n"]
)
async def test_what_follows_an_answer_reaches_nobody(behind: bytes) -> None:
    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(OK + behind)
        await wire.reader.read()

    async with http_rig(script, echo) as rig:
        wire = await rig.connect()
        assert (await wire.ask(GET)).body == b"ok"
        assert b"GET" in (await wire.ask(GET)).body
        assert rig.gateway.pools.idle == 1


async def test_bytes_on_an_idle_connection_close_it() -> None:
    later = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(OK)
        await later.wait()
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
        await wire.reader.read()

    async with http_rig(script) as rig:
        wire = await rig.connect()
        assert (await wire.ask(GET)).body == b"ok"
        assert rig.gateway.pools.idle == 1
        later.set()
        await rig.until(lambda: len(rig.gateway.pools) == 0)
        assert rig.gateway.pools.idle == 0


async def test_an_app_that_never_answers_gets_504() -> None:
    async with http_rig(silent, response_timeout_s=30.0) as rig:
        wire = await rig.connect()
        await wire.send(GET)
        await rig.until(lambda: rig.servers[0].accepted == 1 and rig.app.held == 1)
        await rig.until(lambda: len(rig.gateway.pools) == 1)
        rig.pass_time(29.0)
        assert rig.app.held == 1
        rig.pass_time(2.0)
        response = await wire.receive()
        assert response.status == 504
        assert b"within 30 s" in response.body
        assert await in_use(rig, wire)


async def in_use(rig: Rig, wire: Wire) -> bool:
    """The client's connection still takes requests."""
    return (await wire.ask(b"GET / HTTP/1.1\r\nHost: no.test\r\n\r\n")).status == 404


async def test_a_router_that_never_answers_gets_503() -> None:
    async with http_rig(echo, start_timeout_s=10.0) as rig:
        rig.app.cold = True
        wire = await rig.connect()
        await wire.send(GET)
        await rig.until(lambda: rig.app.waiting == 1)
        rig.pass_time(20.0)
        assert (await wire.receive()).status == 503
        assert rig.app.waiting == 0


async def test_a_start_that_takes_too_long_gets_503_with_the_reason() -> None:
    async with http_rig(echo) as rig:
        rig.app.error = TimedOut("default/a did not become ready within 10 s", retry_after_s=5)
        wire = await rig.connect()
        response = await wire.ask(GET)
        assert (response.status, response.headers["retry-after"]) == (503, "5")


@pytest.mark.parametrize("answers", [True, False])
async def test_an_early_answer_ends_the_upload(answers: bool) -> None:
    """The app answers (or not) and closes while a large body is on its way."""

    async def script(wire: Wire) -> None:
        await wire.head()
        if answers:
            await wire.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 5\r\n\r\nlarge")
        await wire.reader.read(100_000)

    async with http_rig(script) as rig:
        wire = await rig.connect()
        await wire.send(b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 90000000\r\n\r\n")
        await wire.send(b"x" * 200_000)
        response = await wire.receive()
        assert response.status == (413 if answers else 502)
        assert response.headers["connection"] == "close"
        await wire.wait_reset()


async def test_a_body_with_broken_chunks_gets_400_and_the_app_sees_a_cut() -> None:
    async with http_rig(silent) as rig:
        wire = await rig.connect()
        await wire.send(b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n")
        await rig.until(lambda: rig.app.held == 1)
        response = await wire.ask(b"zz\r\n")
        assert response.status == 400
        assert await wire.at_end()
        async with asyncio.timeout(60):
            await rig.servers[0].ended.wait()


async def test_what_an_app_says_before_it_is_asked_is_not_passed_on() -> None:
    async def rash(wire: Wire) -> None:
        await wire.send(b"not HTTP at all\n")
        await wire.reader.read()

    async with http_rig(rash) as rig:
        for _ in range(20):
            wire = await rig.connect()
            answered = await wire.ask(GET)
            assert answered.status == 502
            assert b"the app's answer is not HTTP/1.1" in answered.body
        await rig.until(lambda: rig.app.held == 0)
