"""Freezing and thawing of a node's instances, with the fake driver and a real gateway before it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from tabane.errors import EngineError
from tabane.gateway.activation import InstanceAwake
from tabane.model import App, InstanceId, Reactive, State
from tabane.node import freezing
from tabane.node.records import read_record
from tabane.node.running import Running
from tabane.runtimes.api import Handle
from tabane.runtimes.fake import Life
from tabane.testing.pretend import PretendNode, fetch

HOST = "app.test"
GIVE_UP_S = 60.0


def make_app(**reactive: Any) -> App:
    limits = {"freeze_after_s": 0.02, "stop_after_s": 3600.0, **reactive}
    return App(
        name="app",
        image="host",
        command=("serve",),
        port=8000,
        hosts=(HOST,),
        revision=1,
        reactive=Reactive(**limits),
    )


async def until(condition: Any) -> None:
    async with asyncio.timeout(GIVE_UP_S):
        while not condition():  # noqa: ASYNC110 (many things may make it true)
            await asyncio.sleep(0.001)


class Rested:
    """A node whose only instance was woken, and freezes by itself."""

    def __init__(self, node: PretendNode) -> None:
        self.node = node
        self.awakes: list[InstanceAwake] = []
        self.tell = node.executor.freezer._notify
        node.executor.freezer._notify = self.on_notice

    def on_notice(self, notice: Any) -> None:
        self.awakes.append(notice)
        self.tell(notice)

    @property
    def running(self) -> Running:
        (running,) = self.node.executor.running.values()
        return running

    @property
    def life(self) -> Life:
        return self.node.driver.world.lives[self.running.instance.id]

    @property
    def state(self) -> State:
        return self.running.instance.state

    async def ask(self) -> int:
        status, _ = await fetch(self.node.port, HOST)
        return status

    async def freeze(self) -> None:
        await until(lambda: self.state is State.FROZEN)
        assert self.life.frozen

    def states(self) -> list[State]:
        return [event.state for event in self.node.events]


async def test_it_freezes_when_it_rests_and_a_session_thaws_it() -> None:
    async with PretendNode(make_app()) as node:
        rested = Rested(node)
        assert await rested.ask() == 200
        for _ in range(3):
            await rested.freeze()
            assert await rested.ask() == 200
        await rested.freeze()
        assert len(node.executor) == 1
        assert [record.option for record in node.wakes] == ["cold", "thaw", "thaw", "thaw"]
        rounds = [State.FREEZING, State.FROZEN, State.READY]
        assert rested.states()[:8] == [State.STARTING, State.READY, *rounds, *rounds]
        record = read_record(node.records()[0])
        assert record is not None
        assert (record.instance.state, record.instance.freezes) == (State.FROZEN, 4)


async def test_no_request_is_lost_however_it_meets_a_freeze() -> None:
    async with PretendNode(make_app(freeze_after_s=0.0, concurrency=1, max=1)) as node:
        rested = Rested(node)
        assert await rested.ask() == 200
        for number in range(300):
            assert await rested.ask() == 200, number
            if number % 3 == 0:
                await asyncio.sleep(number / 300 * 0.004)
        assert len(node.executor) == 1
        assert rested.states().count(State.FREEZING) > 3


class SlowFreeze:
    """The engine's freeze goes on until it is let."""

    def __init__(self, rested: Rested) -> None:
        self.goes_on, self.begun, self.cancelled = asyncio.Event(), asyncio.Event(), 0
        self.freeze = rested.node.driver.freeze
        rested.node.driver.freeze = self  # type: ignore[method-assign]

    async def __call__(self, handle: Handle) -> None:
        self.begun.set()
        try:
            await self.goes_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        await self.freeze(handle)


async def test_a_session_breaks_a_freeze_off() -> None:
    async with PretendNode(make_app()) as node:
        rested = Rested(node)
        slow = SlowFreeze(rested)
        assert await rested.ask() == 200
        await slow.begun.wait()
        assert rested.state is State.FREEZING
        assert await rested.ask() == 200
        assert (rested.state, slow.cancelled) == (State.READY, 1)
        assert [record.option for record in node.wakes] == ["cold", "thaw"]


async def test_what_is_stopped_while_it_freezes_or_is_frozen_is_thawed_for_that() -> None:
    for at in (State.FREEZING, State.FROZEN):
        async with PretendNode(make_app()) as node:
            rested = Rested(node)
            assert await rested.ask() == 200
            if at is State.FREEZING:
                await SlowFreeze(rested).begun.wait()
            else:
                await rested.freeze()
            instance, life = rested.running.instance.id, rested.life
            node.executor.stop(instance, "enough")
            await until(lambda: not node.executor.running)
            assert not life.frozen
            assert rested.states()[-3:] == [at, State.STOPPING, State.ABSENT]


async def test_what_somebody_uses_is_thawed_and_not_frozen_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(freezing, "HOLD_S", 0.2)
    async with PretendNode(make_app()) as node:
        rested = Rested(node)
        assert await rested.ask() == 200
        await rested.freeze()
        await node.executor.freezer.wait_awake(rested.running)
        assert (rested.state, rested.life.frozen) == (State.READY, False)
        held_until = rested.running.held_until
        node.executor.freezer.freeze(rested.running.instance.id, 9)
        assert (rested.state, rested.awakes[-1].number) == (State.READY, 9)
        await rested.freeze()
        assert node.executor.clock.now() >= held_until


async def test_a_signal_reaches_what_is_frozen() -> None:
    async with PretendNode(make_app()) as node:
        rested = Rested(node)
        assert await rested.ask() == 200
        await rested.freeze()
        node.executor.on_signal(rested.running.instance.id)
        await until(lambda: not rested.life.frozen)


async def test_what_is_paused_by_order_is_left_to_that() -> None:
    async with PretendNode(make_app(freeze_after_s=1800.0)) as node:
        rested = Rested(node)
        assert await rested.ask() == 200
        rested.running.paused = True
        node.executor.freezer.freeze(rested.running.instance.id, 1)
        assert (rested.state, len(rested.awakes)) == (State.READY, 1)


async def test_a_session_waits_neither_for_the_engine_nor_for_the_disk() -> None:
    """Its slot goes out first, then the word to the engine; then the thaw is written down."""
    async with PretendNode(make_app(stop_after_s=3600.0)) as node:
        rested = Rested(node)
        assert await rested.ask() == 200
        await rested.freeze()
        told: list[str] = []
        thaw, save = node.driver.thaw, node.executor.save

        async def note_thaw(handle: Handle) -> None:
            told.append("engine")
            await thaw(handle)

        def note_save(running: Running) -> None:
            told.append("disk")
            save(running)

        node.driver.thaw = note_thaw  # type: ignore[method-assign]
        node.executor.save = note_save  # type: ignore[method-assign]
        node.executor.freezer.thaw(rested.running.instance.id)
        asyncio.get_running_loop().call_soon(told.append, "slot")
        await until(lambda: "disk" in told)
        assert told == ["slot", "engine", "disk"]


async def test_an_engine_that_cannot_is_asked_once() -> None:
    async with PretendNode(make_app()) as node:
        rested = Rested(node)
        asked = 0

        async def refuse(handle: Handle) -> None:
            nonlocal asked
            asked += 1
            raise EngineError("it is too hot")

        node.driver.freeze = refuse  # type: ignore[method-assign]
        assert await rested.ask() == 200
        await until(lambda: len(rested.awakes) > 2)
        assert (asked, rested.state) == (1, State.READY)
        assert [e.reason for e in node.events if e.reason] == [
            "it could not be frozen: it is too hot"
        ]
        assert await rested.ask() == 200


async def test_one_that_cannot_be_thawed_ends_and_another_serves() -> None:
    async with PretendNode(make_app()) as node:
        rested = Rested(node)
        assert await rested.ask() == 200
        await rested.freeze()
        first, thaw = rested.running.instance.id, node.driver.thaw

        async def refuse(handle: Handle) -> None:
            if handle.id == first:
                raise EngineError("it is stuck")
            await thaw(handle)

        node.driver.thaw = refuse  # type: ignore[method-assign]
        assert await rested.ask() == 200
        assert any("it could not be thawed: it is stuck" in e.reason for e in node.events)


async def test_orders_for_what_is_gone_or_only_starts_do_nothing() -> None:
    async with PretendNode(make_app(freeze_after_s=1800.0)) as node:
        rested = Rested(node)
        node.executor.freezer.freeze(InstanceId("gone"), 1)
        node.executor.freezer.thaw(InstanceId("gone"))
        assert await rested.ask() == 200
        node.executor.freezer.thaw(rested.running.instance.id)
        assert rested.state is State.READY


@pytest.mark.parametrize("written", [State.FREEZING, State.FROZEN])
async def test_the_next_agent_finds_it_as_it_was_left(written: State) -> None:
    """One that was killed while it had something frozen does not know how far that came."""
    async with PretendNode(make_app()) as node:
        rested = Rested(node)
        assert await rested.ask() == 200
        await rested.freeze()
        running, executor = rested.running, node.executor
        running.record = replace(running.record, instance=replace(running.instance, state=written))
        executor.save(running)
        executor.running.clear()
        told: list[Any] = []
        executor.notify = told.append
        await executor.recover()
        is_frozen = written is State.FROZEN
        assert rested.state is (State.FROZEN if is_frozen else State.READY)
        assert rested.life.frozen is is_frozen
        assert len(told) == (0 if is_frozen else 1)
        found, now = tuple(executor.instances()), executor.clock.now()
        node.home.on_node_report(rested.running.instance.node, found, now)
        assert await rested.ask() == 200
        assert len(executor) == 1
