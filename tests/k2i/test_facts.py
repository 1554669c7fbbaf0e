"""Facts in `/v2`: rows of their own, and joined to processes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from tabane.errors import UsageError
from tabane.k2i import K2i, ProcessTable, Question
from tabane.k2i.collectors.runner import FactRow
from tabane.k2i.facts import add_facts
from tabane.k2i.procfs import start_ticks
from tabane.model import Generation, Instance, InstanceId, NodeName, State
from tabane.security.identity import Principal

ROOT = Principal("token")


def row(of: str, **fields: object) -> FactRow:
    values: dict[str, object] = {
        **dict.fromkeys(("namespace", "app", "instance", "error"), ""),
        "dc": "tokyo",
        "node": "tokyo-1",
        "pid": 0,
        "start_ticks": 0,
        "collector": "cache",
        "kind": "redis",
        "facts": {"keys": 3},
        "at": 1.0,
        "age_s": 2.0,
        "took_s": 0.1,
        "interval_s": 10.0,
        "deadline_s": 2.0,
        "error_age_s": None,
        "failures": 0,
    }
    return FactRow(of=of, **(values | fields))  # type: ignore[arg-type]


ME = os.getpid()
MINE = row("process", pid=ME, start_ticks=start_ticks(ME))
REUSED = row("process", pid=ME, start_ticks=1, collector="old")
NODE = row("node", collector="room", kind="command", facts={"degrees": 21.5})
SHOP = row("instance", instance="i1", app="default/shop", namespace="default", collector="web")


@pytest.fixture
def k2i() -> Iterator[K2i]:
    table = ProcessTable("tokyo/tokyo-1")
    k2i = K2i(table, node="tokyo/tokyo-1", facts=lambda: [MINE, REUSED, NODE, SHOP])
    yield k2i
    k2i.close()
    table.close()


async def ask(k2i: K2i, question: str, **params: str) -> list[dict[str, object]]:
    answer = json.loads(await k2i.answer(Question(question, params), ROOT))
    rows: list[dict[str, object]] = answer[question]
    return rows


@pytest.mark.parametrize(
    ("params", "collectors"),
    [
        ({}, ["cache", "old", "room", "web"]),
        ({"kind": "command"}, ["room"]),
        ({"collector": "web,room"}, ["room", "web"]),
        ({"app": "shop"}, ["web"]),
        ({"instance": "i1"}, ["web"]),
        ({"node": "osaka-1"}, []),
        ({"sort": "-collector", "limit": "1"}, ["web"]),
    ],
)
async def test_facts(k2i: K2i, params: dict[str, str], collectors: list[str]) -> None:
    assert [row["collector"] for row in await ask(k2i, "facts", **params)] == collectors


async def test_facts_of_a_process_stand_at_it_and_not_at_one_with_its_number(k2i: K2i) -> None:
    (me,) = await ask(k2i, "processes", pid=str(ME), facts="yes", fields="pid,facts")
    assert me == {"pid": ME, "facts": {"cache": {"keys": 3}}}
    parent = (await ask(k2i, "processes", pid=str(os.getppid()), facts="yes"))[0]
    assert parent["facts"] == {}


async def test_without_asking_there_are_none(k2i: K2i) -> None:
    (me,) = await ask(k2i, "processes", pid=str(ME), facts="no")
    assert "facts" not in me
    with pytest.raises(UsageError, match="there is no field facts"):
        await ask(k2i, "processes", fields="facts")


@pytest.mark.parametrize("params", [{"facts": "yes", "group": "facts"},
                                    {"facts": "yes", "sort": "pid,-facts"},
                                    {"tasks": "yes", "group": "app,tasks"}])  # fmt: skip
async def test_what_has_many_values_is_no_key(k2i: K2i, params: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="s is no single value: rows are not grouped or sorted"):
        await ask(k2i, "processes", **params)


async def test_tasks_are_the_threads_of_each_process(k2i: K2i) -> None:
    (me,) = await ask(k2i, "processes", pid=str(ME), tasks="yes")
    threads = await ask(k2i, "threads", pid=str(ME))
    ids = [[task["tid"] for task in rows] for rows in (me["tasks"], threads)]  # type: ignore[attr-defined]
    assert ME in ids[0] and {*ids[0]} <= {*ids[1]}  # the second question may begin a thread
    assert me["threads"] == len(ids[0])
    with pytest.raises(UsageError, match="facts and tasks are not told at once"):
        await ask(k2i, "processes", facts="yes", tasks="yes")


async def test_facts_of_an_instance_stand_at_its_first_process() -> None:
    generation = Generation("first", InstanceId("i1"), 1)
    instance = Instance(
        id=InstanceId("i1"),
        app="default/shop",  # type: ignore[arg-type]
        revision=1,
        node=NodeName("tokyo/tokyo-1"),
        generation=generation,
        state=State.READY,
        pid=7,
    )
    table = ProcessTable("tokyo/tokyo-1")
    some = table.processes()[0]
    table.close()
    first = replace(some, pid=7, instance="i1", app="default/shop")
    second = replace(first, pid=8)
    joined = add_facts([first, second], [SHOP, NODE], [instance])
    assert [process.facts for process in joined] == [{"web": {"keys": 3}}, {}]
