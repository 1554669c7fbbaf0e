"""What guests are told, and what of their answers is believed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tabane.errors import ProtocolError, UsageError
from tabane.guest.frames import MAX_PAYLOAD
from tabane.guest.orders import (
    CAPABILITIES,
    SECTOR_BYTES,
    START_MAGIC,
    ContainerOrder,
    Identity,
    StartOrder,
    encode_execution,
    encode_identity,
    encode_limits,
    encode_start,
    encode_transfer,
    mask_of,
    parse_fields,
    parse_numbers,
)
from tabane.runtimes.api import Execution, TerminalSize, Transfer, User
from tabane.runtimes.bundle import DEFAULT_CAPABILITIES, OPTIONAL_CAPABILITIES

MAIN = ContainerOrder(
    name="main",
    image=0,
    args=("sh", "-c", "echo ümlaut"),
    env=("PATH=/bin", "A="),
    workdir="/srv",
    user=User(33, 34, (44, 45)),
    capabilities=0x800005FB,
    stop_signal=15,
    volumes=((0, "/srv/data"), (2, "/var/lib")),
)
CACHE = ContainerOrder("cache", 1, ("cached",), (), "/", User(0, 0), 0, 3)
ORDER = StartOrder(
    containers=(CACHE, MAIN),
    hostname="guest",
    address="100.64.0.2",
    mac="02:7a:b0:01:00:01",
    gateway="100.64.0.1",
    gateway_mac="02:7a:b0:00:00:01",
    files={"hosts": "127.0.0.1 localhost\n"},
    memory_bytes=48 << 20,
    pids=64,
    seed=b"entropy",
    clock_ns=1_700_000_000_000_000_000,
    stop_timeout_s=2.5,
    services=("hub.sock", "k2i.sock"),
)


def fields_of(disk: bytes) -> list[tuple[bytes, bytes]]:
    assert disk.startswith(START_MAGIC) and len(disk) % SECTOR_BYTES == 0
    (length,) = struct.unpack_from("<I", disk, len(START_MAGIC))
    start = len(START_MAGIC) + 4
    assert not disk[start + length :].strip(b"\0")
    return list(parse_fields(disk[start : start + length]))


def test_a_start_order() -> None:
    fields = fields_of(encode_start(ORDER))
    single = dict(fields)
    assert single[b"A"] == bytes([100, 64, 0, 2])
    assert single[b"M"] == bytes.fromhex("027ab0000001")
    assert single[b"f"] == b"hosts=127.0.0.1 localhost\n"
    assert int.from_bytes(single[b"T"], "little") == 2500
    assert [value for tag, value in fields if tag == b"x"] == [b"hub.sock", b"k2i.sock"]


def test_what_follows_a_container_s_name_is_its_own() -> None:
    """All that is the machine's comes before."""
    fields = fields_of(encode_start(ORDER))
    begins = [number for number, (tag, _) in enumerate(fields) if tag == b"N"]
    cache, main = fields[begins[0] : begins[1]], fields[begins[1] :]
    assert not {b"h", b"A", b"m", b"x"} & {tag for tag, _ in cache + main}
    assert dict(cache)[b"N"] == b"cache" and dict(cache)[b"I"] == b"image1"
    assert int.from_bytes(dict(cache)[b"S"], "little") == 3
    assert tuple(value.decode() for tag, value in main if tag == b"a") == MAIN.args
    assert int.from_bytes(dict(main)[b"c"], "little") == MAIN.capabilities
    assert [value for tag, value in main if tag == b"v"] == [b"0=/srv/data", b"2=/var/lib"]
    groups = [int.from_bytes(value, "little") for tag, value in main if tag == b"G"]
    assert groups == [44, 45]


def test_without_a_neighbour_the_guest_has_to_ask() -> None:
    assert dict(fields_of(encode_start(replace(ORDER, gateway_mac=""))))[b"M"] == b""


def test_who_a_clone_is_has_the_same_fields_as_a_start_order() -> None:
    epoch = "8a8f9ac6-9e3b-4f0a-8f0e-0d5a1f1c7a11"
    common = {name: getattr(ORDER, name) for name in Identity.__struct_fields__ if name != "epoch"}
    found = dict(parse_fields(encode_identity(Identity(**common, epoch=epoch))))
    told = dict(fields_of(encode_start(ORDER)))
    assert found.pop(b"E") == epoch.encode()
    assert found == {tag: told[tag] for tag in found}
    assert {*found} == {b"f", b"h", b"A", b"H", b"R", b"M", b"m", b"P", b"s", b"C"}
    large = {"hosts": "x" * MAX_PAYLOAD}
    with pytest.raises(UsageError, match="bytes: too many"):
        encode_identity(Identity(**common | {"files": large}, epoch=epoch))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"args": ("x",) * 5000}, "its command has 5000 words, more than 4096"),
        ({"env": ("A=" + "x" * (2 << 20),)}, "bytes: too many"),
        ({"args": ("a\0b",)}, "has a zero byte in it"),
        ({"user": User(0, 0, tuple(range(65)))}, "in 65 groups"),
    ],
)
def test_what_an_agent_cannot_take_is_refused(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        encode_start(replace(ORDER, containers=(CACHE, replace(MAIN, **changes))))


def test_a_command_says_what_it_has_of_its_own() -> None:
    assert list(parse_fields(encode_execution(Execution(("ls",))))) == [(b"a", b"ls")]
    whole = Execution(
        *(("ls", "-l"), User(1, 2), "/tmp", ("A=1",)), stdin=True, terminal=TerminalSize(24, 80)
    )
    found = dict(parse_fields(encode_execution(whole)))
    assert found[b"t"] == bytes([24, 0, 80, 0]) and found[b"i"] == b"" and found[b"w"] == b"/tmp"
    beside = Execution(("ls",), container="cache")
    assert dict(parse_fields(encode_execution(beside)))[b"k"] == b"cache"
    with pytest.raises(UsageError, match="too many"):
        encode_execution(Execution(("x" * MAX_PAYLOAD,)))


def test_a_transfer() -> None:
    assert dict(parse_fields(encode_transfer(Transfer("/a", inward=True)))) == {b"p": b"/a"}
    named = Transfer("/a", inward=True, as_named=True, user=User(5, 6), container="cache")
    assert dict(parse_fields(encode_transfer(named))).keys() == {b"p", b"n", b"u", b"g", b"k"}


def test_limits() -> None:
    assert parse_numbers(encode_limits(1 << 30, 7)) == {b"m": 1 << 30, b"P": 7}


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=1), st.binary(max_size=20))))
def test_fields_come_back(fields: list[tuple[bytes, bytes]]) -> None:
    data = b"".join(tag + struct.pack("<I", len(value)) + value for tag, value in fields)
    assert list(parse_fields(data)) == fields
    if fields:
        with pytest.raises(ProtocolError):
            list(parse_fields(data[:-1] if fields[-1][1] else data + b"x"))


@given(st.binary(max_size=100))
def test_any_bytes_are_fields_or_an_error(data: bytes) -> None:
    try:
        list(parse_fields(data))
    except ProtocolError:
        pass


def test_every_capability_that_an_app_may_have_has_its_bit() -> None:
    assert mask_of(DEFAULT_CAPABILITIES) == 0x800005FB
    assert CAPABILITIES[21] == "SYS_ADMIN" and CAPABILITIES[31] == "SETFCAP"
    for name in DEFAULT_CAPABILITIES | OPTIONAL_CAPABILITIES:
        assert mask_of([name]).bit_count() == 1
