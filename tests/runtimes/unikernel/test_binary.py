"""What is read of WebAssembly files, whole, broken off and arbitrary."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.errors import UsageError
from tabane.runtimes.unikernel.binary import (
    COMPONENT,
    MODULE,
    Binary,
    Import,
    check_entry,
    check_imports,
    parse_binary,
)
from tabane.runtimes.unikernel.wasmtime import TRIAL

WASI = "wasi_snapshot_preview1"


def name(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def section(kind: int, *entries: bytes) -> bytes:
    content = bytes([len(entries)]) + b"".join(entries)
    return bytes([kind, len(content)]) + content


EVERY_KIND = section(
    2,
    name("a") + name("function") + b"\0\x07",
    name("a") + name("table") + b"\x01\x70\x01\x01\x80\x01",
    name("a") + name("memory") + b"\x02\0\x10",
    name("a") + name("global") + b"\x03\x7f\0",
    name("a") + name("tag") + b"\x04\0\0",
)
EXPORTS = section(7, name("_start") + b"\0\x05", name("memory") + b"\x02\0")
PARTS = section(
    10,
    b"\0" + name("wasi:io/error@0.2.0") + b"\x05\x01",
    b"\0" + name("of-a-type") + b"\x03\x01",
    b"\0" + name("of-a-bound") + b"\x03\0\x02",
    b"\0" + name("core") + b"\0\x11\x03",
)
OFFERS = section(
    11,
    b"\0" + name("wasi:http/incoming-handler@0.2.0") + b"\x05\x01\0",
    b"\0" + name("plain") + b"\0\x11\x02\x01\x01\x04",
)


def test_a_module() -> None:
    found = parse_binary(MODULE + b"\0\x03\x02no" + EVERY_KIND + EXPORTS)
    kinds = ("function", "table", "memory", "global", "tag")
    assert found.imports == tuple(Import("a", kind, kind) for kind in kinds)
    assert found.exports == ("_start", "memory")
    assert not found.is_component and not found.handles_http


def test_a_component() -> None:
    found = parse_binary(COMPONENT + PARTS + OFFERS)
    assert [(each.name, each.kind) for each in found.imports] == [
        ("wasi:io/error@0.2.0", "instance"),
        ("of-a-type", "type"),
        ("of-a-bound", "type"),
        ("core", "module"),
    ]
    assert found.exports == ("wasi:http/incoming-handler@0.2.0", "plain")
    assert found.is_component and found.handles_http


def test_the_trial_program() -> None:
    assert parse_binary(TRIAL) == Binary(False, (), ("_start",))


@pytest.mark.parametrize("whole", [MODULE + EVERY_KIND + EXPORTS, COMPONENT + PARTS + OFFERS])
def test_broken_off_anywhere(whole: bytes) -> None:
    """It is either whole up to a section's end, or refused."""
    for size in range(len(whole)):
        try:
            found = parse_binary(whole[:size])
        except UsageError as refusal:
            assert "WebAssembly" in str(refusal)
        else:
            assert len(found.imports) + len(found.exports) < 8


@given(st.sampled_from([MODULE, COMPONENT, b""]), st.binary(max_size=200))
def test_arbitrary_bytes(begin: bytes, rest: bytes) -> None:
    try:
        parse_binary(begin + rest)
    except UsageError:
        pass


def module(*imports: Import) -> Binary:
    return Binary(False, imports, ("_start",))


def test_imports() -> None:
    functions = frozenset({"fd_write"})
    check_imports(module(Import(WASI, "fd_write", "function")), functions)
    for each, words in (
        (Import(WASI, "sock_open", "function"), f"function {WASI}.sock_open"),
        (Import("env", "fd_write", "function"), "function env.fd_write"),
        (Import(WASI, "fd_write", "memory"), f"memory {WASI}.fd_write"),
    ):
        with pytest.raises(UsageError, match=words):
            check_imports(module(each), functions)
    check_imports(Binary(True, (Import("", "wasi:http/types@0.2.0", "instance"),), ()), functions)
    for text in ("wasi:nn/tensor@0.2.0", "mine:own/thing", "plain"):
        with pytest.raises(UsageError, match=text):
            check_imports(Binary(True, (Import("", text, "instance"),), ()), functions)


def test_entries() -> None:
    check_entry(module(), serves=True)
    check_entry(module(), serves=False)
    http = Binary(True, (), ("wasi:http/incoming-handler@0.2.3",))
    check_entry(http, serves=True)
    run = Binary(True, (), ("wasi:cli/run@0.2.0",))
    check_entry(run, serves=False)
    for binary, serves, words in (
        (Binary(False, (), ("main",)), True, "exports no _start"),
        (run, True, "it exports no wasi:http/incoming-handler"),
        (http, False, "give the app a port"),
    ):
        with pytest.raises(UsageError, match=words):
            check_entry(binary, serves=serves)
