"""Whatever a program writes, in whatever pieces, can be read back from its log."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.node import logfile
from tabane.node.logfile import LINE_BYTES, LogFile, format_stamp, parse_line

AT_NS = 1_769_903_999_123_456_789
SMALL_LINE_BYTES = 5
NUMBERS = itertools.count()

outputs = st.lists(st.sampled_from([b"\n", b"a", b" ", b"\r", b"\0", b"\xff", b"P F"]), max_size=40)
pieces = st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), outputs.map(b"".join)))


def read_back(path: Path, stream: str) -> bytes:
    found = b""
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
        parsed = parse_line(line)
        assert parsed is not None
        if parsed[1] == stream:
            found += parsed[3] + (b"\n" if parsed[2] else b"")
    return found


def with_an_end(output: bytes) -> bytes:
    return output if output.endswith(b"\n") or not output else output + b"\n"


@given(written=pieces)
def test_any_split_of_any_output_comes_back(
    tmp_path_factory: pytest.TempPathFactory, written: list[tuple[str, bytes]]
) -> None:
    path = tmp_path_factory.getbasetemp() / f"log-{next(NUMBERS)}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logfile, "LINE_BYTES", SMALL_LINE_BYTES)
        log = LogFile(path, 1 << 30, 1)
        for stream, data in written:
            if data:
                log.write(stream, data, AT_NS)
        for stream in ("stdout", "stderr"):
            log.write(stream, b"", AT_NS)
        log.close()
    for stream in ("stdout", "stderr"):
        output = b"".join(data for name, data in written if name == stream)
        assert read_back(path, stream) == with_an_end(output)
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        parsed = parse_line(line)
        assert parsed is None or len(parsed[3]) <= SMALL_LINE_BYTES


@given(st.binary(max_size=80))
def test_no_line_upsets_the_parser(line: bytes) -> None:
    parsed = parse_line(line)
    assert parsed is None or line.removesuffix(b"\n").endswith(parsed[3])


@pytest.mark.parametrize(
    ("line", "parsed"),
    [
        (b"2026-01-31T23:59:59.5Z stdout F a b\n", ("stdout", True, b"a b")),
        (b"2026-01-31T23:59:59.5Z stderr P a", ("stderr", False, b"a")),
        (b"2026-01-31T23:59:59.5Z stdout F ", ("stdout", True, b"")),
        (b"2026-01-31T23:59:59.5Z stdout F \r\xff", ("stdout", True, b"\r\xff")),
    ],
)
def test_a_line_is_taken_apart(line: bytes, parsed: tuple[str, bool, bytes]) -> None:
    assert parse_line(line) == ("2026-01-31T23:59:59.5Z", *parsed)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"hello",
        b"2026-01-31T23:59:59.5Z stdout F",
        b"2026-01-31T23:59:59.5Z stdout X text",
        b"2026-01-31T23:59:59.5Z std\xff F text",
        b"\xff\xff stdout F text",
        b"yesterday stdout F text",
    ],
)
def test_what_is_no_line_is_none(line: bytes) -> None:
    assert parse_line(line) is None


def test_a_line_as_it_stands(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log", 1 << 20, 1)
    log.write("stdout", b"hel", AT_NS - 1)
    assert not (tmp_path / "log").exists()
    log.write("stdout", b"lo\n", AT_NS)
    log.close()
    log.close()
    assert (tmp_path / "log").read_bytes() == b"2026-01-31T23:59:59.123456789Z stdout F hello\n"


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_only_a_longer_line_is_split(tmp_path: Path, extra: int) -> None:
    log = LogFile(tmp_path / "log", 1 << 20, 1)
    log.write("stdout", b"x" * (LINE_BYTES + extra) + b"\n", AT_NS)
    log.write("stderr", b"x" * (LINE_BYTES + extra), AT_NS)
    log.write("stderr", b"", AT_NS)
    log.close()
    lines = [parse_line(line) for line in (tmp_path / "log").read_bytes().splitlines()]
    lengths = [(line[2], len(line[3])) for line in lines if line is not None]
    one = [(True, LINE_BYTES + extra)] if extra < 1 else [(False, LINE_BYTES), (True, 1)]
    assert lengths == one * 2


@pytest.mark.parametrize(
    ("at_ns", "stamp"),
    [
        (0, "1970-01-01T00:00:00.000000000Z"),
        (1, "1970-01-01T00:00:00.000000001Z"),
        (AT_NS, "2026-01-31T23:59:59.123456789Z"),
    ],
)
def test_stamps_keep_nanoseconds(at_ns: int, stamp: str) -> None:
    assert format_stamp(at_ns) == stamp


@pytest.mark.parametrize("files", [1, 2, 4])
def test_a_file_is_rotated_before_it_is_too_large(tmp_path: Path, files: int) -> None:
    path, line_bytes = tmp_path / "log", len("2026-01-31T23:59:59.123456789Z stdout F 00\n")
    log = LogFile(path, 3 * line_bytes, files)
    for number in range(20):
        log.write("stdout", b"%02d\n" % number, AT_NS)
    log.close()
    names = ["log", *(f"log.{number}" for number in range(1, files))]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == names
    kept = b"".join(read_back(tmp_path / name, "stdout") for name in reversed(names))
    first = 18 - 3 * (files - 1)
    assert kept == b"".join(b"%02d\n" % number for number in range(first, 20))


def test_a_block_larger_than_a_file_is_kept_whole(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log", 10, 2)
    for text in (b"one\n", b"two\nthree\n"):
        log.write("stdout", text, AT_NS)
    log.close()
    assert read_back(tmp_path / "log", "stdout") == b"two\nthree\n"
    assert read_back(tmp_path / "log.1", "stdout") == b"one\n"


def test_a_log_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for text in (b"one\n", b"two\n", b"three\n"):
        log = LogFile(path, 100, 2)
        log.write("stdout", text, AT_NS)
        log.close()
    assert read_back(tmp_path / "log.1", "stdout") == b"one\ntwo\n"
    assert read_back(path, "stdout") == b"three\n"


def test_one_that_could_not_rotate_goes_on_when_it_can(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = LogFile(path, 50, 2)
    log.write("stdout", b"one\n", AT_NS)
    (tmp_path / "log.1").mkdir()
    with pytest.raises(OSError, match=r"log\.1"):
        log.write("stdout", b"two\n", AT_NS)
    (tmp_path / "log.1").rmdir()
    log.write("stdout", b"three\n", AT_NS)
    log.close()
    assert read_back(tmp_path / "log.1", "stdout") == b"one\n"
    assert read_back(path, "stdout") == b"three\n"
