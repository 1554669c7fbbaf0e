"""People at `nc` in the lobby, and programs beside them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tabane.middlecon.addresses import describe
from tabane.middlecon.chat import (
    INVALID,
    LOBBY,
    SHOWN_LINES,
    Crowd,
    Lines,
    Lobby,
    Person,
    sniff,
)
from tabane.middlecon.frames import Kind, encode_frame
from tabane.middlecon.receipts import parse_receipt
from tabane.middlecon.session import Mode

# Lines, without IO


def cut_up(data: bytes, cuts: list[int], limit: int = 8) -> list[bytes]:
    lines, given, start = Lines(limit), [], 0
    for end in [*sorted(cuts), len(data)]:
        given += lines.feed(data[start:end])
        start = max(start, end)
    return given + lines.end()


texts = st.lists(st.sampled_from([b"\n", b"\r", b"a", b"\xe3\x81\x93", b"\xff", b"0123456789"]))


@given(texts.map(b"".join), st.lists(st.integers(0, 300), max_size=8))
def test_however_bytes_are_cut_the_lines_are_the_same(data, cuts):
    expected = [line[:9] for line in data.split(b"\n")]
    if len(expected[-1]) == 0:
        expected.pop()
    assert cut_up(data, cuts) == expected
    assert cut_up(data, list(range(len(data)))) == expected


@pytest.mark.parametrize(
    ("address", "name"),
    [
        (("127.0.0.1", 5000), "127.0.0.1:5000"),
        (("::1", 5000), "[::1]:5000"),
        (("::ffff:10.0.0.1", 1), "10.0.0.1:1"),
    ],
)
def test_addresses_as_names(address, name):
    assert describe(address) == name


# The lobby, without IO


class Hall:
    """A lobby and its people."""

    def __init__(self, brain) -> None:
        self.brain = brain
        self.lobby = Lobby(brain.directory, brain.relay.receive)
        brain.relay.crowd = self.lobby.crowd

    def person(self, name: str) -> Person:
        person = Person(name, lambda: None)
        self.lobby.enter(person)
        return person


@pytest.fixture
def hall(brain):
    return Hall(brain)


def shown(person: Person) -> bytes:
    out, person.out = b"".join(person.out), []
    return out


def test_a_line_goes_to_all_but_its_sender(hall):
    a, b, c = (hall.person(name) for name in "abc")
    assert hall.lobby.receive(a, "こんにちは\r\n\n\tlast".encode())
    assert shown(a) == b"" and shown(b) == shown(c) == "a: こんにちは\r\na: \n".encode()
    hall.lobby.end(a)
    hall.lobby.leave(a)
    assert shown(b) == shown(c) == b"a: \tlast\n"
    hall.lobby.receive(b, b"x\n")
    assert shown(a) == b"" and shown(c) == b"b: x\n"


def test_half_characters_between_reads_are_one_line_and_halves_alone_are_not_valid(hall):
    a, b = hall.person("a"), hall.person("b")
    for byte in "é漢😀\n".encode():
        hall.lobby.receive(a, bytes([byte]))
    assert shown(b) == "a: é漢😀\n".encode()
    hall.lobby.receive(a, "é".encode()[:1] + b"\nok\n")
    assert (shown(a), shown(b)) == (INVALID, b"a: ok\n")
    hall.lobby.receive(a, b"\xf0\x9f")
    hall.lobby.end(a)
    assert (shown(a), shown(b)) == (INVALID, b"")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # it is a class
@given(st.lists(st.binary(max_size=40)))
def test_any_bytes_are_lines_or_an_answer_and_what_is_shown_is_text(make_brain, chunks):
    hall = Hall(make_brain(line_bytes=16))
    a, b = hall.person("a"), hall.person("b")
    for chunk in chunks:
        if not hall.lobby.receive(a, chunk):
            break
    hall.lobby.end(a)
    *lines, end = shown(b).decode().split("\n")
    assert end == "" and all(line.startswith("a: ") for line in lines)
    assert set(re.split(rb"(?<=\n)", shown(a))) <= {
        b"",
        INVALID,
        b"Your line has more than 16 bytes: its rest was dropped.\n",
    }


def test_a_long_line_is_answered_and_cut_between_characters(make_brain):
    hall = Hall(make_brain(line_bytes=10))
    a, b = hall.person("a"), hall.person("b")
    hall.lobby.receive(a, b"0123456789\n" + "漢".encode() * 1000)
    hall.lobby.receive(a, b"more\nnext\n")
    assert shown(b) == "a: 0123456789\na: 漢漢漢\na: next\n".encode()
    assert shown(a) == b"Your line has more than 10 bytes: its rest was dropped.\n"


def test_lines_are_never_longer_than_a_frame(make_brain, take):
    hall = Hall(make_brain(data_bytes=4))
    x = hall.brain.session("x")
    hall.brain.join(x, LOBBY, 1)
    a = hall.person("a")
    take(x)
    hall.lobby.receive(a, b"123456\n")
    (cast,) = take(x)
    assert cast.data == b"1234"


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\n", b"POST /x\n", b"PATCH / HTTP/1.1\n"])
def test_a_first_line_of_http_is_refused_however_it_is_cut(hall, line):
    a, b = hall.person("a"), hall.person("b")
    assert [hall.lobby.receive(a, bytes([byte])) for byte in line][-1] is False
    assert shown(b) == b""
    b.spoke = True
    assert hall.lobby.receive(b, line) and shown(a) == b"b: " + line
    assert sniff(line) is Mode.HTTP


def test_programs_are_heard_line_by_line_without_what_terminals_obey(hall, take):
    x, y = hall.brain.session("x"), hall.brain.session("y")
    number = hall.brain.join(x, LOBBY, 1)
    hall.brain.join(y, LOBBY, 1)
    a = hall.person("a")
    take(x)
    hall.brain.tell(x, Kind.CAST, to=number, data=b"1\x1b[2J\t\r\n\n2\xff\n")
    assert shown(a) == "x: 1[2J\t\r\nx: \nx: 2\N{REPLACEMENT CHARACTER}\n".encode()
    hall.brain.tell(x, Kind.CAST, to=number)
    assert shown(a) == b"x: \n"
    hall.brain.tell(x, Kind.CAST, to=number, data=b"\n" * 1_000_000)
    lines = shown(a).splitlines()
    assert len(lines) == SHOWN_LINES + 1 and lines[-1] == b"x: ... (999000 more lines)"
    hall.lobby.crowd.send_first(encode_frame(Kind.CAST, name="x", data=b"urgent"))
    assert shown(a) == b"x: urgent\n"
    hall.lobby._show("n\x1b[1m\n", b"")
    assert shown(a) == b"n[1m: \n"


def test_a_receipt_counts_those_who_were_shown(make_brain, take):
    hall = Hall(make_brain(queue_bytes=10))
    x, y = hall.brain.session("x"), hall.brain.session("y")
    number = hall.brain.join(x, LOBBY, 1)
    hall.brain.join(y, LOBBY, 1)
    a, b, slow = (hall.person(name) for name in ("a", "b", "slow"))
    slow.backlog = 11
    take(x), take(y)
    hall.brain.tell(x, Kind.SAY, to=number, id=5, value=1000, data=b"hi\nyou")
    (copy,) = take(y)
    (receipt,) = (hall.brain.tell(y, Kind.ACK, id=copy.id), take(x))[1]
    total = parse_receipt(receipt)
    assert (total.acknowledged, total.told, total.failed) == (["y"], 2, {})
    assert shown(a) == shown(b) == b"x: hi\nx: you\n"
    assert (shown(slow), slow.dropped) == (b"", 2)


def test_one_is_stuck_after_so_many_checks_in_a_row_above_the_limit(make_brain):
    hall = Hall(make_brain(queue_bytes=10))
    a = hall.person("a")
    seen = []
    for backlog in (11, 11, 10, 11, 11, 11):
        a.backlog = backlog
        seen.append(hall.lobby.is_stuck(a, 2))
    assert seen == [False] * 5 + [True]


def test_the_bytes_in_the_manual():
    data = "やあ\r".encode()
    frame = encode_frame(Kind.CAST, to=3, name="127.0.0.1:5000", data=data)
    page = (Path(__file__).parents[2] / "docs/protocol.md").read_text()
    assert frame.hex() in re.sub(r"\s", "", page)


def test_people_are_a_member_while_there_are_any(hall):
    members = hall.brain.directory.members
    a, b = hall.person("a"), hall.person("b")
    assert list(members) == ["people@h"]
    hall.lobby.leave(a)
    assert list(members) == ["people@h"]
    hall.lobby.leave(b)
    hall.lobby.leave(b)
    assert not members and not hall.brain.directory.rooms
    hall.person("c")
    assert list(members) == ["people@h"]


def test_the_name_of_a_crowd_is_a_name(make_brain):
    crowd = Hall(make_brain("漢" * 85)).lobby.crowd
    assert isinstance(crowd, Crowd) and len(crowd.name.encode()) <= 255
