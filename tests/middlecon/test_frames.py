from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.errors import ProtocolError
from tabane.middlecon.frames import (
    HEADER,
    MAX_U32,
    NAME_BYTES,
    Decoder,
    Frame,
    Kind,
    check_name,
    encode_ack,
    encode_frame,
)
from tabane.middlecon.receipts import Sum, encode_receipt

u32 = st.integers(0, MAX_U32)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
frames = st.builds(
    Frame,
    kind=st.integers(0, 255),
    flags=st.integers(0, 255),
    to=u32,
    id=u32,
    value=u32,
    name=names,
    data=st.binary(max_size=200),
)


def encode(frame: Frame) -> bytes:
    return encode_frame(
        frame.kind,
        flags=frame.flags,
        to=frame.to,
        id=frame.id,
        value=frame.value,
        name=frame.name,
        data=frame.data,
    )


def decode_in_pieces(data: bytes, cuts: list[int]) -> tuple[list[Frame], bool]:
    decoder, got = Decoder(1000), []
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, stop in pairwise(edges):
        got += decoder.feed(data[start:stop])
    return got, decoder.broken is not None


@given(st.lists(frames, max_size=5))
def test_frames_come_back_whole_and_byte_by_byte(sent: list[Frame]) -> None:
    data = b"".join(map(encode, sent))
    assert Decoder().feed(data) == sent
    decoder = Decoder()
    assert [frame for byte in data for frame in decoder.feed(bytes([byte]))] == sent


@given(frames, st.binary(max_size=HEADER.size - 1))
def test_a_part_of_the_next_frame_changes_nothing(frame: Frame, rest: bytes) -> None:
    assert Decoder().feed(encode(frame) + rest) == [frame]


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=6))
def test_any_bytes_give_the_same_frames_and_verdict_however_they_are_cut(
    data: bytes, cuts: list[int]
) -> None:
    assert decode_in_pieces(data, cuts) == decode_in_pieces(data, [])


@given(st.lists(frames, max_size=3), st.binary(min_size=40, max_size=40), st.integers(0, 200))
def test_frames_before_a_malformed_one_are_given(sent: list[Frame], junk: bytes, cut: int) -> None:
    data = b"".join(map(encode, sent)) + b"\xff\xff\xff\xff" + junk
    got, broken = decode_in_pieces(data, [cut])
    assert (got, broken) == (sent, True)


@pytest.mark.parametrize(
    "frame",
    [
        encode_frame(Kind.SAY, to=3, id=7, value=1000, data=b"hi"),
        encode_frame(Kind.SAY, to=3, id=9, value=1000, name="web-1", data=b"hi"),
        encode_frame(Kind.ACK, id=9),
        *encode_receipt(7, Sum(["web-2"], {}, [], [])),
    ],
)
def test_the_protocol_page_shows_the_bytes_of_frames(frame: bytes) -> None:
    page = Path(__file__).parents[2] / "docs" / "protocol.md"
    assert f"    {frame.hex(' ', -4)}\n" in page.read_text()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (HEADER.pack(16 + 11, 20, 0, 0, 0, 0, 0), "over the 10 allowed"),
        (HEADER.pack(16, 20, 0, 1, 0, 0, 0), "has a name of 1"),
        (HEADER.pack(3, 20, 0, 0, 0, 0, 0), "has a name of 0"),
        (HEADER.pack(16 + 300, 20, 0, 300, 0, 0, 0), "has a name of 300"),
        (HEADER.pack(17, 20, 0, 1, 0, 0, 0) + b"\xff", "not UTF-8"),
    ],
)
def test_malformed_frames_are_named(data: bytes, problem: str) -> None:
    decoder = Decoder(10)
    assert decoder.feed(data) == []
    assert decoder.broken is not None and problem in decoder.broken.message
    assert decoder.feed(encode_frame(Kind.PING)) == []


def test_a_huge_frame_is_refused_by_its_header_alone() -> None:
    decoder = Decoder()
    decoder.feed(HEADER.pack(MAX_U32, 20, 0, 0, 0, 0, 0))
    assert decoder.broken is not None


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[31m", "x" * (NAME_BYTES + 1), "\u202eevil"])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(ProtocolError):
        check_name(name)


@pytest.mark.parametrize("name", ["web-1", "tokyo/tokyo-1/agent", "束ね", "x" * NAME_BYTES])
def test_names_that_are_fine(name: str) -> None:
    assert check_name(name) == name


@given(st.integers(1, MAX_U32))
def test_a_plain_acknowledgement_has_a_short_way(id):
    assert encode_ack(id) == encode_frame(Kind.ACK, id=id)
