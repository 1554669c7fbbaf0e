"""Processes within instances, and drivers that are slow or broken; the clock stands still."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import pytest

from tabane.errors import EngineError
from tabane.k2i import K2i, ProcessTable, Question
from tabane.k2i.inside import FIRST_PAUSE_S, KEPT_S, LEAST_PAUSE_S, SHARE, Ask, Insides
from tabane.model import (
    AppName,
    Class,
    Generation,
    GuestProcess,
    Instance,
    InstanceId,
    NodeName,
    State,
)
from tabane.security.identity import Principal
from tabane.supervise import Supervisor
from tabane.testing import VirtualClock

INIT = GuestProcess("sandbox", 1, "sh", command="sh -c web", rss_kib=1 << 10, elapsed_s=10)
WEB = GuestProcess(
    "sandbox", 2, "web", ppid=1, uid=33, cpu_s=5, elapsed_s=10, threads=3, container="proxy"
)


def instance(name: str) -> Instance:
    return Instance(
        id=InstanceId(name),
        app=AppName("default/shop"),
        revision=1,
        node=NodeName("tokyo/tokyo-1"),
        generation=Generation("first", InstanceId(name), 1),
        state=State.READY,
        isolation=Class.SANDBOX,
    )


class Driver:
    """Answers, or raises, each of `steps`; the last again and again."""

    def __init__(self, *steps: Sequence[GuestProcess] | Exception, takes_s: float = 0) -> None:
        self.steps = list(steps)
        self.takes_s = takes_s
        self.asked = asyncio.Event()
        self.clock: VirtualClock | None = None

    async def __call__(self) -> Sequence[GuestProcess]:
        asyncio.get_running_loop().call_soon(self.asked.set)
        if self.clock is not None:
            self.clock.stall(self.takes_s)
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        if isinstance(step, Exception):
            raise step
        return step


@dataclass
class Bench:
    clock: VirtualClock
    insides: Insides

    async def look(self, driver: Driver, name: str = "i1") -> None:
        self.insides.want([(instance(name), driver)])
        await asyncio.sleep(0)
        assert not driver.asked.is_set()
        self.clock.advance(FIRST_PAUSE_S)
        await driver.asked.wait()

    async def again(self, driver: Driver, seconds: float = LEAST_PAUSE_S) -> None:
        await asyncio.sleep(0)
        driver.asked.clear()
        self.clock.advance(seconds)
        await driver.asked.wait()


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    clock = VirtualClock()
    async with Supervisor("test") as tasks:
        insides = Insides("tokyo/tokyo-1", "first", clock=clock, tasks=tasks, memory_kib=1 << 20)
        yield Bench(clock, insides)


async def test_they_belong_to_their_instance(bench: Bench) -> None:
    await bench.look(Driver([INIT, WEB]))
    init, web = bench.insides.processes()
    for row in (init, web):
        assert (row.dc, row.node, row.incarnation) == ("tokyo", "tokyo-1", "first")
        assert (row.app, row.instance, row.isolation) == ("default/shop", "i1", "sandbox")
        assert (row.inside, row.start_ticks) == ("sandbox", 0)
    assert (init.pid, init.command, init.memory_percent) == (1, "sh -c web", 0.0)
    assert (web.pid, web.ppid, web.user, web.command, web.cpu_percent) == (2, 1, "33", "[web]", 50)
    assert (init.container, web.container) == ("", "proxy")


async def test_what_is_not_asked_again_yet_has_its_age(bench: Bench) -> None:
    driver = Driver([INIT])
    await bench.look(driver)
    bench.clock.advance(LEAST_PAUSE_S / 2)
    assert bench.insides.age_s() == LEAST_PAUSE_S / 2
    await bench.again(driver, LEAST_PAUSE_S / 2)
    assert bench.insides.age_s() == 0


async def test_the_moment_it_was_started_does_not_move(bench: Bench) -> None:
    await bench.look(Driver([INIT]))
    (before,) = bench.insides.processes()
    assert before.started_at == round(bench.clock.wall() - 10, 2)
    bench.clock.advance(LEAST_PAUSE_S / 2)
    assert bench.insides.processes() == [before]


async def test_a_failing_driver_keeps_what_it_told_for_a_while(bench: Bench) -> None:
    driver = Driver([INIT], EngineError("runsc failed"))
    await bench.look(driver)
    await bench.again(driver)
    assert bench.insides.errors() == {"i1": "runsc failed"}
    assert len(bench.insides.processes()) == 1
    await bench.again(driver, KEPT_S)
    assert bench.insides.processes() == []
    assert bench.insides.age_s() == 0


async def test_a_broken_driver_is_asked_again(bench: Bench) -> None:
    driver = Driver(ZeroDivisionError("ouch"), [INIT])
    await bench.look(driver)
    assert bench.insides.errors() == {"i1": "its driver is broken: ouch"}
    await bench.again(driver)
    assert (bench.insides.errors(), len(bench.insides.processes())) == ({}, 1)


async def test_a_hanging_driver_delays_nobody(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tabane.k2i.inside.DEADLINE_S", 0.01)
    gave_up = asyncio.Event()

    async def hang() -> Sequence[GuestProcess]:
        try:
            await asyncio.Event().wait()
        finally:
            gave_up.set()
        return ()

    quick = Driver([WEB])
    slow: Ask = hang
    bench.insides.want([(instance("a"), slow), (instance("b"), quick)])
    await asyncio.sleep(0)
    bench.clock.advance(FIRST_PAUSE_S)
    await quick.asked.wait()
    assert [row.instance for row in bench.insides.processes()] == ["b"]
    await gave_up.wait()
    while not bench.insides.errors():  # noqa: ASYNC110 - it is being written down
        await asyncio.sleep(0)
    assert bench.insides.errors() == {"a": "no answer within 0.01 s"}


async def test_the_longer_it_takes_the_less_often_it_is_asked(bench: Bench) -> None:
    driver = Driver([INIT], takes_s=1.0)
    driver.clock = bench.clock
    await bench.look(driver)
    await asyncio.sleep(0)
    driver.asked.clear()
    bench.clock.advance(1 / SHARE - 0.1)
    await asyncio.sleep(0)
    assert not driver.asked.is_set()
    bench.clock.advance(0.2)
    await driver.asked.wait()


async def test_an_instance_that_is_gone_has_none_at_once(bench: Bench) -> None:
    await bench.look(Driver([INIT]))
    bench.insides.want([])
    assert bench.insides.processes() == []


async def test_who_follows_hears_of_them(bench: Bench) -> None:
    await bench.look(Driver([INIT, WEB], [INIT]))
    table = ProcessTable("tokyo/tokyo-1")
    k2i = K2i(table, node="tokyo/tokyo-1", inside=bench.insides.processes)
    async with Supervisor("following") as tasks:
        k2i.start(tasks)
        question = Question("changes", {"app": "shop", "inside": "sandbox"})
        messages = k2i.follow(question, Principal("token"))
        first = json.loads((await anext(messages)).data)
        assert [(row["inside"], row["pid"]) for row in first["born"]] == [
            ("sandbox", 1),
            ("sandbox", 2),
        ]
        bench.clock.advance(LEAST_PAUSE_S)
        (row,) = json.loads((await anext(messages)).data)["died"]
        assert (row["inside"], row["instance"], row["pid"]) == ("sandbox", "i1", 2)
        history = await k2i.part(Question("history/apps"), Principal("token"))
        assert b"shop" not in history.rows, "its use is that of the process it is in"
        await messages.aclose()
    k2i.close()
    table.close()


async def test_they_are_in_the_table_with_its_age_and_can_be_asked_for(bench: Bench) -> None:
    await bench.look(Driver([INIT, WEB]))
    bench.clock.advance(1)
    table = ProcessTable("tokyo/tokyo-1")
    k2i = K2i(table, inside=bench.insides.processes, inside_age_s=bench.insides.age_s)
    try:
        mine = {"inside": "sandbox", "fields": "pid,inside,command"}
        part = await k2i.part(Question("processes", mine), Principal("token"))
        assert part.rows == (
            b'[{"pid":1,"inside":"sandbox","command":"sh -c web"},'
            b'{"pid":2,"inside":"sandbox","command":"[web]"}]'
        )
        assert part.age_s >= 1
        one = {"container": "proxy", "fields": "pid,container"}
        part = await k2i.part(Question("processes", one), Principal("token"))
        assert part.rows == b'[{"pid":2,"container":"proxy"}]'
        own = Question("processes", {"inside": "none", "group": "inside"})
        assert (await k2i.part(own, Principal("token"))).rows.startswith(b'[{"inside":"","count":')
        other = Principal("peer", uid=0x7FFF)
        same = Principal("peer", uid=33)
        for who in (other, same):  # a user in there is none of the node's
            rows = (await k2i.part(Question("processes", mine), who)).rows
            assert b"sh -c web" not in rows
        threads = await k2i.part(Question("threads", {"instance": "i1"}), Principal("token"))
        assert threads.rows == b"[]"
    finally:
        k2i.close()
        table.close()
