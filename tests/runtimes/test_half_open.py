"""Half a handshake tells who listens, and is no connection to a program."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.errors import Unreachable
from tabane.runtimes.half_open import (
    ACK,
    SOURCE_PORTS,
    SYN,
    Segment,
    checksum_of,
    encode_segment,
    parse_packet,
    wait_listening,
)

SEGMENT = Segment(513, 8000, 0xFFFF_FFFF, 7, SYN)
IP_HEADER = bytes.fromhex("4500002800010000400600000a0000010a000002")


def test_a_segment_as_the_standard_has_it() -> None:
    data = encode_segment(SEGMENT, "10.0.0.1", "10.0.0.2")
    assert data.hex(" ", 4) == "02011f40 ffffffff 00000007 50020400 76980000"
    pseudo = bytes((10, 0, 0, 1, 10, 0, 0, 2, 0, socket.IPPROTO_TCP, 0, len(data)))
    assert checksum_of(pseudo + data) == 0


def test_the_checksum_of_rfc_1071() -> None:
    assert checksum_of(bytes.fromhex("0001f203f4f5f6f7")) == 0x220D


def test_what_is_made_can_be_read() -> None:
    data = encode_segment(SEGMENT, "10.0.0.1", "10.0.0.2")
    assert parse_packet(IP_HEADER + data) == SEGMENT
    assert parse_packet(IP_HEADER + data + b"more") == SEGMENT
    options = bytes([0x46]) + IP_HEADER[1:] + b"\x01" * 4
    assert parse_packet(options + data) == SEGMENT


@pytest.mark.parametrize("length", range(40))
def test_what_is_cut_off_is_no_segment(length: int) -> None:
    whole = IP_HEADER + encode_segment(SEGMENT, "10.0.0.1", "10.0.0.2")
    assert parse_packet(whole[:length]) is None


@pytest.mark.parametrize("first", [b"\x65", b"\x40", b"\x44", b"\x4f"])
def test_other_headers_are_no_segment(first: bytes) -> None:
    whole = IP_HEADER + encode_segment(SEGMENT, "10.0.0.1", "10.0.0.2")
    assert parse_packet(first + whole[1:]) is None
    udp = whole[:9] + bytes([socket.IPPROTO_UDP]) + whole[10:]
    assert parse_packet(udp) is None


@given(st.binary(max_size=100))
def test_any_bytes_are_a_segment_or_none(data: bytes) -> None:
    segment = parse_packet(data)
    assert segment is None or isinstance(segment, Segment)


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    """A port that is taken, and not listened to yet."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        yield sock


@pytest.mark.real
async def test_it_waits_until_somebody_listens(taken: socket.socket) -> None:
    port = taken.getsockname()[1]
    waiting = asyncio.ensure_future(wait_listening("127.0.0.1", port))
    done, _ = await asyncio.wait([waiting], timeout=0.1)
    assert not done
    taken.listen()
    async with asyncio.timeout(60):
        await waiting


@pytest.mark.real
async def test_the_program_sees_no_connection(taken: socket.socket) -> None:
    taken.listen(1)
    for _ in range(20):
        async with asyncio.timeout(60):
            await wait_listening(*taken.getsockname())
    with pytest.raises(BlockingIOError):
        taken.accept()
    with socket.create_connection(taken.getsockname()) as real:
        there, peer = taken.accept()
        assert peer == real.getsockname()
        there.close()


@pytest.mark.real
async def test_only_answers_to_what_was_asked_count(taken: socket.socket) -> None:
    """Whoever guesses the port but not the number that was asked with has no say."""
    port = taken.getsockname()[1]
    waiting = asyncio.ensure_future(wait_listening("127.0.0.1", port))
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as forger:
        for source in SOURCE_PORTS:
            false = Segment(port, source, 1, 2, SYN | ACK)
            forger.sendto(encode_segment(false, "127.0.0.1", "127.0.0.1"), ("127.0.0.1", 0))
            await asyncio.sleep(0)
    done, _ = await asyncio.wait([waiting], timeout=0.05)
    assert not done
    waiting.cancel()
    await asyncio.wait([waiting])


@pytest.mark.real
async def test_an_answer_of_no_is_none(taken: socket.socket) -> None:
    """Silence and refusals are asked again; given up, it leaves nothing."""
    for address in ("127.0.0.1", "127.0.0.2"):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await wait_listening(address, taken.getsockname()[1])


@pytest.mark.real
async def test_no_way_to_an_address() -> None:
    with pytest.raises(Unreachable, match=r"there is no way to 203\.0\.113\.1"):
        await wait_listening("203.0.113.1", 80)
