"""The messages of the kernel's process event connector, as linux/cn_proc.h lays them out."""

import signal
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.k2i.events import IGNORE, Told, encode_listen, exit_of, parse_told

KINDS = ("ack", "fork", "exec", "uid", "gid", "comm", "exit")
FORK, EXEC, UID, GID, SID, COMM, EXIT = 1, 2, 4, 0x40, 0x80, 0x200, 0x80000000


def message(what: int, body: bytes, *, idx: int = 1, val: int = 1) -> bytes:
    event = struct.pack("=IIQ", what, 1, 5_000_000_000) + body.ljust(24, b"\0")
    connector = struct.pack("=IIIIHH", idx, val, 7, 0, len(event), 0) + event
    return struct.pack("=IHHII", 16 + len(connector), 3, 0, 0, 0) + connector


def test_the_request_is_what_the_kernel_expects() -> None:
    data = encode_listen()
    assert struct.unpack("=IHHII", data[:16]) == (40, 3, 0, 0, 0)
    assert struct.unpack("=IIIIHHI", data[16:]) == (1, 1, 0, 0, 4, 0, 1)
    assert encode_listen(IGNORE)[-4:] == struct.pack("=I", 2)


@pytest.mark.parametrize(
    ("what", "body", "told"),
    [
        (0, struct.pack("=I", 1), Told("ack", 5_000_000_000, number=1)),
        (FORK, struct.pack("=4i", 11, 10, 20, 20), Told("fork", 5_000_000_000, 20, 10)),
        (EXEC, struct.pack("=2i", 20, 20), Told("exec", 5_000_000_000, 20)),
        (UID, struct.pack("=2i2I", 20, 20, 5, 6), Told("uid", 5_000_000_000, 20, number=6)),
        (GID, struct.pack("=2i2I", 20, 20, 7, 8), Told("gid", 5_000_000_000, 20, number=8)),
        (
            COMM,
            struct.pack("=2i16s", 20, 20, b"a\nb\xff"),
            Told("comm", 5_000_000_000, 20, name=b"a\nb\xff"),
        ),
        (
            EXIT,
            struct.pack("=2i2I2i", 20, 20, 0x300, 17, 11, 10),
            Told("exit", 5_000_000_000, 20, 10, 0x300),
        ),
        (FORK, struct.pack("=4i", 10, 10, 21, 20), None),
        (EXIT, struct.pack("=2i2I2i", 21, 20, 0, 0, 11, 10), None),
        (SID, struct.pack("=2i", 20, 20), None),
    ],
)
def test_what_is_told(what: int, body: bytes, told: Told | None) -> None:
    assert parse_told(message(what, body)) == told
    assert parse_told(message(what, body) + b"trailing") == told


def test_what_is_cut_off_or_of_another_is_refused() -> None:
    whole = message(EXIT, struct.pack("=2i2I2i", 20, 20, 0, 0, 11, 10))
    for size in range(len(whole)):
        with pytest.raises(ValueError, match="process event"):
            parse_told(whole[:size])
    with pytest.raises(ValueError, match=r"of 3\.1 is no process event"):
        parse_told(message(EXEC, struct.pack("=2i", 20, 20), idx=3))


@given(st.binary(max_size=120))
def test_any_bytes_are_told_or_refused(data: bytes) -> None:
    for head in (b"", message(COMM, b"")[:52]):
        try:
            told = parse_told(head + data)
        except ValueError as error:
            assert "process event" in str(error)
        else:
            assert told is None or told.kind in KINDS


def test_how_a_process_ended() -> None:
    assert exit_of(0x300) == (3, None)
    assert exit_of(0) == (0, None)
    assert exit_of(signal.SIGKILL) == (None, 9)
    assert exit_of(signal.SIGSEGV | 0x80) == (None, 11)
