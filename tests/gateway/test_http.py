"""What a well-behaved client and a well-behaved app get from the gateway."""

from __future__ import annotations

import asyncio

from tabane.errors import Busy, NotFound, Unavailable
from tabane.testing.http import Wire, answer, echo, http_rig

GET = b"GET /x?y=1 HTTP/1.1\r\nHost: a.test\r\n\r\n"


async def test_a_request_reaches_the_app_and_its_answer_the_client() -> None:
    async with http_rig(echo) as rig:
        wire = await rig.connect()
        response = await wire.ask(GET)
        assert response.status == 200
        assert response.body.startswith(b"GET /x?y=1 HTTP/1.1\r\nHost: a.test\r\n")
        assert rig.router.asked == [("a.test", "/x")]
        assert [slot.first_bytes for slot in rig.router.slots] == [1]


async def test_both_connections_are_kept() -> None:
    async with http_rig(echo) as rig:
        wire = await rig.connect()
        for _ in range(5):
            assert (await wire.ask(GET)).status == 200
        assert rig.servers[0].accepted == 1
        assert len(rig.router.slots) == 5
        assert rig.gateway.counters.requests == 5
        assert rig.gateway.counters.responses[2] == 5


async def test_the_app_is_told_who_asks() -> None:
    async with http_rig(echo) as rig:
        wire = await rig.connect()
        seen = (await wire.ask(GET)).body.decode()
        assert "\r\nX-Forwarded-For: 127.0.0.1\r\n" in seen
        assert "\r\nX-Forwarded-Proto: http\r\n" in seen
        assert "\r\nX-Forwarded-Host: a.test\r\n" in seen
        assert "\r\nForwarded: for=127.0.0.1;host=a.test;proto=http\r\n" in seen
        assert "\r\nVia: 1.1 tabane\r\n" in seen


async def test_what_others_forwarded_stays_before_our_word() -> None:
    async with http_rig(echo) as rig:
        wire = await rig.connect()
        request = (
            b"GET / HTTP/1.1\r\nHost: a.test:8080\r\nX-Forwarded-For: 192.0.2.1\r\n"
            b"Forwarded: for=192.0.2.1\r\nX-Forwarded-Proto: https\r\n"
            b"X_Forwarded_Host: evil\r\n\r\n"
        )
        seen = (await wire.ask(request)).body.decode()
        assert "\r\nX-Forwarded-For: 192.0.2.1, 127.0.0.1\r\n" in seen
        assert '\r\nForwarded: for=192.0.2.1, for=127.0.0.1;host="a.test:8080";' in seen
        assert "\r\nX-Forwarded-Proto: http\r\n" in seen
        assert "evil" not in seen


async def test_fields_of_one_hop_end_there() -> None:
    script = answer(
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Secret\r\nX-Secret: 1\r\nKeep-Alive: 5\r\n"
        b"Tabane-Refused: no\r\nX-Open: 2\r\nContent-Length: 0\r\n\r\n"
    )
    async with http_rig(echo, script) as rig:
        wire = await rig.connect()
        request = (
            b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: X-Mine, close\r\nX-Mine: 1\r\n"
            b"TE: gzip\r\n"
            b"Proxy-Authorization: x\r\nTabane-Token: t\r\ntabane_generation: g\r\n"
            b"X-Real-IP: 6.6.6.6\r\nx_real_ip: 6.6.6.6\r\nX-Forwarded-Port: 666\r\n"
            b"X-Forwarded-Server: evil\r\nX_Forwarded_Ssl: on\r\nTabane-Whatever: evil\r\n"
            b"X-Other: 2\r\n\r\n"
        )
        seen = (await wire.ask(request)).body.lower()
        unwanted = (b"x-mine", b"te:", b"proxy-", b"tabane-", b"tabane_", b"connection")
        for name in (*unwanted, b"x-real", b"x_", b"x-forwarded-port", b"x-forwarded-server"):
            assert b"\r\n" + name not in seen
        assert b"\r\nx-other: 2\r\n" in seen
        assert await wire.at_end()
        wire = await rig.connect()
        response = await wire.ask(GET)
        assert response.headers == {"x-open": "2", "content-length": "0"}


async def test_hosts_are_compared_as_names() -> None:
    async with http_rig(echo) as rig:
        wire = await rig.connect()
        for host in (b"A.Test", b"a.test:80", b"a.test.", b"a.test:"):
            assert (await wire.ask(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host)).status == 200
        absolute = b"GET http://A.test/q?r HTTP/1.1\r\nHost: b.test\r\n\r\n"
        seen = (await wire.ask(absolute)).body
        assert seen.startswith(b"GET /q?r HTTP/1.1\r\nHost: A.test\r\n")
        seen = (await wire.ask(b"OPTIONS * HTTP/1.1\r\nHost: a.test\r\n\r\n")).body
        assert seen.startswith(b"OPTIONS * HTTP/1.1\r\n")


async def test_an_unknown_host_gets_404_and_the_connection_goes_on() -> None:
    async with http_rig(echo) as rig:
        wire = await rig.connect()
        response = await wire.ask(b"GET / HTTP/1.1\r\nHost: b.test\r\n\r\n")
        assert response.status == 404
        assert b"no app has the host name 'b.test'" in response.body
        assert (await wire.ask(GET)).status == 200
        head = await wire.ask(b"HEAD / HTTP/1.1\r\nHost: b.test\r\n\r\n", no_body=True)
        assert head.status == 404
        assert (await wire.ask(GET)).status == 200


async def test_refusals_carry_reason_and_retry_after() -> None:
    async with http_rig(echo) as rig:
        wire = await rig.connect()
        for error, status, retry_after in (
            (Busy("the queue is full", retry_after_s=2.2), 503, "3"),
            (Unavailable("it exits at once"), 503, "1"),
            (NotFound("the app is gone"), 404, None),
        ):
            rig.app.error = error
            response = await wire.ask(GET)
            assert response.status == status
            assert response.headers.get("retry-after") == retry_after
            assert error.message.encode() in response.body
        rig.app.error = None
        assert (await wire.ask(GET)).status == 200


async def test_a_cold_app_is_waited_for() -> None:
    async with http_rig(echo) as rig:
        rig.app.cold = True
        wire = await rig.connect()
        await wire.send(GET)
        await rig.until(lambda: rig.app.waiting == 1)
        rig.app.cold = False
        assert (await wire.receive()).status == 200


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with http_rig(echo, concurrency=1) as rig:
        wire = await rig.connect()
        requests = [b"GET /%d HTTP/1.1\r\nHost: a.test\r\n\r\n" % n for n in range(50)]
        requests[7] = b"GET /7 HTTP/1.1\r\nHost: nowhere.test\r\n\r\n"
        requests[9] = b"POST /9 HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\n\r\nhello"
        requests[11] = (
            b"PUT /11 HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"3\r\nabc\r\n0\r\nTrailer: x\r\n\r\n"
        )
        await wire.send(b"".join(requests))
        for number in range(50):
            response = await wire.receive()
            assert response.status == (404 if number == 7 else 200)
            assert b"/%d HTTP" % number in response.body or number == 7
        assert rig.app.held == 0


async def test_many_refused_pipelined_requests_need_no_deep_stack() -> None:
    async with http_rig(echo) as rig:
        wire = await rig.connect()
        await wire.send(b"GET / HTTP/1.1\r\nHost: no.test\r\n\r\n" * 3_000)
        for _ in range(3_000):
            assert (await wire.receive()).status == 404


async def test_http_1_0_clients_get_what_they_understand() -> None:
    chunked = answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
    async with http_rig(echo, chunked, echo) as rig:
        wire = await rig.connect()
        request = b"GET / HTTP/1.0\r\nHost: a.test\r\nConnection: keep-alive\r\n\r\n"
        response = await wire.ask(request)
        assert response.headers["connection"] == "keep-alive"
        response = await wire.ask(request)
        assert response.headers == {"connection": "close"}
        assert response.body == b"abc"
        wire = await rig.connect()
        response = await wire.ask(b"GET / HTTP/1.0\r\nHost: a.test\r\n\r\n")
        assert response.headers["connection"] == "close"
        assert await wire.at_end()


async def test_bodies_of_the_three_kinds_come_through() -> None:
    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nabc", b"def")
        await wire.head()
        await wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n")
        await wire.send(b"3\r\ndef\r\n0\r\nX-Trailer: 1\r\n\r\n")
        await wire.head()
        await wire.send(b"HTTP/1.1 200 OK\r\n\r\nabc", b"def")

    async with http_rig(script) as rig:
        wire = await rig.connect()
        framing = []
        for _ in range(3):
            response = await wire.ask(GET)
            assert response.body == b"abcdef"
            framing.append(sorted(response.headers))
        assert framing == [["content-length"], ["transfer-encoding"], ["transfer-encoding"]]
        assert rig.servers[0].accepted == 1


async def test_uploads_of_both_kinds_arrive() -> None:
    async with http_rig(echo) as rig:
        wire = await rig.connect()
        sized = b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 300000\r\n\r\n"
        await wire.send(sized, b"x" * 150_000, b"y" * 150_000)
        response = await wire.receive()
        assert response.body.endswith(b"\r\n\r\n" + b"x" * 150_000 + b"y" * 150_000)
        await wire.send(b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(10):
            await wire.send(b"4e20\r\n" + b"z" * 20_000 + b"\r\n")
        await wire.send(b"0\r\n\r\n")
        response = await wire.receive()
        assert response.body.endswith(b"\r\n\r\n" + b"z" * 200_000)
        assert b"Transfer-Encoding: chunked" in response.body


async def test_responses_without_body_do_not_confuse() -> None:
    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        await wire.head()
        await wire.send(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 100\r\n\r\n")
        await wire.head()
        await wire.send(b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n")
        await wire.head()
        await wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        await echo(wire)

    async with http_rig(script) as rig:
        wire = await rig.connect()
        head = GET.replace(b"GET", b"HEAD")
        response = await wire.ask(head, no_body=True)
        assert response.headers == {"content-length": "100"}
        response = await wire.ask(GET, no_body=True)
        assert response.headers == {"content-length": "100"}
        assert (await wire.ask(GET)).headers == {}
        assert (await wire.ask(head, no_body=True)).status == 200
        assert (await wire.ask(GET)).status == 200
        assert rig.servers[0].accepted == 1


async def test_interim_responses_pass_and_do_not_count() -> None:
    script = answer(
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    )
    async with http_rig(script) as rig:
        wire = await rig.connect()
        response = await wire.ask(GET)
        assert (response.status, response.headers) == (103, {"link": "</a>"})
        assert (await wire.receive()).status == 200
        assert rig.router.slots[0].first_bytes == 1
        wire = await rig.connect()
        response = await wire.ask(b"GET / HTTP/1.0\r\nHost: a.test\r\n\r\n")
        assert response.status == 200


EXPECTING = b"PUT / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"


async def test_expect_continue_is_the_apps_to_answer() -> None:
    async def script(wire: Wire) -> None:
        _, headers, _ = await wire.head()
        assert headers["expect"] == "100-continue"
        await wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert await wire.reader.readexactly(4) == b"body"
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    refuses = answer(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
    async with http_rig(script, refuses) as rig:
        wire = await rig.connect()
        assert (await wire.ask(EXPECTING)).status == 100
        assert (await wire.ask(b"body")).status == 200
        wire = await rig.connect()
        response = await wire.ask(EXPECTING)
        assert response.status == 413
        assert response.headers["connection"] == "close"
        assert await wire.at_end()


async def test_an_app_that_ignores_expect_gets_the_body_all_the_same() -> None:
    async def script(wire: Wire) -> None:
        await wire.head()
        assert await wire.reader.readexactly(4) == b"body"
        await wire.send(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
        )

    async with http_rig(script) as rig:
        wire = await rig.connect()
        await wire.send(EXPECTING)
        await rig.until(lambda: rig.app.held == 1 and rig.gateway.pools.idle == 0)
        await rig.until(lambda: rig.servers[0].accepted == 1)
        rig.pass_time(2.0)
        assert (await wire.receive()).status == 100
        assert (await wire.ask(b"body")).status == 200


async def test_a_slot_is_taken_for_the_time_of_its_request_only() -> None:
    go = asyncio.Event()

    async def script(wire: Wire) -> None:
        while True:
            await wire.head()
            await go.wait()
            await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async with http_rig(script, concurrency=1) as rig:
        first, second = await rig.connect(), await rig.connect()
        await first.send(GET)
        await rig.until(lambda: rig.app.held == 1)
        await second.send(GET)
        await rig.until(lambda: rig.app.waiting == 1)
        go.set()
        assert (await first.receive()).status == 200
        assert (await second.receive()).status == 200
        assert rig.app.held == 0


async def test_the_access_log_tells_of_each_request() -> None:
    async with http_rig(echo) as rig:
        wire = await rig.connect()
        await wire.ask(GET)
        await wire.ask(b"GET / HTTP/1.1\r\nHost: b.test\r\n\r\n")
        told = [(r.app, r.method, r.host, r.path, r.status, r.peer) for r in rig.records]
        assert told == [
            ("default/a", "GET", "a.test", "/x", 200, "127.0.0.1"),
            (None, "GET", "b.test", "/", 404, "127.0.0.1"),
        ]
