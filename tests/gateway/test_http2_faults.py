"""What HTTP/2 clients must not do, and what it ends: the stream, or the connection."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from h2.settings import SettingCodes
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tabane.gateway.http2 import MAX_STREAMS
from tabane.gateway.http2_budget import FRAMES_PER_S, FULL, FrameBudget
from tabane.gateway.limits import HttpLimits
from tabane.testing.http import Rig, Wire, echo, http_rig
from tabane.testing.http2 import Http2Wire

REFUSED_STREAM, CANCEL, CALM = 7, 8, 11
PROTOCOL_ERROR = 1


async def connect(rig: Rig, *, acknowledges: bool = True) -> Http2Wire:
    http2 = Http2Wire(await rig.connect(), is_client=True, acknowledges=acknowledges)
    await http2.flush()
    return http2


async def hang(wire: Wire) -> None:
    """An app that reads a request and never answers."""
    await wire.head()
    await wire.reader.read()


MALFORMED: dict[str, tuple[tuple[bytes, bytes], ...]] = {
    "upper case": ((b"X-Upper", b"1"),),
    "a field of one hop": ((b"connection", b"close"),),
    "a transfer coding": ((b"transfer-encoding", b"chunked"),),
    "te": ((b"te", b"gzip"),),
    "a line break": ((b"x-evil", b"1\r\nTabane-Token: x"),),
    "a lone line feed": ((b"x-evil", b"1\nx: y"),),
    "a NUL": ((b"x-evil", b"\0"),),
    "a space in a name": ((b"x evil", b"1"),),
    "a colon in a name": ((b"x:evil", b"1"),),
    "no path": ((b":path", b""),),
    "a path without a slash": ((b":path", b"http://other.test/"),),
    "a path with a space": ((b":path", b"/ HTTP/1.1\r\nx: y"),),
    "a method with a space": ((b":method", b"GET /evil"),),
    "two hosts": ((b"host", b"other.test"),),
    "an unknown pseudo-field": ((b":protocol", b"websocket"),),
    "a host that is none": ((b":authority", b"a.test/evil"),),
}


@pytest.mark.parametrize("fields", MALFORMED.values(), ids=MALFORMED.keys())
async def test_a_malformed_request_is_refused_and_the_other_streams_go_on(
    fields: tuple[tuple[bytes, bytes], ...],
) -> None:
    async with http_rig(echo) as rig:
        http2 = await connect(rig)
        assert (await http2.exchange(*fields)).status == 400
        assert rig.router.asked == []
        assert (await http2.exchange((b":method", b"CONNECT"))).status == 405
        assert (await http2.exchange()).status == 200


async def test_pseudo_fields_stand_before_the_others_and_once() -> None:
    async with http_rig(echo) as rig:
        http2 = await connect(rig)
        whole = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/")]
        host = (b":authority", b"a.test")
        for fields in ([*whole, host, host], [*whole, (b"x", b"y"), host], [*whole], whole[:2]):
            number = http2.h2.get_next_available_stream_id()
            http2.h2.send_headers(number, fields, end_stream=True)
            await http2.ask()
            while not http2.streams.get(number) or not http2.streams[number].ended:
                await http2.receive()
            assert http2.streams[number].status == 400


async def test_what_only_gateways_may_say_is_taken_out() -> None:
    async with http_rig(echo) as rig:
        http2 = await connect(rig)
        lies = ((b"tabane-token", b"t"), (b"x_real_ip", b"6.6.6.6"), (b"x-forwarded-port", b"1"))
        seen = (await http2.exchange(*lies)).body.lower()
        assert not any(name in seen for name in (b"tabane-token", b"x_real", b"forwarded-port"))


def ping() -> Frame:
    return PingFrame(0, opaque_data=b"12345678")


def setting() -> Frame:
    return SettingsFrame(0, settings={SettingCodes.HEADER_TABLE_SIZE: 4096})


def priority() -> Frame:
    return PriorityFrame(1, depends_on=0, stream_weight=1)


def window() -> Frame:
    return WindowUpdateFrame(0, window_increment=1)


def empty() -> Frame:
    return DataFrame(1, data=b"")


@pytest.mark.parametrize("make", [ping, setting, priority, window, empty])
async def test_a_flood_of_frames_for_nothing_ends_the_connection(make: Callable[[], Frame]) -> None:
    async with http_rig(hang) as rig:
        http2 = await connect(rig)
        await http2.ask((b":method", b"POST"), end=False)
        await rig.until(lambda: rig.app.held == 1)
        frame = make().serialize()
        await http2.wire.send(frame * (int(FULL) - 100))
        other = await connect(rig)
        assert (await other.exchange((b":authority", b"b.test"))).status == 404
        assert rig.app.held == 1
        http2.wire.writer.write(frame * 200)
        await http2.until_closed()
        assert [code for _, code in http2.goaways] == [CALM]
        await rig.until(lambda: rig.app.held == 0)


async def test_streams_that_are_given_up_at_once_end_the_connection() -> None:
    async with http_rig(hang) as rig:
        http2 = await connect(rig)
        for _ in range(int(FULL) + 10):
            number = http2.h2.get_next_available_stream_id()
            pseudo = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/")]
            http2.h2.send_headers(number, [*pseudo, (b":authority", b"a.test")], end_stream=True)
            http2.h2.reset_stream(number, CANCEL)
        http2.wire.writer.write(http2.h2.data_to_send())
        await http2.until_closed()
        assert [code for _, code in http2.goaways] == [CALM]
        await rig.until(lambda: rig.app.held == 0)
        assert rig.gateway.counters.active == 0


async def test_a_purse_fills_with_time_and_with_useful_work() -> None:
    budget = FrameBudget(0.0)
    assert all(budget.spend(0.0) for _ in range(int(FULL)))
    assert not budget.spend(0.0)
    budget = FrameBudget(0.0)
    assert all(budget.spend(second) for second in range(60) for _ in range(int(FRAMES_PER_S)))
    budget = FrameBudget(0.0)
    for _ in range(10_000):
        budget.earn()
        assert budget.spend(0.0)


async def test_more_streams_than_are_allowed_are_refused() -> None:
    async with http_rig(hang) as rig:
        http2 = await connect(rig)
        http2.obeys = False
        numbers = [await http2.ask() for _ in range(MAX_STREAMS)]
        await rig.until(lambda: rig.app.held == MAX_STREAMS)
        extra = [await http2.ask() for _ in range(10)]
        for number in extra:
            assert (await http2.answer_of(number)).reset == REFUSED_STREAM
        assert rig.app.held == MAX_STREAMS
        http2.h2.reset_stream(numbers[0], CANCEL)
        again = await http2.ask((b":authority", b"b.test"))
        assert (await http2.answer_of(again)).status == 404
        await http2.ask()
        await rig.until(lambda: rig.app.held == MAX_STREAMS)
        with pytest.raises((EOFError, ConnectionError)):
            for _ in range(int(FULL)):
                await http2.answer_of(await http2.ask())
        await rig.until(lambda: rig.app.held == 0)


async def test_a_list_of_fields_that_is_too_long_ends_the_connection() -> None:
    async with http_rig(echo) as rig:
        http2 = await connect(rig)
        fine = tuple((b"x-%d" % n, b"y" * 1000) for n in range(50))
        assert (await http2.exchange(*fine)).status == 200
        await http2.ask(*((b"z-%d" % n, b"y" * 1000) for n in range(70)))
        await http2.until_closed()
        assert http2.goaways[0][1] in (PROTOCOL_ERROR, CALM)


async def test_a_list_of_fields_that_never_ends_ends_the_connection() -> None:
    async with http_rig(echo) as rig:
        http2 = await connect(rig)
        begin = HeadersFrame(1, data=b"\0")
        more = ContinuationFrame(1, data=b"\0")
        await http2.wire.send(begin.serialize())
        http2.wire.writer.write(more.serialize() * 200)
        await http2.until_closed()
        assert rig.router.asked == []


async def test_frames_in_the_wrong_place_end_the_connection() -> None:
    for frame in (DataFrame(1, data=b"x"), HeadersFrame(2, data=b"\x82", flags=["END_HEADERS"])):
        async with http_rig(echo) as rig:
            http2 = await connect(rig)
            await http2.wire.send(frame.serialize())
            await http2.until_closed()
            assert rig.gateway.counters.active == 0


async def test_a_stream_has_the_deadlines_that_a_request_has() -> None:
    asked = 0

    async def count(wire: Wire) -> None:
        nonlocal asked
        await wire.head()
        asked += 1
        await wire.reader.read()

    async with http_rig(count, response_timeout_s=20.0) as rig:
        http2 = await connect(rig)
        number = await http2.ask()
        upload = await http2.ask((b":method", b"POST"), end=False)
        await rig.until(lambda: asked == 2)
        rig.pass_time(25.0)
        assert (await http2.answer_of(number)).status == 504
        rig.pass_time(40.0)
        assert (await http2.answer_of(upload)).status == 408


async def test_an_answer_that_nobody_takes_is_cut() -> None:
    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + b"x" * 200_000)
        await wire.reader.read()

    async with http_rig(script) as rig:
        http2 = await connect(rig, acknowledges=False)
        number = await http2.ask()
        while len(http2.streams[number].body) < 65_535:
            await http2.receive()
        assert http2.streams[number].reset is None
        rig.pass_time(1.0)
        rig.pass_time(61.0)
        rig.pass_time(61.0)
        found = await http2.answer_of(number)
        assert (found.ended, found.reset is not None) == (False, True)


async def test_idle_connections_are_told_and_closed() -> None:
    limits = HttpLimits()
    async with http_rig(echo) as rig:
        silent, used = await connect(rig), await connect(rig)
        assert (await used.exchange()).status == 200
        rig.pass_time(limits.header_timeout_s + 1)
        await silent.until_closed()
        assert (await used.exchange()).status == 200
        rig.pass_time(limits.idle_timeout_s + 1)
        await used.until_closed()
        assert used.goaways == [(3, 0)]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.binary(min_size=1, max_size=200), max_size=5))
async def test_any_bytes_end_in_good_order(pieces: list[bytes]) -> None:
    async with http_rig(echo) as rig:
        http2 = await connect(rig)
        number = await http2.ask()
        for piece in pieces:
            http2.wire.writer.write(piece)
        rig.pass_time(0.0)
        http2.wire.close()
        assert number == 1
        await rig.until(lambda: rig.gateway.counters.active == 0)
