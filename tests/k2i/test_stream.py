"""Who follows has the table, whatever happens in it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace

from tabane.errors import Busy, Closed, UsageError
from tabane.k2i import K2i, Process, ProcessTable, Question, watch
from tabane.k2i import query as ask
from tabane.k2i.event_feed import EventFeed
from tabane.k2i.events import Event as ProcessEvent
from tabane.k2i.host import Place
from tabane.k2i.passing import Passing
from tabane.k2i.stream import PARAMETERS, Changes, Event, Follower
from tabane.k2i.watch import Listening, Outbox, older
from tabane.security.identity import Principal
from tabane.supervise import Supervisor
from tabane.testing.clock import VirtualClock

PLACE = Place("tokyo", "tokyo-1", "life")
ROOT = Principal("token")


@pytest.fixture(scope="module")
def process() -> Process:
    table = ProcessTable("tokyo/tokyo-1", "life")
    try:
        return next(row for row in table.processes() if row.pid == os.getpid())
    finally:
        table.close()


def follower(**params: str) -> Follower:
    return Follower(ask.parse_query(params, PARAMETERS, Process), PLACE)


def step(told: Follower, at: float, *rows: Process) -> Changes | None:
    return told.step(at, rows)


def test_births_deaths_and_updates(process: Process) -> None:
    told = follower()
    first = step(told, 0.0, process)
    assert first is not None
    assert (first.first, first.number, first.node) == (True, 1, "tokyo/tokyo-1")
    assert [row["pid"] for row in first.born] == [process.pid]
    assert step(told, 1.0, replace(process, elapsed_s=99.0, cpu_percent=1.0)) is None
    other = replace(process, pid=7, start_ticks=70)
    more = step(told, 2.0, replace(process, rss_kib=1), other)
    assert more is not None
    assert [row["pid"] for row in more.born] == [7]
    assert [(row["pid"], row["rss_kib"]) for row in more.updated] == [(process.pid, 1)]
    last = step(told, 3.0, replace(process, rss_kib=1))
    assert last is not None
    assert [(row["pid"], row["start_ticks"]) for row in last.died] == [(7, 70)]
    assert (last.number, last.first, last.updated) == (3, False, [])


def exit_of(pid: int | None, start_ticks: int | None, **fields: Any) -> ProcessEvent:
    return ProcessEvent(kind="exit", at=1.0, pid=pid, start_ticks=start_ticks, **fields)


def test_who_came_and_went_between_two_looks(process: Process) -> None:
    passing, told = Passing(PLACE), follower(app="default/web")
    parent = replace(process, pid=5, start_ticks=50, app="default/web", instance="abc")
    meanwhile = passing.step([], [process, parent])
    told.step(0.0, [process, parent], "looks", meanwhile)
    events = [
        exit_of(7, 70, ppid=5, name="quick", code=3),
        exit_of(8, 80, ppid=99, name="another's", code=0),
        exit_of(5, 50, ppid=1, name="x", signal=9),
        exit_of(None, None, ppid=5, signal=15),
    ]
    meanwhile = passing.step(events, [process])
    changes = told.step(1.0, [process], "events", meanwhile)
    assert changes is not None
    assert [(row.pid, row.name, row.code, row.signal) for row in changes.passed] == [
        (7, "quick", 3, None),
        (None, "", None, 15),
    ]
    assert {(row.app, row.instance, row.user, row.dc) for row in changes.passed} == {
        ("default/web", "abc", process.user, "tokyo")
    }
    assert [(row["pid"], row["code"], row["signal"]) for row in changes.died] == [(5, None, 9)]
    assert (changes.source, changes.missed) == ("events", "")


def test_an_end_told_late_is_no_other_process(process: Process) -> None:
    passing = Passing(PLACE)
    child = replace(process, pid=7, start_ticks=70)
    passing.step([], [process, child])
    passing.step([], [process])
    late = passing.step([exit_of(7, 70, code=0), exit_of(7, None, code=0)], [process])
    assert late.passed == []
    reused = passing.step([exit_of(7, 99, ppid=process.pid, code=0)], [process])
    assert [(row.pid, row.start_ticks) for row in reused.passed] == [(7, 99)]


def test_events_that_are_missing_are_said_to_be(process: Process) -> None:
    passing, told = Passing(PLACE), follower()
    told.step(0.0, [process])
    gap = ProcessEvent(kind="gap", at=1.0, reason="too many")
    changes = told.step(1.0, [process], "looks", passing.step([gap], [process]))
    assert changes is not None
    assert changes.missed == "too many"


async def test_events_are_listened_to_while_somebody_follows(process: Process) -> None:
    feed = EventFeed(ProcessTable())
    listening = Listening(PLACE)
    assert listening.take(feed) is None  # it has no source yet
    feed.source = "kernel"
    assert listening.take(feed) is None  # from now on
    feed._publish([exit_of(7, 70, code=0)])
    assert [event.pid for event in listening.take(feed) or ()] == [7]
    assert listening.take(None) is None
    assert not feed._subscriptions
    assert listening.take(feed) is None
    listening.end()
    assert not feed._subscriptions


def test_a_reused_pid_is_a_death_and_a_birth(process: Process) -> None:
    told = follower()
    step(told, 0.0, process)
    changes = step(told, 1.0, replace(process, start_ticks=process.start_ticks + 1))
    assert changes is not None
    assert [row["start_ticks"] for row in changes.died] == [process.start_ticks]
    assert [row["start_ticks"] for row in changes.born] == [process.start_ticks + 1]


def test_another_program_is_said_at_once_and_a_zombie_is_none(process: Process) -> None:
    told = follower(interval_s="60")
    step(told, 0.0, process)
    changes = step(told, 1.0, replace(process, name="new", command="new x"))
    assert changes is not None
    assert [(row["pid"], row["command"]) for row in changes.exec] == [(process.pid, "new x")]
    zombie = replace(process, name="new", command="new x <defunct>", state="Z")
    assert step(told, 2.0, zombie) is None
    quiet = step(told, 11.0, zombie)  # all is as it was
    assert quiet is not None
    assert (quiet.updated, quiet.number) == ([], 3)
    due = step(told, 60.0, zombie)
    assert due is not None
    assert (due.exec, [row["state"] for row in due.updated]) == ([], ["Z"])


def test_updates_come_only_when_they_are_due_and_none_is_lost(process: Process) -> None:
    told = follower(interval_s="5", fields="rss_kib")
    step(told, 0.0, process)
    assert step(told, 1.0, replace(process, rss_kib=1)) is None
    assert step(told, 4.0, replace(process, rss_kib=2)) is None
    changes = step(told, 5.0, replace(process, rss_kib=2))
    assert changes is not None
    assert list(changes.updated[0]) == ["inside", "instance", "pid", "start_ticks", "rss_kib"]
    assert changes.updated[0]["rss_kib"] == 2
    assert step(told, 10.5, replace(process, rss_kib=2, nice=5)) is None  # not asked for


def test_only_what_is_asked_for(process: Process) -> None:
    told = follower(pid=str(process.pid), node="tokyo-1")
    step(told, 0.0, process)
    assert step(told, 1.0, process, replace(process, pid=7)) is None
    nobody = follower(node="osaka-1")
    first = step(nobody, 0.0, process)
    assert first is not None
    assert first.born == []


@pytest.mark.parametrize(
    "params", [{"interval_s": "0"}, {"interval_s": "61"}, {"interval_s": "1.5"}, {"sort": "pid"}]
)
def test_what_cannot_be_followed(params: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        follower(**params)


async def test_who_reads_too_slowly_is_told_so() -> None:
    clock = VirtualClock()
    stream = Outbox(clock, 1000)
    message = b'{"age_s":0.0,"x":"' + b"x" * 600 + b'"}'
    for _ in range(3):
        stream.put(clock.now(), message)
    clock.advance(2.5)
    assert json.loads((await anext(stream)).data)["age_s"] == 2.5
    with pytest.raises(Busy, match="follow anew"):
        await anext(stream)
    assert stream.ended


@pytest.fixture
async def watched() -> AsyncIterator[K2i]:
    k2i = K2i(ProcessTable())
    async with Supervisor("test") as tasks:
        k2i.start(tasks)
        yield k2i
    k2i.close()
    k2i.table.close()


async def follow(k2i: K2i, who: Principal) -> AsyncGenerator[Event, None]:
    """One that has been told the first."""
    messages = k2i.follow(Question("changes", {"pid": str(os.getpid())}), who)
    await anext(messages)
    return messages


async def test_a_user_leaves_room_for_others(watched: K2i, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MOST_OF_ONE", 2)
    monkeypatch.setattr(watch, "MOST_FOLLOWERS", 4)
    ann, bob = Principal("peer", 54001), Principal("peer", 54002)
    first = await follow(watched, ann)
    rest = [await follow(watched, ann)]
    with pytest.raises(Busy, match="you follow 2 times already"):
        await follow(watched, Principal("peer", 54001, pid=99))
    rest += [await follow(watched, who) for who in (bob, ROOT)]
    with pytest.raises(Busy, match="4 follow already"):
        await follow(watched, ROOT)
    await first.aclose()
    rest.append(await follow(watched, ROOT))
    for messages in rest:
        await messages.aclose()


async def test_who_is_told_no_more_counts_until_they_have_gone(
    watched: K2i, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for them is kept, so they must not begin anew beside it without end."""
    monkeypatch.setattr(watch, "MOST_OF_ONE", 1)
    monkeypatch.setattr(watch, "MOST_WAITING_BYTES", 0)
    followers, ann = watched._watch, Principal("peer", 54001)
    stream = followers.follow(follower(), list, ann)
    with pytest.raises(Busy, match="all who follow"):
        await anext(stream)
    with pytest.raises(Busy, match="you follow 1 times already"):
        followers.follow(follower(), list, ann)
    followers.let_go(stream)
    followers.let_go(followers.follow(follower(), list, ann))


def test_an_age_grows_on_the_way() -> None:
    assert older(b'{"age_s":0.25,"x":1}', 1.5) == b'{"age_s":1.75,"x":1}'
    assert older(b'{"age_s":1e-3}', 0.0) == b'{"age_s":0.001}'
    assert older(b'{"node":"x"}', 1.0) == b'{"node":"x"}'


async def test_a_real_process_is_born_and_dies() -> None:
    table = ProcessTable("tokyo/tokyo-1", "life")
    k2i = K2i(table, node="tokyo/tokyo-1", incarnation="life")
    async with Supervisor("test") as tasks:
        k2i.start(tasks)
        messages = k2i.follow(Question("changes", {"user": str(os.geteuid())}), ROOT)
        first = json.loads((await anext(messages)).data)
        assert first["first"]
        assert os.getpid() in {row["pid"] for row in first["born"]}
        child = await asyncio.create_subprocess_exec("cat", stdin=subprocess.PIPE)
        await until(messages, "born", child.pid)
        await child.communicate(b"")
        await until(messages, "died", child.pid)
        history = json.loads(await k2i.answer(Question("history"), ROOT))["history"]
        assert history
        assert history[0]["node"] == "tokyo-1"
        mine = Question("history/processes", {"pid": str(os.getpid())})
        points = json.loads(await k2i.answer(mine, ROOT))["history"]
        assert points
        assert {point["pid"] for point in points} == {os.getpid()}
        last = asyncio.ensure_future(until(messages, "died", -1))
        await asyncio.sleep(0)
        k2i.close()
        with pytest.raises(Closed):
            await last
    table.close()


async def until(messages: Any, kind: str, pid: int) -> None:
    async for event in messages:
        if pid in {row["pid"] for row in json.loads(event.data)[kind]}:
            return


async def test_those_who_may_not_see_arguments_do_not_get_them() -> None:
    k2i = K2i(ProcessTable())
    async with Supervisor("test") as tasks:
        k2i.start(tasks)
        messages = k2i.follow(
            Question("changes", {"pid": str(os.getpid()), "fields": "command,name"}),
            Principal("peer", 12345),
        )
        first = json.loads((await anext(messages)).data)
        (row,) = first["born"]
        assert row["command"] == f"[{row['name']}]"
        await messages.aclose()
    k2i.close()
    k2i.table.close()
