import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.errors import ProtocolError
from tabane.gateway import dns_message as dns
from tabane.gateway.dns_message import Code, Kind, Query
from tabane.network.addresses import GATEWAY

QUERY = bytes.fromhex(
    "1234 0100 0001 0000 0000 0001"  # id, recursion desired, one question, one additional
    "05 48656c6c6f 04 74657374 00 0001 0001"  # Hello.test A IN
    "00 0029 04d0 0000 0000 0000"  # EDNS
)

labels = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=63)
names = st.lists(labels, max_size=10).map(".".join).filter(lambda name: len(name) < 250)


def test_a_query_byte_by_byte() -> None:
    query = dns.parse_query(QUERY)
    assert (query.id, query.name, query.kind) == (0x1234, "hello.test", Kind.A)
    assert query.is_standard
    assert query.question == QUERY[12:28]


def test_an_answer_byte_by_byte() -> None:
    answer = dns.encode_answer(dns.parse_query(QUERY), GATEWAY)
    assert answer == bytes.fromhex(
        "1234 8580 0001 0001 0000 0000"
        "05 48656c6c6f 04 74657374 00 0001 0001"
        "c00c 0001 0001 00000005 0004 64400001"
    )


@given(st.integers(0, 0xFFFF), names, st.integers(1, 0xFFFF), st.binary(max_size=40))
def test_what_is_encoded_is_parsed(number: int, name: str, kind: int, rest: bytes) -> None:
    data = dns.encode_query(number, name, kind)
    query = dns.parse_query(data + rest)
    assert (query.id, query.name, query.kind) == (number, name, kind)
    assert query.question == data[12:]


@given(st.binary(max_size=200))
def test_any_bytes_are_a_query_or_one_error(data: bytes) -> None:
    try:
        assert isinstance(dns.parse_query(data), Query)
    except ProtocolError:
        answer = dns.encode_format_error(data)
        assert (answer is None) == (len(data) < 12 or data[2] >= 0x80)
        assert answer is None or answer[3] & 0xF == Code.FORMAT_ERROR


@pytest.mark.parametrize("length", range(28))
def test_a_query_that_ends_early_is_refused(length: int) -> None:
    with pytest.raises(ProtocolError):
        dns.parse_query(QUERY[:length])


@pytest.mark.parametrize(
    "name",
    [
        b"\xc0\x0c",  # a pointer, here to itself
        b"\x40" + bytes(64) + b"\x00",  # a label of 64 bytes
        (b"\x3f" + b"a" * 63) * 4 + b"\x00",  # 257 bytes
    ],
)
def test_bad_names_are_refused(name: bytes) -> None:
    with pytest.raises(ProtocolError, match="compressed, too long"):
        dns.parse_query(QUERY[:12] + name + b"\0\1\0\1")


def test_a_response_is_no_query_and_is_never_answered() -> None:
    response = dns.encode_answer(dns.parse_query(QUERY), GATEWAY)
    with pytest.raises(ProtocolError, match="not a query"):
        dns.parse_query(response)
    assert dns.encode_format_error(response) is None


@pytest.mark.parametrize(("kind", "count"), [(Kind.A, 1), (Kind.ANY, 1), (Kind.AAAA, 0), (16, 0)])
def test_an_app_has_one_address_and_nothing_else(kind: int, count: int) -> None:
    answer = dns.encode_answer(dns.parse_query(dns.encode_query(1, "hello.test", kind)), GATEWAY)
    assert answer[3] & 0xF == Code.NO_ERROR
    assert int.from_bytes(answer[6:8], "big") == count
    assert answer.endswith(GATEWAY.packed) == bool(count)


@given(st.integers(0, 0xFFFF), names, names)
def test_only_the_same_question_under_the_same_id_is_answered(
    number: int, name: str, other: str
) -> None:
    query = dns.parse_query(dns.encode_query(number, name, Kind.A))
    response = dns.encode_answer(query, GATEWAY)
    assert dns.answers(query, response)
    assert dns.answers(query, response[:12] + response[12:].upper())
    assert not dns.answers(query, dns.with_id(response, number ^ 1))
    assert not dns.answers(query, dns.encode_query(number, name, Kind.A))
    assert not dns.answers(query, response[:11])
    foreign = dns.parse_query(dns.encode_query(number, other, Kind.A))
    assert dns.answers(query, dns.encode_answer(foreign, GATEWAY)) == (name == other)
