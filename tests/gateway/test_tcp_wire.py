"""The lines between gateways and the PROXY header, byte by byte."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.errors import ProtocolError
from tabane.gateway.tcp_wire import (
    LONGEST_LINE,
    LONGEST_REASON,
    OK,
    SIGNATURE,
    Hop,
    encode_hop,
    encode_proxy,
    encode_refusal,
    hop_of,
    parse_hop,
    parse_reply,
    split_line,
)

HOP = Hop("secret", 25, generation="incarnation/i1/3")


def test_a_hop_is_what_a_slot_says_of_another_gateway() -> None:
    headers = ((b"tabane-token", b"secret"), (b"tabane-generation", b"incarnation/i1/3"))
    assert hop_of(headers, 25) == HOP
    assert HOP.fields() == {
        b"tabane-token": b"secret",
        b"tabane-generation": b"incarnation/i1/3",
        b"tabane-app": b"",
    }


def test_a_line_whole_byte_by_byte_and_with_what_follows() -> None:
    line = encode_hop(HOP)
    for length in range(len(line)):
        assert split_line(line[:length]) is None
    assert split_line(line) == (line[:-1], b"")
    assert split_line(line + b"EHLO\nx") == (line[:-1], b"EHLO\nx")
    assert parse_hop(line[:-1]) == HOP


def test_a_line_has_a_longest_length() -> None:
    assert split_line(b"x" * LONGEST_LINE) is None
    for data in (b"x" * (LONGEST_LINE + 1), b"x" * (LONGEST_LINE + 1) + b"\n"):
        with pytest.raises(ProtocolError):
            split_line(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_hop_or_one_error(data: bytes) -> None:
    for parse in (parse_hop, parse_reply):
        try:
            parse(data)
        except ProtocolError:
            continue


@pytest.mark.parametrize(
    "line", [b"{}", b'{"token":"x","port":0}', b'{"token":"x","port":65536}', b"[]", b"null"]
)
def test_what_says_too_little_is_no_hop(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_hop(line)


@given(st.text(max_size=3000))
def test_a_refusal_is_one_line_with_its_reason(reason: str) -> None:
    told = encode_refusal(reason.encode(errors="replace").decode())
    found = split_line(told)
    assert found is not None and found[1] == b""
    assert parse_reply(found[0])
    assert len(told) <= LONGEST_REASON + 4


def test_an_answer_is_ok_or_a_reason() -> None:
    assert parse_reply(OK[:-1]) == ""
    assert parse_reply(b"no instance i1 is gone") == "instance i1 is gone"


def test_the_proxy_header_of_version_1() -> None:
    header = encode_proxy("v1", ("203.0.113.7", 51000), ("10.0.0.2", 2525))
    assert header == b"PROXY TCP4 203.0.113.7 10.0.0.2 51000 2525\r\n"
    header = encode_proxy("v1", ("2001:db8::7", 51000), ("2001:db8::1", 2525))
    assert header == b"PROXY TCP6 2001:db8::7 2001:db8::1 51000 2525\r\n"


def test_the_proxy_header_of_version_2() -> None:
    header = encode_proxy("v2", ("203.0.113.7", 51000), ("10.0.0.2", 2525))
    addresses = socket.inet_aton("203.0.113.7") + socket.inet_aton("10.0.0.2")
    ports = (51000).to_bytes(2, "big") + (2525).to_bytes(2, "big")
    assert header == SIGNATURE + b"\x21\x11\x00\x0c" + addresses + ports
    header = encode_proxy("v2", ("2001:db8::7", 51000), ("2001:db8::1", 2525))
    assert header[:16] == SIGNATURE + b"\x21\x21\x00\x24"
    assert len(header) == 16 + 36
