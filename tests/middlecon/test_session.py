from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.errors import Denied, ProtocolError, Refused
from tabane.middlecon.frames import MAGIC, Frame, Kind, encode_frame
from tabane.middlecon.session import (
    Hello,
    Mode,
    Session,
    Side,
    Welcome,
    agree_version,
    encode_error,
    encode_hello,
    encode_welcome,
    parse_hello,
    parse_welcome,
    sniff,
)

HELLO = Hello("web-1", "run", token="t")


def test_hello_and_welcome_come_back() -> None:
    (frame,) = Session(Side.HUB).receive(encode_hello(HELLO))
    assert parse_hello(frame) == HELLO
    welcome = Welcome("h", "run", hubs={"b": True})
    (frame,) = Session(Side.DIALER).receive(MAGIC + encode_welcome(welcome))
    assert parse_welcome(frame) == welcome


@given(st.integers(1, 60))
def test_an_opening_in_pieces(cut: int) -> None:
    session, data = Session(Side.HUB), encode_hello(HELLO) + encode_frame(Kind.PING)
    frames = session.receive(data[:cut]) + session.receive(data[cut:])
    assert [frame.kind for frame in frames] == [Kind.HELLO, Kind.PING]
    assert session.broken is None


@given(st.text(max_size=50), st.integers(0, 40))
def test_a_dialer_skips_text_before_the_magic(text: str, cut: int) -> None:
    session = Session(Side.DIALER)
    data = text.encode(errors="replace") + MAGIC + encode_welcome(Welcome("h", "run"))
    assert [f.kind for f in session.receive(data[:cut]) + session.receive(data[cut:])] == [
        Kind.WELCOME
    ]


@given(st.binary(min_size=1, max_size=300))
def test_arbitrary_first_bytes_give_no_frame_but_a_hello(data: bytes) -> None:
    session = Session(Side.HUB)
    assert all(frame.kind == Kind.HELLO for frame in session.receive(data)[:1])
    assert session.mode is sniff(data)
    assert (session.mode is Mode.BINARY) == (data[0] == 0xFF)


@pytest.mark.parametrize(
    ("first", "mode"),
    [
        (MAGIC, Mode.BINARY),
        (b"GET / HTTP/1.1\r\n", Mode.HTTP),
        ("こんにちは\n".encode(), Mode.TEXT),
        (b"\n", Mode.TEXT),
    ],
)
def test_who_is_there(first: bytes, mode: Mode) -> None:
    assert sniff(first) is mode


def test_the_first_frame_must_be_the_opening_one() -> None:
    session = Session(Side.HUB)
    assert session.receive(MAGIC + encode_frame(Kind.CAST)) == []
    assert session.broken is not None and "first frame has kind 22" in session.broken.message


def test_a_wrong_magic_is_named() -> None:
    session = Session(Side.HUB)
    assert session.receive(b"\xffmc9") == []
    assert session.broken is not None


def test_a_welcome_may_be_an_error_and_raises_it() -> None:
    session = Session(Side.DIALER)
    (frame,) = session.receive(MAGIC + encode_error(Denied("no")))
    with pytest.raises(Denied, match="no"):
        parse_welcome(frame)
    with pytest.raises(Refused, match="so"):
        parse_welcome(Frame(Kind.ERROR, name="word_of_its_own", data=b"so"))


def test_versions_are_agreed_on() -> None:
    assert agree_version((1, 7)) == 1
    with pytest.raises(ProtocolError, match=r"\[7\]"):
        agree_version((7,))


@given(st.binary(max_size=100))
def test_a_hello_that_cannot_be_read_is_a_protocol_error(data: bytes) -> None:
    try:
        parse_hello(Frame(Kind.HELLO, data=data))
    except ProtocolError as error:
        assert "HELLO" in error.message
