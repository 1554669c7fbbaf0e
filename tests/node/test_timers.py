"""Timers on the control node: each moment is begun once, and brought to its app in the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from msgspec.structs import replace

from tabane.errors import Unreachable
from tabane.model import App, AppName
from tabane.node.timers import FIRST_PAUSE_S, GIVE_UP_S, TRIGGERS, Timers, parse_mark
from tabane.reactions import Trigger
from tabane.scheduler.timers import Mark
from tabane.store.memory import MemoryStore
from tabane.supervise import Supervisor
from tabane.testing import VirtualClock

BEGIN = 1_700_000_100.0
"""A moment of `*/5`."""
NIGHTLY = Trigger(cron="*/5 * * * *")
APP = App("shop", "host", port=80, revision=1, deployed_at=BEGIN, triggers=(NIGHTLY,))
KEY = f"{TRIGGERS}default/shop/cron"


class Cluster:
    """A store and an app, and what requests were made; `agent()` begins a control node's agent."""

    def __init__(self) -> None:
        self.clock = VirtualClock(wall=BEGIN)
        self.store = MemoryStore(clock=self.clock)
        self.apps = [APP]
        self.sent: list[tuple[AppName, str, float]] = []
        self.failures = 0
        self.goes_on: asyncio.Event | None = None
        """Requests are answered when it is set."""
        self.problems: list[BaseException] = []

    async def send(self, app: App, trigger: Trigger, moment: float) -> str:
        self.sent.append((app.key, trigger.key, moment - BEGIN))
        if self.failures:
            self.failures -= 1
            raise Unreachable("its node is away")
        if self.goes_on is not None:
            await self.goes_on.wait()
        return "answered 200"

    def agent(self) -> Supervisor:
        tasks = Supervisor("agent", on_failure=lambda name, error: self.problems.append(error))
        timers = Timers(self.store, self.clock, tasks, apps=lambda: self.apps, send=self.send)
        tasks.keep("timers", timers.run)
        self.timers = timers
        return tasks

    async def pass_time(self, seconds: float, step_s: float = 1.0) -> None:
        """With all tasks coming to their waits in between."""
        for _ in range(round(seconds / step_s)):
            for _ in range(20):
                await asyncio.sleep(0)
            self.clock.advance(step_s)
        for _ in range(20):
            await asyncio.sleep(0)

    async def mark(self) -> Mark | None:
        entry = await self.store.get(KEY)
        return parse_mark(entry.value) if entry is not None else None

    @property
    def moments(self) -> list[float]:
        return [moment for _, _, moment in self.sent]


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    yield made
    await made.store.aclose()


async def test_each_moment_is_carried_out_once(cluster: Cluster) -> None:
    async with cluster.agent():
        await cluster.pass_time(901)
    assert cluster.sent == [(APP.key, "cron", moment) for moment in (300.0, 600.0, 900.0)]
    mark = await cluster.mark()
    assert mark is not None
    assert (mark.last, mark.pending, mark.outcome) == (BEGIN + 900, (), "answered 200")


async def test_a_moment_is_stored_before_it_is_begun(cluster: Cluster) -> None:
    cluster.goes_on = asyncio.Event()
    async with cluster.agent():
        await cluster.pass_time(301)
        mark = await cluster.mark()
        assert mark is not None and mark.pending == (BEGIN + 300,)
        assert cluster.moments == [300.0]


async def test_what_a_killed_agent_had_begun_the_next_one_carries_out(cluster: Cluster) -> None:
    cluster.goes_on = asyncio.Event()
    async with cluster.agent():
        await cluster.pass_time(301)
    cluster.goes_on.set()
    async with cluster.agent():
        await cluster.pass_time(10)
    assert cluster.moments == [300.0, 300.0]
    mark = await cluster.mark()
    assert mark is not None and mark.pending == ()


async def test_two_agents_at_once_begin_a_moment_once(cluster: Cluster) -> None:
    async with cluster.agent(), cluster.agent():
        await cluster.pass_time(601)
    assert sorted(cluster.moments) == [300.0, 600.0]


async def test_it_is_tried_again_until_the_app_has_it(cluster: Cluster) -> None:
    cluster.failures = 3
    async with cluster.agent():
        await cluster.pass_time(301 + 7 * FIRST_PAUSE_S)
    assert cluster.moments == [300.0] * 4
    mark = await cluster.mark()
    assert mark is not None and (mark.pending, mark.outcome) == ((), "answered 200")


async def test_it_is_given_up_in_the_end_and_the_next_has_its_turn(cluster: Cluster) -> None:
    cluster.failures = 10**6
    async with cluster.agent():
        await cluster.pass_time(300 + GIVE_UP_S - 1)
        mark = await cluster.mark()
        assert mark is not None and mark.pending == ()
        assert mark.outcome == "failed: its node is away"
        cluster.failures = 0
        await cluster.pass_time(10)
    assert cluster.moments[-1] == 600.0


@pytest.mark.parametrize(("missed", "then"), [("skip", []), ("once", [3600.0])])
async def test_what_came_while_the_control_node_was_away(
    cluster: Cluster, missed: str, then: list[float]
) -> None:
    cluster.apps = [replace(APP, triggers=(replace(NIGHTLY, missed=missed),))]
    cluster.clock.advance(3700)
    async with cluster.agent():
        await cluster.pass_time(10)
        assert cluster.moments == then
        await cluster.pass_time(200)
    assert cluster.moments == [*then, 3900.0]


async def test_a_new_app_and_a_new_line_are_noticed(cluster: Cluster) -> None:
    cluster.apps = []
    async with cluster.agent():
        await cluster.pass_time(100)
        deployed = cluster.clock.wall()
        cluster.apps = [replace(APP, deployed_at=deployed)]
        cluster.timers.look_soon()
        await cluster.pass_time(201)
        assert cluster.moments == [300.0]
        minutely = (Trigger(cron="* * * * *"),)
        deployed = cluster.clock.wall()
        cluster.apps = [replace(APP, revision=2, deployed_at=deployed, triggers=minutely)]
        cluster.timers.look_soon()
        await cluster.pass_time(60)
        assert cluster.moments == [300.0, 360.0]


async def test_what_was_begun_for_a_removed_app_does_not_reach_the_next_of_its_name(
    cluster: Cluster,
) -> None:
    cluster.failures = 10**6
    async with cluster.agent():
        await cluster.pass_time(301)
        cluster.apps = []
        cluster.timers.look_soon()
        await cluster.pass_time(2)
        cluster.failures, before = 0, list(cluster.moments)
        cluster.apps = [replace(APP, revision=2, deployed_at=cluster.clock.wall())]
        cluster.timers.look_soon()
        await cluster.pass_time(60)
        assert cluster.moments == before
        assert await cluster.mark() is None
        await cluster.pass_time(300)
        assert cluster.moments == [*before, 600.0]


async def test_of_what_was_removed_nothing_is_kept(cluster: Cluster) -> None:
    async with cluster.agent():
        await cluster.pass_time(301)
        cluster.apps = []
        cluster.timers.look_soon()
        await cluster.pass_time(301)
        assert await cluster.mark() is None
    assert cluster.moments == [300.0]
