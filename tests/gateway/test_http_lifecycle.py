"""Draining, closing, pools that end, and the port between gateways."""

from __future__ import annotations

import asyncio

import pytest

from tabane.errors import Stale, Unauthenticated
from tabane.testing.gateway import FakeApp
from tabane.testing.http import Rig, Script, Wire, echo, http_rig

GET = b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def waits_for(go: asyncio.Event) -> Script:
    async def script(wire: Wire) -> None:
        while True:
            await wire.head()
            await go.wait()
            await wire.send(OK)

    return script


async def test_a_drain_lets_requests_end_and_closes_the_rest() -> None:
    go = asyncio.Event()
    async with http_rig(waits_for(go)) as rig:
        idle, busy, half = await rig.connect(), await rig.connect(), await rig.connect()
        await idle.ask(b"GET / HTTP/1.1\r\nHost: no.test\r\n\r\n")
        await busy.send(GET)
        await half.send(GET[:-2])
        await rig.until(lambda: rig.app.held == 1 and in_head(rig) == 1)
        drained = asyncio.ensure_future(rig.gateway.drain(20.0))
        assert await idle.at_end()
        with pytest.raises(ConnectionError):
            await rig.connect()
        await half.send(GET[-2:])
        go.set()
        for wire in (busy, half):
            response = await wire.receive()
            assert (response.status, response.headers["connection"]) == (200, "close")
            assert await wire.at_end()
        for wire in rig.wires:
            wire.close()
        async with asyncio.timeout(60):
            await drained
        assert not rig.gateway.connections


def in_head(rig: Rig) -> int:
    return sum(connection.reader.in_head for connection in rig.gateway.connections)


async def test_a_drain_ends_at_its_deadline() -> None:
    async with http_rig(waits_for(asyncio.Event())) as rig:
        wire = await rig.connect()
        await wire.send(GET)
        await rig.until(lambda: rig.app.held == 1)
        await rig.gateway.drain(0.01)
        assert rig.app.held == 0
        await wire.wait_reset()


async def test_closing_twice_is_closing_once() -> None:
    async with http_rig(echo) as rig:
        wire = await rig.connect()
        await wire.ask(GET)
        rig.gateway.abort()
        await rig.gateway.aclose()
        await rig.gateway.aclose()
        await wire.wait_reset()
        assert len(rig.gateway.pools) == 0


async def test_closing_with_sessions_in_every_stage_frees_their_slots() -> None:
    go = asyncio.Event()
    async with http_rig(waits_for(go), concurrency=2) as rig:
        wires = [await rig.connect() for _ in range(4)]
        for wire in wires:
            await wire.send(GET)
        await rig.until(lambda: rig.app.held == 2 and rig.app.waiting == 2)
        await rig.gateway.aclose()
        await rig.settle()
        assert rig.app.waiting == 0


async def test_pools_that_are_gone_are_closed_at_once() -> None:
    async with http_rig(echo) as rig:
        wire = await rig.connect()
        await wire.ask(GET)
        rig.router.gone = frozenset({"another"})
        rig.gateway.kick()
        assert rig.gateway.pools.idle == 1
        rig.router.gone = frozenset({rig.router.slots[0].pool})
        rig.gateway.kick()
        assert rig.gateway.pools.idle == 0
        await rig.until(lambda: len(rig.gateway.pools) == 0)
        await wire.ask(GET)
        assert rig.gateway.pools.idle == 0


async def test_the_sweep_asks_for_pools_that_are_gone() -> None:
    async with http_rig(echo) as rig:
        wire = await rig.connect()
        await wire.ask(GET)
        rig.router.gone = frozenset({rig.router.slots[0].pool})
        rig.pass_time(1.0)
        assert rig.gateway.pools.idle == 0


async def test_the_sweep_runs_by_itself() -> None:
    async with http_rig(echo) as rig:
        wire = await rig.connect()
        await rig.until(lambda: len(rig.gateway.connections) == 1)
        for _ in range(3):
            rig.clock.advance(100.0)
            await asyncio.sleep(0)
        assert await wire.at_end()


# Between gateways.

FORWARDED = (
    b"GET / HTTP/1.1\r\nHost: a.test\r\nX-Forwarded-For: 192.0.2.7\r\nForwarded: for=192.0.2.7\r\n"
    b"Via: 1.1 tabane\r\nTabane-Token: t\r\nTabane-Generation: %b\r\n\r\n"
)


async def test_another_gateway_names_the_slot_and_the_client() -> None:
    async with http_rig(echo, forward=True) as rig:
        rig.router.named[b"g1"] = rig.app
        wire = await rig.connect()
        seen = (await wire.ask(FORWARDED % b"g1")).body.lower()
        assert b"\r\nx-forwarded-for: 192.0.2.7\r\n" in seen
        assert b"\r\nforwarded: for=192.0.2.7\r\n" in seen
        assert seen.count(b"via: ") == 1
        assert b"tabane-" not in seen
        assert rig.router.asked == []


async def test_another_gateway_may_leave_the_choice_here() -> None:
    async with http_rig(echo, forward=True) as rig:
        rig.app.cold = True
        wire = await rig.connect()
        await wire.send(b"GET / HTTP/1.1\r\nHost: a.test\r\nTabane-App: default/a\r\n\r\n")
        await rig.until(lambda: rig.app.waiting == 1)
        rig.app.cold = False
        assert (await wire.receive()).status == 200


async def test_refusals_between_gateways_say_that_nothing_reached_the_app() -> None:
    async with http_rig(echo, forward=True) as rig:
        rig.router.named[b"old"] = Stale("generation old is not here any more")
        rig.router.named[b"bad"] = Unauthenticated("who are you")
        wire = await rig.connect()
        response = await wire.ask(FORWARDED % b"old")
        assert (response.status, response.headers["tabane-refused"]) == (503, "stale")
        response = await wire.ask(FORWARDED % b"bad")
        assert response.status == 401
        assert "tabane-refused" not in response.headers
        response = await wire.ask(FORWARDED % b"unknown")
        assert response.status == 404


async def test_a_request_that_another_gateway_refused_goes_elsewhere() -> None:
    async def refuses(wire: Wire) -> None:
        while True:
            message = await wire.receive()
            assert message.headers["tabane-token"] == "t"
            await wire.send(
                b"HTTP/1.1 503 Service Unavailable\r\nTabane-Refused: stale\r\n"
                b"Retry-After: 1\r\nContent-Length: 4\r\n\r\nbusy"
            )

    headers = ((b"Tabane-Token", b"t"),)
    async with http_rig(refuses, echo, headers=headers) as rig:
        wire = await rig.connect()
        post = b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 4\r\n\r\nbody"
        response = await wire.ask(post)
        assert response.status == 200
        assert response.body.endswith(b"body")
        assert [len(slot.failures) for slot in rig.router.slots] == [1, 0]
        rig.app.lead_to(rig.app.targets[0])
        response = await wire.ask(post)
        assert (response.status, response.body) == (503, b"busy")
        assert response.headers == {"retry-after": "1", "content-length": "4"}


async def test_two_gateways_in_a_row_serve_as_one() -> None:
    async with http_rig(echo, forward=True) as inner, http_rig(echo) as outer:
        inner.router.named[b"g1"] = inner.app
        outer.router.add(
            "far.test",
            FakeApp(
                "default/far",
                [("127.0.0.1", inner.port)],
                headers=((b"Tabane-Generation", b"g1"), (b"Tabane-Token", b"t")),
            ),
        )
        wire = await outer.connect()
        for _ in range(3):
            seen = (await wire.ask(GET.replace(b"a.test", b"far.test"))).body.lower()
            assert seen.count(b"x-forwarded-for: 127.0.0.1\r\n") == 1
            assert b"x-forwarded-host: far.test\r\n" in seen
            assert b"tabane-" not in seen
        assert inner.servers[0].accepted == 1
