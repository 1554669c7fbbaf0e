"""TCP sessions: who speaks first, ends and resets both ways, waiting, and handing on."""

from __future__ import annotations

import asyncio
import hashlib
import socket

import pytest

from tabane.errors import Stale, Unavailable
from tabane.gateway.limits import TcpLimits
from tabane.gateway.tcp_wire import Hop, encode_hop
from tabane.gateway.tunnel import HALF_CLOSED_S, LINGER_S
from tabane.testing.gateway import FakeApp
from tabane.testing.http import Script, Wire
from tabane.testing.tcp import PUBLIC, TcpRig, tcp_rig

MANY = 16 << 20


async def greets(wire: Wire) -> None:
    """Speaks first, then answers each line in capitals."""
    await wire.send(b"220 ready\n")
    while line := await wire.reader.readline():
        await wire.send(line.upper())
    await wire.send(b"221 bye\n")


async def returns(wire: Wire) -> None:
    while data := await wire.reader.read(1 << 16):
        await wire.send(data)


async def sums(wire: Wire) -> None:
    """Answers once the client has said all."""
    digest = hashlib.sha256()
    while data := await wire.reader.read(1 << 16):
        digest.update(data)
    await wire.send(digest.hexdigest().encode())


async def floods(wire: Wire) -> None:
    await wire.reader.readexactly(1)
    wire.writer.write(bytes(MANY))
    await wire.writer.drain()


async def resets(wire: Wire) -> None:
    await wire.reader.readline()
    wire.reset()


async def tells_how_it_ended(wire: Wire) -> None:
    """For the test: `servers[0].ended` is set after an error, too; so it says which."""
    try:
        while await wire.reader.read(1 << 16):
            pass
        HOW.set_result("end")
    except ConnectionResetError:
        HOW.set_result("reset")


HOW: asyncio.Future[str]


async def test_the_server_may_speak_first_and_each_side_closes_on_its_own() -> None:
    async with tcp_rig(greets) as rig:
        wire = await rig.connect()
        assert await wire.reader.readline() == b"220 ready\n"
        await wire.send(b"hello\n")
        assert await wire.reader.readline() == b"HELLO\n"
        assert (rig.app.held, rig.gateway.counters.active) == (1, 1)
        wire.half_close()
        assert await wire.reader.read() == b"221 bye\n"
        await rig.wait_gone()
        assert [slot.first_bytes for slot in rig.router.slots] == [1]
        assert rig.gateway.counters.received_bytes == 6
        assert rig.gateway.counters.sent_bytes == len(b"220 ready\nHELLO\n221 bye\n")


async def test_who_says_all_and_ends_while_it_waits_is_answered() -> None:
    async with tcp_rig(sums) as rig:
        rig.app.cold = True
        wire = await rig.connect()
        await wire.send(b"all there is")
        wire.half_close()
        await rig.until(lambda: rig.app.waiting == 1)
        rig.gateway.sweep()
        await asyncio.sleep(0)
        assert rig.app.waiting == 1
        rig.app.cold = False
        assert await wire.reader.read() == hashlib.sha256(b"all there is").hexdigest().encode()


async def test_much_is_said_while_it_waits_and_little_of_it_kept() -> None:
    async with tcp_rig(sums) as rig:
        rig.app.cold = True
        wire = await rig.connect()
        data = bytes(range(256)) * (MANY // 256)
        wire.writer.write(data)
        await rig.until(lambda: rig.app.waiting == 1 and bool(waiting(rig).early))
        assert len(waiting(rig).early) <= 1 << 18
        assert not waiting(rig).reads
        rig.app.cold = False
        wire.half_close()
        async with asyncio.timeout(60):
            assert await wire.reader.read() == hashlib.sha256(data).hexdigest().encode()


def waiting(rig: TcpRig) -> object:
    (client,) = rig.gateway.connections
    return client


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_silent_client_that_leaves_frees_its_place(how: str) -> None:
    async with tcp_rig(greets) as rig:
        rig.app.cold = True
        wire = await rig.connect()
        await rig.until(lambda: rig.app.waiting == 1)
        getattr(wire, how)()
        await rig.until(lambda: rig.app.waiting == 0)
        await rig.wait_gone()
        assert rig.servers[0].accepted == 0


async def test_one_that_spoke_and_breaks_off_frees_its_place() -> None:
    async with tcp_rig(greets) as rig:
        rig.app.cold = True
        wire = await rig.connect()
        await wire.send(b"hello\n")
        await rig.until(lambda: rig.app.waiting == 1 and not waiting(rig).reads)
        wire.reset()

        def looked() -> bool:
            rig.gateway.sweep()
            return rig.app.waiting == 0

        await rig.until(looked)
        await rig.wait_gone()


async def test_a_session_that_gets_no_instance_is_reset() -> None:
    async with tcp_rig(greets) as rig:
        rig.app.error = Unavailable("it exits at once")
        wire = await rig.connect()
        with pytest.raises(ConnectionResetError):
            await wire.reader.read()
        await rig.wait_gone()
        assert rig.gateway.counters.refused == 1


async def test_a_port_that_no_app_has_any_more_is_reset() -> None:
    async with tcp_rig(greets) as rig:
        del rig.router.ports[PUBLIC]
        with pytest.raises(ConnectionResetError):
            await (await rig.connect()).reader.read()


async def test_an_instance_that_cannot_be_reached_is_left_for_another() -> None:
    async with tcp_rig(greets) as rig:
        rig.app.lead_to(("127.0.0.1", free_port()), ("127.0.0.1", rig.servers[0].port))
        wire = await rig.connect()
        assert await wire.reader.readline() == b"220 ready\n"
        assert [len(slot.failures) for slot in rig.router.slots] == [1, 0]


async def test_who_cannot_be_reached_again_and_again_is_given_up() -> None:
    async with tcp_rig(greets, limits=TcpLimits(max_tries=2)) as rig:
        rig.app.lead_to(("127.0.0.1", free_port()))
        with pytest.raises(ConnectionResetError):
            await (await rig.connect()).reader.read()
        assert len(rig.router.slots) == 2


async def test_a_port_that_only_the_next_revision_has_is_waited_for() -> None:
    async with tcp_rig(greets) as rig:
        rig.app.lacks = {PUBLIC}
        wire = await rig.connect()
        await rig.until(lambda: len(rig.router.slots) == 1)
        rig.app.lacks = set()
        rig.clock.advance(1.0)
        assert await wire.reader.readline() == b"220 ready\n"
        assert [slot.failures for slot in rig.router.slots] == [[], []]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_the_app_sees_how_a_client_left(how: str) -> None:
    global HOW
    HOW = asyncio.get_running_loop().create_future()
    async with tcp_rig(tells_how_it_ended) as rig:
        wire = await rig.connect()
        await wire.send(b"x")
        await rig.until(lambda: rig.gateway.counters.active == 1)
        getattr(wire, how)()
        async with asyncio.timeout(60):
            assert await HOW == {"close": "end", "reset": "reset"}[how]
        await rig.wait_gone()


async def test_an_app_that_resets_what_it_accepts_ends_the_session() -> None:
    async def resets_at_once(wire: Wire) -> None:
        wire.reset()

    async with tcp_rig(resets_at_once) as rig:
        for _ in range(20):
            with pytest.raises(ConnectionResetError):
                await (await rig.connect()).reader.read()


async def test_the_client_sees_that_the_app_broke_off() -> None:
    async with tcp_rig(resets) as rig:
        wire = await rig.connect()
        await wire.send(b"hello\n")
        with pytest.raises(ConnectionResetError):
            await wire.reader.read()


async def test_who_reads_nothing_holds_the_app_back() -> None:
    async with tcp_rig(floods) as rig:
        wire = await rig.connect(receive_buffer=1 << 14)
        await wire.send(b"x")
        await rig.until(lambda: rig.gateway.counters.active == 1)
        (tunnel,) = rig.gateway.connections
        await rig.until(lambda: not tunnel._ends[1].reads)
        held = tunnel._ends[0].transport.get_write_buffer_size()
        assert held < 1 << 20
        assert not rig.servers[0].ended.is_set()
        async with asyncio.timeout(60):
            assert await wire.reader.readexactly(MANY) == bytes(MANY)
            assert await wire.reader.read() == b""


async def test_an_idle_session_is_closed_and_one_that_moves_is_not() -> None:
    async with tcp_rig(greets, session_idle_s=60.0) as rig:
        wire = await rig.connect()
        await wire.reader.readline()
        rig.pass_time(59.0)
        await wire.send(b"hello\n")
        await wire.reader.readline()
        rig.pass_time(59.0)
        assert rig.app.held == 1
        rig.pass_time(2.0)
        assert await wire.reader.read() == b""
        await rig.wait_gone()


async def test_without_a_limit_a_session_may_be_idle_for_long() -> None:
    async with tcp_rig(greets) as rig:
        wire = await rig.connect()
        await wire.reader.readline()
        rig.pass_time(30 * 86400.0)
        await wire.send(b"hello\n")
        assert await wire.reader.readline() == b"HELLO\n"


async def test_one_that_is_closed_on_one_side_and_silent_ends_at_last() -> None:
    async def never_answers(wire: Wire) -> None:
        await wire.send(b"hello\n")
        await wire.reader.read()
        await asyncio.Event().wait()

    async with tcp_rig(never_answers) as rig:
        wire = await rig.connect()
        await wire.reader.readline()
        wire.half_close()
        (tunnel,) = rig.gateway.connections
        await rig.until(lambda: tunnel._ends[0].was_closed)
        rig.pass_time(HALF_CLOSED_S - 1.0)
        assert rig.app.held == 1
        rig.pass_time(2.0)
        rig.pass_time(LINGER_S + 1.0)
        await rig.wait_gone()


@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_the_app_is_told_who_connects(version: str) -> None:
    async with tcp_rig(returns, proxy_protocol=version) as rig:
        wire = await rig.connect()
        await wire.send(b"hello")
        local = wire.writer.get_extra_info("sockname")
        line = f"PROXY TCP4 127.0.0.1 127.0.0.1 {local[1]} {rig.port}\r\n".encode()
        length = len(line) if version == "v1" else 28
        header = await wire.reader.readexactly(length)
        if version == "v1":
            assert header == line
        else:
            assert header[:16] == b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c"
            assert header[24:26] == local[1].to_bytes(2, "big")
        assert await wire.reader.readexactly(5) == b"hello"


async def test_more_connections_than_the_limit_are_reset() -> None:
    async with tcp_rig(greets, limits=TcpLimits(max_connections=1)) as rig:
        first = await rig.connect()
        await first.reader.readline()
        with pytest.raises(ConnectionResetError):
            await (await rig.connect()).reader.read()
        await first.send(b"hello\n")
        assert await first.reader.readline() == b"HELLO\n"


async def test_a_drain_waits_for_sessions_and_takes_no_new_ones() -> None:
    async with tcp_rig(greets) as rig:
        wire = await rig.connect()
        await wire.reader.readline()
        drain = asyncio.create_task(rig.gateway.drain(10.0))
        await rig.until(lambda: not rig.gateway.ports())
        with pytest.raises(ConnectionError):
            await rig.connect()
        await wire.send(b"hello\n")
        assert await wire.reader.readline() == b"HELLO\n"
        wire.half_close()
        assert await wire.reader.read() == b"221 bye\n"
        await drain


async def test_a_port_that_is_left_keeps_the_sessions_that_began() -> None:
    async with tcp_rig(greets) as rig:
        wire = await rig.connect()
        await wire.reader.readline()
        assert rig.gateway.ports() == {PUBLIC}
        rig.gateway.leave(PUBLIC)
        with pytest.raises(ConnectionError):
            await rig.connect()
        await wire.send(b"hello\n")
        assert await wire.reader.readline() == b"HELLO\n"


async def test_an_instance_that_ended_with_its_network_stack_is_given_up() -> None:
    async with tcp_rig(greets) as rig:
        wire = await rig.connect()
        await wire.reader.readline()
        (slot,) = rig.router.slots
        rig.gateway.break_off(frozenset({slot.pool}), complete=False)
        assert await wire.reader.read() == b""
        await rig.wait_gone()


# Between gateways


def named(app: FakeApp, rig: TcpRig) -> tuple[tuple[bytes, bytes], ...]:
    """Slots of `app` are of another node; that is the same gateway here."""
    rig.router.named[b"g/1"] = rig.router.add("there", FakeApp("default/there", app.targets))
    return ((b"tabane-token", b"secret"), (b"tabane-generation", b"g/1"))


@pytest.mark.parametrize("script", [greets, returns])
async def test_a_session_is_handed_on_to_the_node_of_its_instance(script: Script) -> None:
    async with tcp_rig(script) as rig:
        rig.app.headers = named(rig.app, rig)
        wire = await rig.connect()
        await wire.send(b"hello\n")
        assert b"hello\n" in (await wire.reader.readline() + await first_line_after(script, wire))
        assert rig.gateway.counters.active == 2
        wire.half_close()
        await wire.reader.read()
        await rig.wait_gone()


@pytest.mark.parametrize("is_there", [False, True])
async def test_what_is_said_before_anybody_listens_is_heard(is_there: bool) -> None:
    """It greets and leaves, both before the gateway has got round to it."""

    async def greets_and_leaves(wire: Wire) -> None:
        await wire.send(b"220 and\n221 bye\n")

    async with tcp_rig(greets_and_leaves) as rig:
        if is_there:
            rig.app.headers = named(rig.app, rig)
        for _ in range(50):
            wire = await rig.connect()
            async with asyncio.timeout(60):
                assert await wire.reader.read() == b"220 and\n221 bye\n"
            wire.close()
        await rig.wait_gone()


async def first_line_after(script: Script, wire: Wire) -> bytes:
    return (await wire.reader.readline()).lower() if script is greets else b""


async def test_a_generation_that_is_not_there_any_more_is_left_for_another() -> None:
    async with tcp_rig(greets, limits=TcpLimits(max_tries=1_000_000)) as rig:
        rig.app.headers = named(rig.app, rig)
        rig.router.named[b"g/1"] = Stale("instance g/1 is not here any more")
        wire = await rig.connect()
        await rig.until(lambda: bool(rig.router.slots and rig.router.slots[0].failures))
        rig.app.headers = ()
        assert await wire.reader.readline() == b"220 ready\n"
        assert rig.router.slots[0].failures == ["instance g/1 is not here any more"]


async def test_a_hop_that_names_an_app_is_given_an_instance_of_it() -> None:
    async with tcp_rig(greets) as rig:
        rig.app.cold = True
        wire = await rig.connect(rig.hops)
        await wire.send(encode_hop(Hop("secret", PUBLIC, app="default/a")))
        await rig.until(lambda: rig.app.waiting == 1)
        rig.app.cold = False
        assert await wire.reader.readline() == b"ok\n"
        assert await wire.reader.readline() == b"220 ready\n"


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n", b"{}\n", b"x" * 5000, b"\xff\xfe\n"])
async def test_who_is_no_gateway_is_told_so(said: bytes) -> None:
    async with tcp_rig(greets) as rig:
        wire = await rig.connect(rig.hops)
        await wire.send(said)
        assert (await wire.reader.read()).startswith(b"no ")
        assert rig.servers[0].accepted == 0


async def test_a_gateway_that_says_nothing_is_cut_off() -> None:
    async with tcp_rig(greets) as rig:
        wire = await rig.connect(rig.hops)
        await rig.until(lambda: bool(rig.gateway.connections))
        rig.pass_time(11.0)
        with pytest.raises(ConnectionResetError):
            await wire.reader.read()
