"""The frames of a conversation: whole, byte by byte, with more behind, and anything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.api import frames
from tabane.errors import ProtocolError

KINDS = st.sampled_from(sorted(frames.NODES))
SOME = st.lists(st.tuples(KINDS, st.binary(max_size=200)), max_size=8)


def feed(parser: frames.Parser, blocks: list[bytes]) -> list[frames.Frame]:
    return [frame for block in blocks for frame in parser.feed(block)]


@given(SOME)
def test_frames_come_out_as_they_went_in(sent: list[frames.Frame]) -> None:
    data = b"".join(frames.encode(kind, body) for kind, body in sent)
    assert feed(frames.Parser(frames.NODES), [data]) == sent
    assert feed(frames.Parser(frames.NODES), [data[n : n + 1] for n in range(len(data))]) == sent
    begun = frames.encode(frames.OUTPUT, b"half")[:-1]
    parser = frames.Parser(frames.NODES)
    assert feed(parser, [data + begun]) == sent
    assert feed(parser, [b"f"]) == [(frames.OUTPUT, b"half")]


@given(st.lists(st.binary(max_size=50), max_size=10))
def test_anything_gives_frames_or_one_error(blocks: list[bytes]) -> None:
    try:
        for kind, _ in feed(frames.Parser(frames.CLIENTS), blocks):
            assert kind in frames.CLIENTS
    except ProtocolError as error:
        assert "is no frame" in error.message


def test_a_client_may_not_say_what_a_node_says() -> None:
    with pytest.raises(ProtocolError):
        feed(frames.Parser(frames.CLIENTS), [frames.encode(frames.EXIT, bytes(4))])


def test_a_frame_has_a_largest_size() -> None:
    with pytest.raises(ProtocolError):
        feed(frames.Parser(frames.CLIENTS), [b"I\xff\xff\xff\xff"])


@given(st.integers(1, 65535), st.integers(1, 65535))
def test_sizes(rows: int, columns: int) -> None:
    ((kind, data),) = feed(frames.Parser(frames.CLIENTS), [frames.encode_size(rows, columns)])
    assert kind == frames.SIZE
    assert frames.parse_size(data) == (rows, columns)


@pytest.mark.parametrize("data", [b"", bytes(4), b"\0\1\0\0", b"\0\1\0\1\0"])
def test_what_is_no_size(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        frames.parse_size(data)


def test_numbers() -> None:
    ((kind, data),) = feed(frames.Parser(frames.NODES), [frames.encode_number(frames.EXIT, 137)])
    assert (kind, frames.parse_number(data)) == (frames.EXIT, 137)
    with pytest.raises(ProtocolError):
        frames.parse_number(b"\1")
