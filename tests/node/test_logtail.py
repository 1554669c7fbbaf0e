"""Who reads a log gets every line once and in order, however it is rotated meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tabane.errors import UsageError
from tabane.node import logtail
from tabane.node.logfile import LogFile, format_stamp, parse_line
from tabane.node.logtail import follow_lines, parse_since, read_lines
from tabane.supervise import Supervisor

AT_NS = 1_769_903_999_000_000_000
SECOND = 10**9
NOW = AT_NS / SECOND


class Writer:
    """An instance, as far as its log goes."""

    def __init__(self, path: Path, max_bytes: int = 400, files: int = 3) -> None:
        self.path = path
        self._log = LogFile(path, max_bytes, files)
        self._count = 0
        self._is_over = False
        self._wakes: set[Callable[[], None]] = set()

    def say(self, count: int) -> None:
        for _ in range(count):
            self._log.write("stdout", b"line %d\n" % self._count, AT_NS + self._count * SECOND)
            self._count += 1

    def end(self) -> None:
        self._log.write("stdout", b"", AT_NS)
        self._log.close()
        self._is_over = True
        for wake in self._wakes:
            wake()

    def goes_on(self) -> bool:
        return not self._is_over

    def subscribe(self, wake: Callable[[], None]) -> Callable[[], None]:
        self._wakes.add(wake)
        return lambda: self._wakes.discard(wake)


class Reader:
    """Follows it."""

    def __init__(self, writer: Writer, *, since: str = "", tail: int = 0) -> None:
        self.texts: list[str] = []
        self.may_read = asyncio.Event()
        self.may_read.set()
        self._grown = asyncio.Event()
        self._lines = follow_lines(writer.path, since, tail, writer)

    async def read(self) -> None:
        async for block in self._lines:
            assert block.endswith(b"\n")
            self.texts += texts(block)
            self._grown.set()
            await self.may_read.wait()

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(60):
            while len(self.texts) < count:
                self._grown.clear()
                await self._grown.wait()


def texts(block: bytes) -> list[str]:
    lines = [parse_line(line) for line in block.splitlines()]
    return [line[3].decode() for line in lines if line is not None]


def wanted(first: int, last: int) -> list[str]:
    return [f"line {n}" for n in range(first, last)]


async def read(writer: Writer, since: str = "", tail: int = 0) -> list[str]:
    return [t async for block in read_lines(writer.path, since, tail) for t in texts(block)]


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(tmp_path / "abc" / "log")


async def test_what_is_there_is_read_over_all_files(writer: Writer) -> None:
    assert await read(writer) == []
    writer.say(20)
    found = await read(writer)
    assert found == wanted(20 - len(found), 20)
    assert len(found) > 15, "more than two files"
    assert await read(writer, tail=3) == wanted(17, 20)
    assert await read(writer, since=format_stamp(AT_NS + 12 * SECOND)) == wanted(12, 20)
    assert await read(writer, since=format_stamp(AT_NS + 12 * SECOND), tail=2) == wanted(18, 20)
    assert await read(writer, since=format_stamp(AT_NS + 99 * SECOND)) == []
    writer.end()


async def test_a_long_line_is_one_of_the_last(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log", 1 << 20, 2)
    log.write("stdout", b"before\n" + b"x" * 40_000 + b"\n", AT_NS)
    log.close()
    block = b"".join([block async for block in read_lines(tmp_path / "log", "", 1)])
    assert [len(text) for text in texts(block)] == [16384, 16384, 7232]


async def test_following_loses_and_repeats_nothing_over_rotations(writer: Writer) -> None:
    reader = Reader(writer)
    async with Supervisor("test") as tasks:
        reading = tasks.start("read", reader.read())
        await asyncio.sleep(0)
        for total in range(7, 700, 7):
            writer.say(7)
            if total % 5 == 0:
                await reader.wait_for(total)
            await asyncio.sleep(0)
        writer.end()
        await reading
    assert reader.texts == wanted(0, 693)


async def test_several_rotations_at_once_are_one_look(writer: Writer) -> None:
    """As when the event loop is busy: the files' order tells."""
    reader = Reader(writer)
    async with Supervisor("test") as tasks:
        reading = tasks.start("read", reader.read())
        writer.say(1)
        await reader.wait_for(1)
        writer.say(15)  # two rotations
        await reader.wait_for(16)
        writer.end()
        await reading
    assert reader.texts == wanted(0, 16)


async def test_who_reads_slowly_still_gets_what_was_rotated_away(writer: Writer) -> None:
    reader = Reader(writer)
    async with Supervisor("test") as tasks:
        reading = tasks.start("read", reader.read())
        writer.say(1)
        await reader.wait_for(1)
        reader.may_read.clear()
        for _ in range(10):
            writer.say(7)
            for _ in range(3):
                await asyncio.sleep(0.001)  # the kernel tells of each rotation
        reader.may_read.set()
        writer.end()
        await reading
    assert reader.texts == wanted(0, 71)


@pytest.mark.parametrize("since", ["", "1970-01-01T00:00:00.000000001Z"])
async def test_what_was_lost_is_said(writer: Writer, since: str) -> None:
    reader = Reader(writer, since=since)
    async with Supervisor("test") as tasks:
        reading = tasks.start("read", reader.read())
        writer.say(1)
        await reader.wait_for(1)
        writer.say(200)  # nobody looks meanwhile
        writer.end()
        await reading
    assert "tabane: lines are missing here: they were rotated away unread" in reader.texts
    assert reader.texts[-10:] == wanted(191, 201)


async def test_following_begins_where_it_is_told(writer: Writer) -> None:
    writer.say(8)
    tail = Reader(writer, tail=2)
    since = Reader(writer, since=format_stamp(AT_NS + 10 * SECOND))
    async with Supervisor("test") as tasks:
        reading = [tasks.start("tail", tail.read()), tasks.start("since", since.read())]
        await tail.wait_for(2)
        writer.say(4)
        await tail.wait_for(6)
        writer.end()
        await asyncio.wait(reading)
    assert tail.texts == wanted(6, 12)
    assert since.texts == wanted(10, 12)


async def test_where_the_kernel_does_not_tell_it_is_asked(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logtail._Watch, "_add", lambda *_: False)
    monkeypatch.setattr(logtail, "POLL_S", 0.001)
    reader = Reader(writer)
    async with Supervisor("test") as tasks:
        reading = tasks.start("read", reader.read())
        for total in range(3, 60, 3):
            writer.say(3)
            await reader.wait_for(total)
        writer.end()
        await reading
    assert reader.texts == wanted(0, 57)


async def test_a_cut_line_is_not_glued_to_the_next(tmp_path: Path) -> None:
    stamp = format_stamp(AT_NS).encode()
    (tmp_path / "log.1").write_bytes(stamp + b" stdout F one\n" + stamp + b" stdou")
    (tmp_path / "log").write_bytes(stamp + b" stdout F two\n")
    found = [block async for block in read_lines(tmp_path / "log", "", 0)]
    assert texts(b"".join(found)) == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "at_ns"),
    [
        ("10m", AT_NS - 600 * SECOND),
        ("1h30m", AT_NS - 5400 * SECOND),
        ("5400", AT_NS - 5400 * SECOND),
        ("100000h", AT_NS - 360_000_000 * SECOND),
        ("2026-01-31T23:59:59Z", AT_NS),
        ("2026-01-31t23:59:59.5z", AT_NS + SECOND // 2),
        ("2026-02-01T08:59:59+09:00", AT_NS),
        ("1960-01-01T00:00:00Z", 0),
    ],
)
def test_since(text: str, at_ns: int) -> None:
    assert parse_since(text, NOW) == format_stamp(at_ns)


@pytest.mark.parametrize("text", ["yesterday", "2026-01-31", "2026-02-30T00:00:00Z", "-5m", " "])
def test_what_is_no_moment(text: str) -> None:
    with pytest.raises(UsageError, match="since: "):
        parse_since(text, NOW)
