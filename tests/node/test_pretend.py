"""Gateway, home and executor of one node in this process, over an engine that pretends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from tabane.clock import SYSTEM
from tabane.errors import EngineError
from tabane.model import PHASES, App, ExitStatus, InstanceId, Reactive, State
from tabane.node import instances
from tabane.node.running import Transition
from tabane.runtimes.api import Handle, InstanceSpec
from tabane.runtimes.fake import Script
from tabane.testing.pretend import NODE, PretendNode, fetch

GIVE_UP_S = 60.0
HOST = "app.test"


def make_app(name: str = "app", **reactive: Any) -> App:
    limits = {"stop_after_s": 3600.0, **reactive}
    return App(
        name=name,
        image="host",
        command=("serve",),
        port=8000,
        hosts=(f"{name}.test",),
        revision=1,
        reactive=Reactive(**limits),
    )


async def until(condition: Any) -> None:
    async with asyncio.timeout(GIVE_UP_S):
        while not condition():  # noqa: ASYNC110 (many things may make it true)
            await asyncio.sleep(0.002)


def starts(node: PretendNode, name: str = "app") -> int:
    """How many instances began: an engine was told, or could not be."""
    key = f"default/{name}"
    return len({event.instance for event in node.events if event.app == key})


async def test_one_wake_serves_all_that_follow() -> None:
    async with PretendNode(make_app()) as node:
        answers = [await fetch(node.port, HOST) for _ in range(20)]
        assert {status for status, _ in answers} == {200}
        assert len({body for _, body in answers}) == 1
        assert starts(node) == 1
        (record,) = node.wakes
    assert record.option == "cold"
    assert abs(sum(record.phases_us.values()) - record.total_us) <= len(PHASES)


async def test_a_crowd_gets_no_more_than_max() -> None:
    async with PretendNode(
        make_app(concurrency=10, max=20), script=Script(start_takes=0.01)
    ) as node:
        answers = await asyncio.gather(*(fetch(node.port, HOST) for _ in range(200)))
        assert [status for status, _ in answers] == [200] * 200
        assert starts(node) <= 20


async def test_who_waits_too_long_is_told_what_the_start_is_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(instances, "STILL_S", 0.01)
    app, slow = make_app(start_timeout_s=0.05), Script(prepare_takes=3600.0)
    async with PretendNode(app, script=slow) as node:
        status, body = await fetch(node.port, HOST)
        assert status == 503
        doing = node.driver.capabilities.preparation
        assert f"on {NODE} since 1 s: {doing}" in body.decode()
        (record,) = node.wakes
        assert record.option == "failed"
        assert doing in record.outcome


async def test_idleness_stops_it_and_gives_its_address_back() -> None:
    async with PretendNode(make_app(stop_after_s=0.02)) as node:
        assert (await fetch(node.port, HOST))[0] == 200
        await until(lambda: not node.links.in_use)
        assert [event.state for event in node.events] == [
            State.STARTING,
            State.READY,
            State.STOPPING,
            State.ABSENT,
        ]
        assert node.executor.instances() == []


async def test_an_end_is_an_end_whatever_telling_of_it_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(transition: Transition) -> None:
        raise OSError("no space left on device")

    app = replace(make_app(), port=8001)  # a connection cut here keeps its port for a while
    async with PretendNode(app) as node:
        node.on_change = fail
        assert (await fetch(node.port, HOST))[0] == 200
        (instance,) = node.executor.instances()
        node.executor.stop(instance.id, "it shall end")
        await until(lambda: not node.links.in_use)
        assert node.driver.world.lives == {}
    assert "no space left on device" in caplog.text


async def test_a_request_that_meets_the_stop_is_not_lost() -> None:
    async with PretendNode(make_app(stop_after_s=0.01), script=Script(stop_takes=0.005)) as node:
        for number in range(100):
            assert (await fetch(node.port, HOST))[0] == 200
            await asyncio.sleep(0.008 + 0.00005 * number)
        assert starts(node) > 1


async def test_the_second_trial_saves_the_session() -> None:
    async with PretendNode(make_app(), script=Script(fail_start=1)) as node:
        assert (await fetch(node.port, HOST))[0] == 200
        assert starts(node) == 2


async def test_what_cannot_be_prepared_keeps_neither_address_nor_directory() -> None:
    async with PretendNode(make_app(), script=Script(fail_prepare=True)) as node:
        assert (await fetch(node.port, HOST))[0] == 503
        assert starts(node) == 1
        assert node.links.in_use == set()
        assert node.records() == []


async def test_a_record_that_cannot_be_read_is_not_answered_for() -> None:
    async with PretendNode(make_app()) as node:
        assert (await fetch(node.port, HOST))[0] == 200
        (record,) = node.records()
        record.write_bytes(b'{"instance": {}}')
        await node.executor.recover()
        assert not record.parent.exists()


async def test_one_that_cannot_be_taken_over_ends_and_keeps_no_agent_from_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse(spec: InstanceSpec, handle: Handle) -> Handle | None:
        raise EngineError("its state cannot be read")

    async with PretendNode(make_app()) as node:
        assert (await fetch(node.port, HOST))[0] == 200
        monkeypatch.setattr(node.driver, "recover", refuse)
        await node.executor.recover()
        assert node.driver.world.lives == {}
        ends = [event.reason for event in node.events if event.state is State.ABSENT]
        assert "its node's next agent could not take it over: its state cannot be read" in ends
        await until(lambda: not node.links.in_use)


async def test_what_fails_again_and_again_is_said_and_backed_off_from() -> None:
    app = make_app(start_timeout_s=0.5)
    async with PretendNode(app, script=Script(fail_start=1000)) as node:
        answers = [await fetch(node.port, HOST) for _ in range(30)]
        assert {status for status, _ in answers} == {503}
        assert all(b"did not start" in body for _, body in answers)
        ledger = node.home.ledger(make_app().key)
        assert ledger is not None
        assert ledger.setbacks.failed_starts >= 2
        assert starts(node) < 10


async def end_of(node: PretendNode, *, ordered: bool) -> str:
    """One that serves is killed; returns why it ended, as told."""
    (instance,) = (one for one in node.executor.instances() if one.state is State.READY)
    if ordered:
        node.executor.on_signal(instance.id)
    node.driver.world.lives[instance.id].end(ExitStatus(signal=15))
    await until(lambda: node.events[-1].state is State.ABSENT)
    return node.events[-1].reason


@pytest.mark.parametrize(("ordered", "setbacks"), [(True, 0), (False, 2)])
async def test_one_that_serves_and_is_killed_is_woken_again(ordered: bool, setbacks: int) -> None:
    async with PretendNode(make_app()) as node:
        for _ in range(2):
            assert (await fetch(node.port, HOST))[0] == 200
            reason = await end_of(node, ordered=ordered)
            by_order = ", after a signal by order" if ordered else ""
            assert reason == f"the program was killed by SIGTERM{by_order}"
        ledger = node.home.ledger(make_app().key)
        assert ledger is not None
        assert (ledger.setbacks.early_ends, ledger.setbacks.failed_starts) == (setbacks, 0)
        assert (await fetch(node.port, HOST))[0] == 200
        assert {wake.option for wake in node.wakes} == {"cold"}


async def test_what_cannot_be_prepared_is_not_tried_twice_for_one_request() -> None:
    async with PretendNode(make_app(), script=Script(fail_prepare=True)) as node:
        status, body = await fetch(node.port, HOST)
        assert (status, starts(node)) == (503, 1)
        assert b"default/app did not start once: " in body


async def test_programs_that_never_listen_keep_no_other_from_starting() -> None:
    slow = [make_app(f"slow-{number}", start_timeout_s=20.0) for number in range(8)]
    async with PretendNode(*slow, make_app()) as node:
        for app in slow:
            node.driver.scripts[app.key] = Script(listens_after=None)
        waiting = [asyncio.create_task(fetch(node.port, app.hosts[0])) for app in slow]
        await until(lambda: len(node.executor) == len(slow))
        assert (await fetch(node.port, HOST))[0] == 200
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_new_revision_takes_over() -> None:
    app = make_app()
    async with PretendNode(app) as node:
        _, before = await fetch(node.port, HOST)
        node.change(replace(app, revision=2))

        async def taken_over() -> None:
            while (await fetch(node.port, HOST))[1] == before:
                pass

        await asyncio.wait_for(taken_over(), GIVE_UP_S)
        await until(lambda: [i.revision for i in node.executor.instances()] == [2])


async def test_a_revision_that_does_not_start_leaves_the_old_one() -> None:
    app = make_app()
    async with PretendNode(app) as node:
        before = await fetch(node.port, HOST)
        node.driver.scripts[app.key] = Script(fail_start=1000)
        node.change(replace(app, revision=2))
        await until(lambda: any(event.state is State.FAILED for event in node.events))
        assert await fetch(node.port, HOST) == before


@pytest.mark.parametrize("state", [State.PREPARING, State.STARTING])
async def test_a_stop_that_meets_a_start_wins(state: State) -> None:
    app = make_app()
    async with PretendNode(app, script=Script(start_takes=0.05)) as node:
        instance = InstanceId("early")
        node.executor.start(app, instance, 0.0)
        assert [i.state for i in node.executor.instances()] == [State.PREPARING]
        await until(lambda: node.executor.instances()[0].state is state)
        node.executor.stop(instance, "not wanted any more")
        await until(lambda: any(event.state is State.ABSENT for event in node.events))
        assert node.driver.world.lives == {}
        assert node.events[-1].reason == "not wanted any more"


async def test_a_home_that_is_new_learns_what_runs() -> None:
    app = make_app(max=1)
    async with PretendNode(app) as node:
        before = await fetch(node.port, HOST)
        node.home.forget(app.key)
        node.home.on_node_report(NODE, tuple(node.executor.instances()), 0.0)
        node.home.hear(node.name, node.router.report(frozenset({app.key})))
        assert await fetch(node.port, HOST) == before
        assert starts(node) == 1


async def test_what_a_node_has_lost_is_started_again() -> None:
    """A start that a dying agent forgot: its home hears that there is no such instance."""
    app = make_app(max=1)
    async with PretendNode(app) as node:
        lost: list[InstanceId] = []
        start = node.executor.start
        node.executor.start = lambda app, instance, *told, **more: lost.append(instance)  # type: ignore
        waiting = asyncio.create_task(fetch(node.port, HOST))
        await until(lambda: lost)
        node.executor.start = start  # type: ignore
        node.home.on_node_report(NODE, (), SYSTEM.now())
        assert (await waiting)[0] == 200
