"""A node's process events: where they come from, who gets them, and what is said of gaps."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import pytest

from tabane.errors import Unavailable
from tabane.k2i import Event, EventFeed, Process, ProcessTable
from tabane.k2i.event_feed import MOST_WAITING, RETRY_S, Subscription
from tabane.k2i.event_sources import LINE_BYTES, Collected, compare
from tabane.model import Instance
from tabane.supervise import Supervisor
from tabane.testing import VirtualClock

from .conftest import Start


class Scripted:
    """A source that tells what it is given; None ends it."""

    name = "kernel"

    def __init__(self) -> None:
        self.told: asyncio.Queue[list[Event] | None] = asyncio.Queue()
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        while (events := await self.told.get()) is not None:
            yield events

    def close(self) -> None:
        self.closed = True


class Noted(ProcessTable):
    def __init__(self) -> None:
        super().__init__()
        self.touched: list[int] = []

    def touch(self, pid: int) -> None:
        self.touched.append(pid)


def event(kind: str, pid: int | None = 7) -> Event:
    return Event(kind=kind, at=1.0, pid=pid)


async def test_all_who_subscribed_are_told_in_order_and_the_table_too() -> None:
    source, table = Scripted(), Noted()

    async def open_source() -> Scripted:
        return source

    feed = EventFeed(table, sources=[open_source])
    async with Supervisor("test") as tasks:
        feed.start(tasks)
        await feed.started()
        assert (feed.source, feed.reason, feed.is_whole) == ("kernel", "", True)
        with feed.subscribe() as one, feed.subscribe() as other:
            told = [event("fork"), event("exec"), event("exit"), event("uid", None)]
            await source.told.put(told)
            assert [await anext(one) for _ in told] == told
            assert other.take() == told
            assert other.take() == []
        assert table.touched == [7]
        assert [one async for one in one] == []
    assert source.closed
    table.close()


async def test_a_source_that_is_lost_is_a_gap_and_another_takes_its_place() -> None:
    first, then = Scripted(), [True]

    async def open_source() -> Scripted:
        if not then:
            raise Unavailable("it is not to be had")
        then.clear()
        return first

    table = Noted()
    feed = EventFeed(table, sources=[open_source])
    async with Supervisor("test") as tasks:
        feed.start(tasks)
        await feed.started()
        with feed.subscribe() as events:
            await first.told.put(None)
            gap = await anext(events)
            assert (gap.kind, gap.pid) == ("gap", None)
            assert gap.reason == "the source kernel of process events is lost: it ended"
            gap = await anext(events)
            assert (gap.kind, gap.reason) == ("gap", "process events come from looks now")
            assert (feed.source, feed.is_whole) == ("looks", False)
            assert feed.reason == "it is not to be had"
    assert RETRY_S < 60
    table.close()


class Hurried(VirtualClock):
    """Time passes as soon as somebody waits for it."""

    def call_at(self, when: float, callback: Callable[[], None]) -> asyncio.Handle:
        self.advance(max(0.0, when - self.now()))
        return asyncio.get_running_loop().call_soon(callback)


class Looked(ProcessTable):
    def __init__(self) -> None:
        super().__init__()
        self.looked = threading.Event()

    def processes(self, instances: Iterable[Instance] = ()) -> list[Process]:
        try:
            return super().processes(instances)
        finally:
            self.looked.set()


async def test_without_anything_better_two_looks_are_compared(start: Start) -> None:
    table = Looked()
    feed = EventFeed(table, sources=[], clock=Hurried())
    async with Supervisor("test") as tasks:
        feed.start(tasks)
        await feed.started()
        assert (feed.source, feed.is_whole) == ("looks", False)
        with feed.subscribe() as events:
            await asyncio.to_thread(table.looked.wait)
            child = await asyncio.to_thread(start)
            async for told in events:
                if (told.kind, told.pid) == ("fork", child.pid):
                    break
            assert told.start_ticks is not None
            child.kill()
            child.wait()
            async for told in events:
                if (told.kind, told.pid) == ("exit", child.pid):
                    break
    table.close()


def test_who_is_slow_is_told_of_a_gap() -> None:
    subscription = Subscription(VirtualClock())
    subscription.put([event("fork")] * MOST_WAITING)
    subscription.put([event("exec")])
    (gap,) = subscription.take()
    assert gap.kind == "gap"
    assert gap.reason == f"more than {MOST_WAITING} events waited to be taken"


def test_what_two_looks_show(start: Start) -> None:
    child = start()
    table = ProcessTable()
    (process,) = (process for process in table.processes() if process.pid == child.pid)
    table.close()

    def changed(**values: object) -> object:
        from msgspec.structs import replace

        return replace(process, **values)

    def kinds(before: list, now: list) -> list[tuple[str, int | None]]:  # type: ignore[type-arg]
        return [(told.kind, told.start_ticks) for told in compare(before, now, 5.0)]

    assert kinds([process], [process]) == []
    assert kinds([], [process]) == [("fork", process.start_ticks)]
    assert kinds([process], []) == [("exit", process.start_ticks)]
    assert kinds([process], [changed(command="other")]) == [("exec", process.start_ticks)]
    assert kinds([process], [changed(name="other")]) == [("comm", process.start_ticks)]
    assert kinds([process], [changed(uid=7)]) == [("uid", process.start_ticks)]
    reused = changed(start_ticks=1)
    assert kinds([process], [reused]) == [("exit", process.start_ticks), ("fork", 1)]


@pytest.fixture
async def collector(tmp_path: Path) -> AsyncIterator[tuple[Path, asyncio.Queue[bytes]]]:
    """Says what it is given, then hangs up."""
    said: asyncio.Queue[bytes] = asyncio.Queue()
    path = tmp_path / "events.sock"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await said.get():
            writer.write(line)
        writer.close()

    server = await asyncio.start_unix_server(serve, path, limit=LINE_BYTES)
    yield path, said
    server.close()
    await server.wait_closed()


async def test_a_collector_is_heard(collector: tuple[Path, asyncio.Queue[bytes]]) -> None:
    path, said = collector
    await said.put(b"{}\n")
    source = await Collected.open(path)
    row = {"kind": "fork", "at": 2.5, "pid": None, "ppid": 1}
    await said.put(json.dumps([row, {**row, "pid": 9}]).encode() + b"\n")
    await said.put(b"")
    (events,) = [events async for events in source]
    assert [(one.kind, one.at, one.pid, one.ppid) for one in events] == [
        ("fork", 2.5, None, 1),
        ("fork", 2.5, 9, 1),
    ]
    source.close()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"refused": "you are nobody"}\n', "you are nobody"),
        (b"", "hung up"),
        (b"nonsense\n", "hung up"),
    ],
)
async def test_a_collector_that_does_not_help(
    collector: tuple[Path, asyncio.Queue[bytes]], line: bytes, reason: str
) -> None:
    path, said = collector
    for one in (line, b"")[not line :]:
        await said.put(one)
    with pytest.raises(Unavailable, match=reason):
        await Collected.open(path)


async def test_a_collector_that_stands_still_is_not_waited_for(
    collector: tuple[Path, asyncio.Queue[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, said = collector
    monkeypatch.setattr("tabane.k2i.event_sources.GREET_S", 0.01)
    with pytest.raises(Unavailable, match="does not answer"):
        await Collected.open(path)
    await said.put(b"")


async def test_where_there_is_no_collector(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"no collector of process events at .*/none: No such"):
        await Collected.open(tmp_path / "none")
