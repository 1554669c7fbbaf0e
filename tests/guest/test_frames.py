"""Frames between host and guest: every cut of the stream, and everything that is none."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.errors import ProtocolError
from tabane.guest.frames import (
    END_MARK,
    MAX_PAYLOAD,
    SILENCE,
    VERSION,
    Frame,
    FrameReader,
    Kind,
    encode_frame,
    encode_hello,
    parse_welcome,
)

FRAMES = st.builds(
    Frame,
    st.integers(1, 255),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=50) | st.just(bytes(MAX_PAYLOAD)) | st.just(b"\xa5" * 9),
)
SHORT = st.builds(Frame, st.integers(1, 255), st.integers(0, 2**32 - 1), st.binary(max_size=50))
PAGE = Path(__file__).parents[2] / "docs/guest-agent.md"


def in_step() -> FrameReader:
    reader = FrameReader()
    assert reader.feed(SILENCE) == []
    return reader


def encode(frames: list[Frame]) -> bytes:
    return b"".join(encode_frame(*frame) for frame in frames)


@given(st.lists(FRAMES, max_size=4), st.lists(st.integers(0, 1 << 17), max_size=6))
def test_however_it_is_cut(frames: list[Frame], cuts: list[int]) -> None:
    stream = encode(frames)
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    reader = in_step()
    found = [frame for start, end in pairwise(edges) for frame in reader.feed(stream[start:end])]
    assert found == frames


@given(SHORT)
def test_byte_by_byte_and_with_more_after_it(frame: Frame) -> None:
    reader = in_step()
    found = [one for byte in encode_frame(*frame) for one in reader.feed(bytes([byte]))]
    found += reader.feed(b"\0\0\x05\x01")
    assert found == [frame]


@given(SHORT | st.just(Frame(65, 1, bytes(MAX_PAYLOAD))), SHORT, st.data())
def test_a_frame_that_was_broken_off_counts_for_nothing(
    cut: Frame, frame: Frame, data: st.DataObject
) -> None:
    """Whatever was left out of it, the silence is understood, and what comes after."""
    stream = encode_frame(*cut)
    kept = data.draw(st.integers(1, len(stream) - 1))
    reader = in_step()
    with pytest.raises(ProtocolError):
        reader.feed(stream[:kept] + SILENCE + encode_frame(*frame))
    assert reader.feed(b"") == [frame]


@given(st.binary(max_size=200), SHORT)
def test_out_of_step_only_a_silence_counts(rest: bytes, frame: Frame) -> None:
    reader = FrameReader()
    assert reader.feed(rest + encode_frame(*frame)) == []
    assert reader.feed(SILENCE + encode_frame(*frame)) == [frame]


@given(st.binary(max_size=400))
def test_any_bytes_are_frames_or_one_error(data: bytes) -> None:
    reader = in_step()
    try:
        frames = reader.feed(data)
    except ProtocolError as error:
        assert str(error).startswith("the guest sent a frame ")
    else:
        assert all(len(frame.payload) <= MAX_PAYLOAD for frame in frames)


def test_nothing_is_kept_of_a_guest_that_talks_out_of_step() -> None:
    reader = FrameReader()
    for _ in range(100):
        assert reader.feed(b"nonsense" * 1000) == []
    assert len(reader._inbox) < len(SILENCE)


@pytest.mark.parametrize(
    "data",
    [
        b"\x45" + bytes(4) + (MAX_PAYLOAD + 1).to_bytes(4, "little"),
        b"\x45" + bytes(4) + b"\xff\xff\xff\xff",
        b"\x45" + bytes(8) + b"\x00\x00",
    ],
)
def test_what_is_no_frame(data: bytes) -> None:
    reader = in_step()
    with pytest.raises(ProtocolError):
        reader.feed(data + b"\x01")
    assert reader.feed(b"\1" + SILENCE + encode_frame(Kind.ANSWER, 7)) == [Frame(69, 7)]


def test_no_frame_has_a_silence_in_it() -> None:
    longest = encode_frame(Kind.OUTPUT, 0, bytes(MAX_PAYLOAD))
    assert SILENCE not in longest + longest
    assert END_MARK != 0


def test_a_hello_and_its_welcome() -> None:
    nonce = bytes(range(16))
    frames = FrameReader().feed(encode_hello(nonce))
    assert [frame.kind for frame in frames] == [Kind.HELLO]
    assert parse_welcome(frames[0].payload) == (VERSION, nonce)
    with pytest.raises(ProtocolError):
        parse_welcome(b"\1\0too short")


def test_the_pages_examples() -> None:
    """docs/guest-agent.md: each example is a line of words, and one of its bytes."""
    found = re.findall(r"^    (\w+) (\d+) (\S*)\n    ((?:[0-9a-f]{2} ?)+)$", PAGE.read_text(), re.M)
    assert len(found) >= 4
    for kind, channel, payload, data in found:
        text = payload.encode().decode("unicode_escape").encode("latin-1")
        assert encode_frame(Kind[kind], int(channel), text) == bytes.fromhex(data)


def test_the_agent_has_the_same_numbers() -> None:
    header = (PAGE.parents[1] / "src/tabane/guest/agent/agent.h").read_text()
    host = re.search(r"enum \{ (HELLO = 1.*?) \};", header, re.S)
    guest = re.search(r"enum \{ (WELCOME = 64.*?) \};", header, re.S)
    assert host and guest
    names = [re.findall(r"[A-Z_]+", match[1]) for match in (host, guest)]
    numbered = dict(enumerate(names[0], 1)) | dict(enumerate(names[1], 64))
    assert numbered == {kind.value: kind.name for kind in Kind}
    for name, value in (("MAX_PAYLOAD", MAX_PAYLOAD), ("SILENCE", len(SILENCE))):
        assert f"{name} = {value}," in header
