"""Collectors that are slow, broken or gone; with a clock that stands still."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from tabane.errors import Refused
from tabane.k2i.collectors.api import Reading
from tabane.k2i.collectors.runner import Collection, FactRow, Job, describe
from tabane.model import Collect
from tabane.supervise import Supervisor
from tabane.testing import VirtualClock


@dataclass
class Scripted:
    """Does one of `steps` for each reading; an exception is raised."""

    steps: list[list[Reading] | BaseException]
    taken: asyncio.Event = field(default_factory=asyncio.Event)
    closed: int = 0

    async def collect(self) -> list[Reading]:
        step = self.steps.pop(0)
        asyncio.get_running_loop().call_soon(self.taken.set)
        if isinstance(step, BaseException):
            raise step
        return step

    async def again(self, clock: VirtualClock, seconds: float) -> None:
        """The reading that is due in so many seconds."""
        self.taken.clear()
        clock.advance(seconds)
        await self.taken.wait()

    async def aclose(self) -> None:
        self.closed += 1


@dataclass
class Bench:
    clock: VirtualClock
    collection: Collection
    tasks: Supervisor
    started: dict[int, int]
    """Processes, by pid, and when they were started."""

    async def run(self, *steps: list[Reading] | BaseException, **job: str) -> Scripted:
        collector = Scripted(list(steps))
        collect = Collect("fake", interval_s=10, deadline_s=2)
        self.collection.want(job.get("instance", ""), [Job(collect, lambda: collector, **job)])
        await collector.taken.wait()
        return collector

    @property
    def row(self) -> FactRow:
        (row,) = self.collection.rows()
        return row


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    clock, started = VirtualClock(), {7: 700}
    async with Supervisor("test") as tasks:
        ticks: Callable[[int], int] = lambda pid: started.get(pid, 0)  # noqa: E731
        collection = Collection("tokyo/tokyo-1", clock=clock, tasks=tasks, ticks=ticks)
        yield Bench(clock, collection, tasks, started)


async def test_facts_of_the_node_and_their_age(bench: Bench) -> None:
    await bench.run([Reading({"degrees": 51.5})])
    bench.clock.advance(4)
    row = bench.row
    assert (row.dc, row.node, row.of, row.pid, row.instance) == ("tokyo", "tokyo-1", "node", 0, "")
    assert (row.collector, row.kind, row.facts) == ("fake", "fake", {"degrees": 51.5})
    assert (row.age_s, row.at, row.interval_s, row.deadline_s) == (4, 1_700_000_000, 10, 2)
    assert (row.error, row.error_age_s, row.failures) == ("", None, 0)


async def test_each_interval_is_a_reading(bench: Bench) -> None:
    collector = await bench.run([Reading({"n": 1})], [Reading({"n": 2})])
    await collector.again(bench.clock, 10)
    assert (bench.row.facts, bench.row.age_s) == ({"n": 2}, 0)


async def test_facts_of_a_process_until_it_ends(bench: Bench) -> None:
    await bench.run([Reading({"n": 1}, pid=7)])
    assert (bench.row.of, bench.row.pid, bench.row.start_ticks) == ("process", 7, 700)
    bench.started[7] = 701  # another has its number
    assert (bench.row.of, bench.row.pid, bench.row.facts) == ("node", 0, {})
    del bench.started[7]
    assert (bench.row.of, bench.row.pid, bench.row.facts) == ("node", 0, {})


async def test_facts_of_a_process_that_is_gone_already(bench: Bench) -> None:
    await bench.run([Reading({"n": 1}, pid=99)])
    assert (bench.row.of, bench.row.pid, bench.row.facts) == ("node", 0, {})


def test_a_host_without_an_address_is_said_in_words() -> None:
    error = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    collect = Collect("nginx", url="http://nowhere.invalid/")
    assert describe(error, collect) == "http://nowhere.invalid/: Name or service not known"


async def test_what_an_app_asks_for_is_of_its_instance_whatever_it_says(bench: Bench) -> None:
    said = [Reading({"n": 1}, pid=7), Reading({"n": 2}, instance="other"), Reading({}, pid=99)]
    await bench.run(said, instance="mine", app="default/shop")
    assert len(bench.collection.rows()) == 3
    for row in bench.collection.rows():
        assert (row.of, row.pid, row.instance, row.app) == ("instance", 0, "mine", "default/shop")
        assert row.namespace == "default"


async def test_one_that_fails_keeps_its_facts_for_some_intervals(bench: Bench) -> None:
    refusal = Refused("it said no")
    collector = await bench.run([Reading({"n": 1})], refusal, refusal, refusal, refusal, refusal)
    for failures in (1, 2, 3):
        await collector.again(bench.clock, 10)
        row = bench.row
        assert (row.facts, row.age_s, row.error) == ({"n": 1}, failures * 10, "it said no")
        assert (row.error_age_s, row.failures) == (0, failures)
    await collector.again(bench.clock, 10)
    assert (bench.row.facts, bench.row.age_s, bench.row.failures) == ({}, 40, 4)


async def test_one_that_works_again_has_no_error(bench: Bench) -> None:
    collector = await bench.run(Refused("not yet"), [Reading({"n": 1})])
    assert (bench.row.error, bench.row.age_s) == ("not yet", None)
    await collector.again(bench.clock, 10)
    assert (bench.row.error, bench.row.failures, bench.row.facts) == ("", 0, {"n": 1})


async def test_a_broken_one_goes_on_and_is_logged(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        collector = await bench.run(ZeroDivisionError("ouch"), [Reading({"n": 1})])
    assert bench.row.error == "ouch"
    assert "collector fake is broken" in caplog.text
    await collector.again(bench.clock, 10)
    assert bench.row.facts == {"n": 1}


async def test_one_that_hangs_delays_no_other(bench: Bench) -> None:
    hangs = asyncio.Event()
    gave_up = asyncio.Event()

    class Hanging(Scripted):
        async def collect(self) -> list[Reading]:
            try:
                await hangs.wait()
            finally:
                gave_up.set()
            return []

    slow, quick = Hanging([]), Scripted([[Reading({"n": 1})]])
    jobs = [
        Job(Collect("slow", deadline_s=0.01), lambda: slow),
        Job(Collect("quick"), lambda: quick),
    ]
    bench.collection.want("", jobs)
    await quick.taken.wait()
    assert [row.facts for row in bench.collection.rows()] == [{}, {"n": 1}]
    await gave_up.wait()
    while not bench.collection.rows()[0].error:  # noqa: ASYNC110 - it is being written down
        await asyncio.sleep(0)
    first, second = bench.collection.rows()
    assert (first.error, second.error) == ("no answer within 0.01 s", "")


async def test_one_that_cannot_be_made_says_why(bench: Bench) -> None:
    def make() -> Scripted:
        raise Refused("there is no such kind")

    bench.collection.want("", [Job(Collect("nothing"), make)])
    await asyncio.sleep(0)
    assert (bench.row.error, bench.row.failures) == ("there is no such kind", 1)


async def test_those_of_an_instance_end_with_it_and_others_go_on(bench: Bench) -> None:
    mine, other = Scripted([[]]), Scripted([[]])
    bench.collection.want("a", [Job(Collect("x"), lambda: mine, "a", "default/a")])
    bench.collection.want("b", [Job(Collect("x"), lambda: other, "b", "default/b")])
    await mine.taken.wait()
    await other.taken.wait()
    assert bench.collection.instances() == {"a", "b"}
    bench.collection.want("a", ())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (mine.closed, other.closed) == (1, 0)
    assert [row.instance for row in bench.collection.rows()] == ["b"]
    bench.collection.want("b", [Job(Collect("x"), lambda: mine, "b", "default/b")])
    await asyncio.sleep(0)
    assert other.closed == 0
