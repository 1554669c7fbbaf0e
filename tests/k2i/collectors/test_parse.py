"""What others say of themselves, as facts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.errors import ProtocolError
from tabane.k2i.collectors.api import (
    MAX_FACTS,
    MAX_NAME_BYTES,
    MAX_READINGS,
    MAX_TEXT_BYTES,
    Reading,
)
from tabane.k2i.collectors.parse import parse_info, parse_output, parse_stub_status, read_value

STUB_STATUS = (
    b"Active connections: 291 \n"
    b"server accepts handled requests\n"
    b" 16630948 16630947 31070465 \n"
    b"Reading: 6 Writing: 179 Waiting: 106 \n"
)
INFO = (
    b"# Server\r\nredis_version:7.0.15\r\nprocess_id:41\r\nuptime_in_seconds:0\r\n"
    b"executable:/usr/bin/redis-server\r\nconfig_file:\r\n\r\n# Memory\r\n"
    b"mem_fragmentation_ratio:9.53\r\nused_memory_human:1.02M\r\n\r\n"
    b"# Keyspace\r\ndb0:keys=3,expires=1,avg_ttl=99\r\n"
)


def test_lines_of_names_and_values() -> None:
    text = b"# degrees\n\ntemperature 51.5\nfan.rpm: 2100\nalarm=false\nroom north wing \n"
    facts = {"temperature": 51.5, "fan.rpm": 2100, "alarm": False, "room": "north wing"}
    assert parse_output(text) == [Reading(facts)]


def test_an_object_is_flattened() -> None:
    text = b'{"memory": {"used": 3, "free": {"low": 1}}, "note": null, "on": true}'
    assert parse_output(text) == [Reading({"memory.used": 3, "memory.free.low": 1, "on": True})]


def test_an_array_says_whose_facts_they_are() -> None:
    text = b'[{"pid": 7, "facts": {"a": 1}}, {"instance": "x1", "facts": {"b": 2}}]'
    assert parse_output(text) == [Reading({"a": 1}, pid=7), Reading({"b": 2}, instance="x1")]


def test_nothing_printed_is_no_facts() -> None:
    assert parse_output(b"\n") == [Reading({})]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"lonely", "'lonely', which is no `name value`"),
        (b'{"a": 1', "begins like JSON and is none"),
        (b'{"a": [1, 2]}', "'a' is a list"),
        (b'[{"pid": 7}]', "which has no `facts`"),
        (b"[3]", "which has no `facts`"),
        (b'[{"pid": "7", "facts": {}}]', "there may be a `pid` or an `instance`"),
        (b'[{"pid": -1, "facts": {}}]', "there may be a `pid` or an `instance`"),
        (b'[{"uid": 1, "facts": {}}]', "there may be a `pid` or an `instance`"),
        (json.dumps({"\x1b[31mred": 1}).encode(), "names no fact"),
        (b'{"": 1}', "names no fact"),
        (b"%b 1" % (b"n" * (MAX_NAME_BYTES + 1)), "names no fact"),
        (b"".join(b"n%d 1\n" % n for n in range(MAX_FACTS + 1)), f"{MAX_FACTS} are the most"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "too deeply"),
        (b"[" * 100_000, "too deeply"),
        (b"[%b]" % b",".join([b'{"facts":{}}'] * (MAX_READINGS + 1)), f"{MAX_READINGS} are the"),
    ],
)
def test_what_is_no_output(text: bytes, sentence: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_output(text)
    assert sentence in caught.value.message
    assert caught.value.message.isprintable()


@given(st.binary(max_size=400))
def test_any_output_is_facts_or_an_error(data: bytes) -> None:
    try:
        readings = parse_output(data)
    except ProtocolError:
        return
    for reading in readings:
        for value in reading.facts.values():
            assert json.loads(json.dumps(value, allow_nan=False)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("12", 12), ("-3", -3), ("2.5", 2.5), ("1e3", 1000.0), ("true", True), ("yes", "yes")),
        *(("nan", "nan"), ("inf", "inf"), ("1_000", 1000.0), ("0x10", "0x10"), ("1.2.3", "1.2.3")),
        ("9" * 30, 1e30),
    ],
)
def test_values(text: str, value: object) -> None:
    assert (read_value(text), type(read_value(text))) == (value, type(value))


def test_long_texts_are_cut_and_large_numbers_stay_numbers() -> None:
    (reading,) = parse_output(b'{"text": "%b", "n": %b}' % ("é".encode() * 4000, b"9" * 25))
    assert reading.facts == {"text": "é" * (MAX_TEXT_BYTES // 2), "n": 1e25}


def test_stub_status() -> None:
    assert parse_stub_status(STUB_STATUS) == {
        "connections.active": 291,
        "connections.accepted": 16630948,
        "connections.handled": 16630947,
        "requests": 31070465,
        "connections.reading": 6,
        "connections.writing": 179,
        "connections.waiting": 106,
    }


@pytest.mark.parametrize("page", [b"", b"<html>", STUB_STATUS[:-30], STUB_STATUS + b"more"])
def test_another_page_is_no_stub_status(page: bytes) -> None:
    with pytest.raises(ProtocolError, match="no stub_status"):
        parse_stub_status(page)


def test_info() -> None:
    assert parse_info(INFO) == {
        "redis_version": "7.0.15",
        "process_id": 41,
        "uptime_in_seconds": 0,
        "executable": "/usr/bin/redis-server",
        "config_file": "",
        "mem_fragmentation_ratio": 9.53,
        "used_memory_human": "1.02M",
        "db0.keys": 3,
        "db0.expires": 1,
        "db0.avg_ttl": 99,
    }


@given(st.binary(max_size=300))
def test_any_info_is_facts_or_an_error(data: bytes) -> None:
    try:
        parse_info(data)
    except ProtocolError as error:
        assert error.message.isprintable()
