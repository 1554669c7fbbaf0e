"""The readers, without IO: however the bytes are cut, the same messages come out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tabane.gateway.headers import BadMessage, parse_authority
from tabane.gateway.http1 import REPLAY_BYTES, RequestReader, ResponseReader

REQUESTS = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\r\n\r\nGET /1 HTTP/1.1\r\nHost: a\r\nX: y\r\n\r\n",
    b"POST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n\r\n\r\n!",
    b"POST /3 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"4\r\n\r\n\r\n\r\n6;x=y\r\nabcdef\r\n0\r\nTrailer: z\r\n\r\n",
    b"POST /4 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET /5 HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
    b"POST /6 HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n"
    b"Content-Length: 2\r\n\r\nab",
    b"POST /7 HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\nz",
]
BODIES = [b"", b"", b"\r\n\r\n!", b"\r\n\r\nabcdef", b"", b"", b"ab", b"z"]


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(place % (len(data) + 1) for place in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


def read_requests(pieces: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Target and body of each complete request."""
    reader, seen = RequestReader(), []
    for piece in pieces:
        reader.feed(piece)
        while reader.request is not None and reader.request.complete:
            body = b"".join(reader.request.take_body())
            seen.append((reader.request.head.target, body))
            reader.resume()
        assert reader.error is None
    return seen


STREAM = b"".join(REQUESTS)
EXPECTED = list(zip([b"/", *(b"/%d" % n for n in range(1, 8))], BODIES, strict=True))


@settings(deadline=None)
@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
@example(list(range(len(STREAM))))
@example([])
def test_requests_do_not_depend_on_how_they_are_cut(cuts: list[int]) -> None:
    assert read_requests(cut(STREAM, cuts)) == EXPECTED


RESPONSES: list[tuple[bytes, bytes, bytes]] = [
    (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n\r\n\r\nab", b"\r\n\r\nab"),
    (
        b"GET",
        b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n\r\n\r\n\r\n0\r\nT: u\r\n\r\n",
        b"\r\n\r\n",
    ),
    (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n", b""),
    (b"HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b""),
    (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 6\r\n\r\n", b""),
    (b"GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 6\r\n\r\n", b""),
    (b"GET", b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", b""),
    (b"GET", b"HTTP/1.1 200 \r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n", b""),
    (b"GET", b"HTTP/1.1 200 OK\r\nX: y\nContent-Length: 4\n\n\n\r\n\n", b"\n\r\n\n"),
    (b"GET", b"HTTP/1.0 200 OK\nConnection: keep-alive\nContent-Length: 1\n\r\na", b"a"),
    (b"GET", b"HTTP/1.1 100 Continue\n\nHTTP/1.1 200 OK\nContent-Length: 1\r\n\na", b"a"),
]


@pytest.mark.parametrize(("method", "data", "body"), RESPONSES)
@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 200), max_size=6), behind=st.binary(max_size=3))
@example(cuts=list(range(200)), behind=b"")
@example(cuts=[], behind=b"HTTP")
def test_responses_do_not_depend_on_how_they_are_cut(
    method: bytes, data: bytes, body: bytes, cuts: list[int], behind: bytes
) -> None:
    reader = ResponseReader(method)
    for piece in cut(data, cuts):
        assert not reader.complete
        reader.feed(piece)
    if behind:
        reader.feed(behind)
    assert reader.error is None
    assert reader.complete
    assert b"".join(reader.body) == body
    assert reader.is_reusable is (not behind)
    assert reader.rest == behind


def test_lines_that_end_in_lf_alone_are_passed_on_as_http_has_them() -> None:
    reader = ResponseReader(b"GET")
    reader.feed(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\nContent-Length: 0\nX: y\n\n")
    assert reader.head is not None
    assert (reader.head.line, reader.head.length) == (b"HTTP/1.1 200 OK", 0)
    assert reader.head.block == b"\r\nContent-Type: text/plain\r\nX: y"


@pytest.mark.parametrize("line", [b"X: a\rY: b\n", b"X: a\n b\n", b" X: a\n", b"X a\n", b"X: \0\n"])
def test_what_else_is_wrong_with_such_lines_is_refused(line: bytes) -> None:
    reader = ResponseReader(b"GET")
    reader.feed(b"HTTP/1.1 200 OK\n" + line + b"\n")
    assert reader.error is not None
    assert reader.error.status == 502


def test_a_response_until_the_close_is_complete_at_the_close() -> None:
    reader = ResponseReader(b"GET")
    reader.feed(b"HTTP/1.1 200 OK\r\n\r\nab")
    reader.feed(b"\r\n\r\ncd")
    assert not reader.complete
    reader.end()
    assert reader.complete
    assert not reader.is_reusable
    assert b"".join(reader.body) == b"ab\r\n\r\ncd"


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\na", b"HTT"])
def test_an_end_does_not_complete_other_responses(data: bytes) -> None:
    reader = ResponseReader(b"GET")
    reader.feed(data)
    reader.end()
    assert not reader.complete


@settings(deadline=None)
@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=4))
def test_any_bytes_give_messages_or_one_error(data: bytes, cuts: list[int]) -> None:
    readers: list[Any] = [RequestReader(), ResponseReader(b"GET")]
    for reader in readers:
        for piece in cut(data, cuts):
            reader.feed(piece)
        assert reader.error is None or 400 <= reader.error.status < 600


ALPHABET = st.sampled_from(
    [
        *(b"GET / HTTP/1.1\r\n", b"POST /x HTTP/1.1\r\n", b"Host: a\r\n", b"\r\n", b"\n", b"\r"),
        *(b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"abc", b"3\r\n", b"0\r\n"),
        *(b"Connection: close\r\n", b"Upgrade: x\r\n", b"Connection: upgrade\r\n", b" ", b":"),
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(ALPHABET, max_size=25), st.lists(st.integers(0, 300), max_size=4))
def test_near_requests_give_the_same_however_they_are_cut(
    words: list[bytes], cuts: list[int]
) -> None:
    data = b"".join(words)
    outcomes = []
    for pieces in ([data], cut(data, cuts)):
        reader, seen = RequestReader(), []
        for piece in pieces:
            reader.feed(piece)
            while reader.request is not None and reader.request.complete:
                seen.append((reader.request.head.method, reader.request.take_body()))
                reader.resume()
        outcomes.append([(method, b"".join(body)) for method, body in seen])
    assert outcomes[0] == outcomes[1]


def test_a_request_can_be_sent_again_while_it_is_small() -> None:
    reader = RequestReader()
    reader.feed(b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\nab")
    request = reader.request
    assert request is not None
    assert request.take_body() == [b"ab"]
    reader.feed(b"cd")
    request.rewind()
    assert request.take_body() == [b"ab", b"cd"]
    assert request.is_replayable
    reader.feed(b"x" * REPLAY_BYTES)
    request.take_body()
    assert not request.is_replayable


def test_what_follows_a_request_is_left_alone() -> None:
    reader = RequestReader()
    reader.feed(REQUESTS[5] + b"\x00\xffnot HTTP")
    assert reader.error is None
    assert reader.rest == b"\x00\xffnot HTTP"
    reader.resume()
    assert reader.error is not None


@pytest.mark.parametrize(
    ("authority", "host"),
    [
        (b"A.Test", "a.test"),
        (b"a.test:80", "a.test"),
        (b"a.test.:80", "a.test"),
        (b"[::1]:8080", "[::1]"),
        (b"127.0.0.1", "127.0.0.1"),
        (b"a_b-c.test", "a_b-c.test"),
    ],
)
def test_authorities(authority: bytes, host: str) -> None:
    assert parse_authority(authority) == host


@pytest.mark.parametrize("authority", [b"", b":80", b"a b", b"a/b", b"a@b", b"a:b", b"a,b", b"[x"])
def test_what_is_no_authority(authority: bytes) -> None:
    with pytest.raises(BadMessage):
        parse_authority(authority)
