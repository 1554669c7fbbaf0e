"""A guest's processes, as its agent tells them and as it might."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.errors import ProtocolError
from tabane.guest.processes import MOST_PROCESSES, parse_processes

STAT = (
    b"%d (%b) S 1 42 42 34817 42 4194304 100 0 0 0 250 50 0 0 20 5 3 0 1200 4096000 300"
    b" 18446744073709551615 1 1 0 0 0 0 0 0 0 0 0 0 17 0 0 0\n"
)


def field(tag: str, value: bytes | int) -> bytes:
    if isinstance(value, int):
        value = value.to_bytes(8, "little")
    return tag.encode() + struct.pack("<I", len(value)) + value


CLOCK = field("U", 20_000) + field("T", 100)


def record(pid: int, name: bytes = b"sh", command: bytes = b"sh\0-c\0x y\0") -> bytes:
    whole = field("s", STAT % (pid, name)) + field("u", 33) + field("g", 34)
    return whole + (field("c", command) if command else b"") + field(".", b"")


def test_a_process() -> None:
    (found,) = parse_processes(CLOCK + record(42, b"a (b) c"))
    assert (found.inside, found.pid, found.ppid, found.name) == ("guest", 42, 1, "a (b) c")
    assert (found.command, found.uid, found.gid, found.state) == ("sh -c x y", 33, 34, "S")
    assert (found.tty, found.nice, found.threads) == ("pts/1", 5, 3)
    assert (found.cpu_s, found.elapsed_s, found.start_ticks) == (3.0, 8.0, 1200)
    assert (found.vsz_kib, found.rss_kib) == (4000, 1200)


def test_without_a_command_line_it_has_its_name() -> None:
    assert parse_processes(CLOCK + record(1, command=b""))[0].command == "[sh]"


def test_what_is_no_process_counts_for_none() -> None:
    told = CLOCK + field("s", b"nonsense") + field(".", b"") + record(5) + record(0) + record(-3)
    assert [process.pid for process in parse_processes(told)] == [5]


def test_there_is_an_end_to_them_and_none_is_there_twice() -> None:
    told = CLOCK + b"".join(record(pid) for pid in range(1, MOST_PROCESSES + 100)) + record(1)
    found = parse_processes(told)
    assert len(found) == len({process.pid for process in found}) == MOST_PROCESSES


def test_a_list_that_breaks_off() -> None:
    with pytest.raises(ProtocolError):
        parse_processes((CLOCK + record(7))[:-3])


@given(st.binary(max_size=300))
def test_any_bytes_are_processes_or_one_error(data: bytes) -> None:
    try:
        parse_processes(CLOCK + field("s", data) + field("u", data[:9]) + field(".", b"") + data)
    except ProtocolError:
        pass
