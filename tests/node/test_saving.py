"""Checkpoints of a node's instances as a rung of the ladder, with a real gateway, home and store
before a pretended engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tabane.clock import SYSTEM
from tabane.gateway.activation import InstanceReady
from tabane.images.room import NoRoom
from tabane.model import App, InstanceId, NodeName, Reactive, State
from tabane.node import restoring
from tabane.node.instances import Executor
from tabane.node.records import read_record, write_record
from tabane.node.running import Transition
from tabane.reactions import Hooks
from tabane.runtimes.api import Handle, Stats
from tabane.runtimes.fake import FakeDriver, Script, World
from tabane.runtimes.volumes import VolumeFiles
from tabane.supervise import Supervisor
from tabane.testing.dumps import cool
from tabane.testing.pretend import (
    PretendImages,
    PretendLinks,
    PretendNode,
    PretendServices,
    ask_by_http,
    fetch,
)
from tabane.testing.saved import PretendCheckpoints

HOST = "app.test"
NODE = NodeName("here/here-1")
GIVE_UP_S = 60.0
SAVES = Script(saves=True, answers=b"{origin} {id} {told}")


def make_app(**reactive: Any) -> App:
    limits = {"checkpoint": True, "stop_after_s": 0.05, **reactive}
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


async def ask(node: PretendNode) -> tuple[str, str, int]:
    """Of what the instance that answered is a copy, its id, and how often its hook was called."""
    status, body = await fetch(node.port, HOST)
    assert status == 200, body
    origin, identity, told = body.decode().split()
    return origin, identity, int(told)


async def rest(node: PretendNode, checkpoints: int = 1) -> None:
    """Its instances have gone, and it has so many checkpoints."""
    await until(lambda: not node.driver.world.lives)
    await until(lambda: len(node.checkpoints.store.all()) == checkpoints)


def reasons(node: PretendNode) -> list[str]:
    return [event.reason for event in node.events if event.reason]


def options(node: PretendNode) -> list[str]:
    return [record.option for record in node.wakes]


async def test_the_first_is_saved_when_it_is_idle_and_the_next_begin_as_its_copies() -> None:
    async with PretendNode(make_app(), script=SAVES) as node:
        first, identity, _ = await ask(node)
        assert first == identity
        await rest(node)
        states = [event.state for event in node.events]
        saved = [State.STARTING, State.READY, State.CHECKPOINTING, State.READY]
        assert states == [*saved, State.STOPPING, State.ABSENT]
        for _ in range(2):
            origin, identity, _ = await ask(node)
            assert origin == first != identity
            await rest(node)
        assert options(node) == ["cold", "restore", "restore"]
        assert {"open", "engine", "decide"} <= node.wakes[-1].phases_us.keys()
        assert node.driver.world.saves[make_app().key] == 1


async def test_many_begin_from_one_at_the_same_time() -> None:
    app = make_app(concurrency=1, max=10, stop_after_s=0.3)
    async with PretendNode(app, script=SAVES) as node:
        first, *_ = await ask(node)
        await rest(node)
        answers = await asyncio.gather(*(ask(node) for _ in range(10)))
        assert {origin for origin, *_ in answers} == {first}
        assert options(node).count("cold") == 1
        await rest(node)


async def test_of_several_of_one_revision_one_is_saved() -> None:
    app = make_app(concurrency=1, max=3, stop_after_s=1.0)
    async with PretendNode(app, script=replace(SAVES, start_takes=0.05)) as node:
        await asyncio.gather(*(ask(node) for _ in range(3)))
        await rest(node)
        assert node.driver.world.saves[app.key] == 1
        assert [e.state for e in node.events].count(State.CHECKPOINTING) == 1


async def test_a_session_that_comes_during_the_dump_is_answered_after_it() -> None:
    app = make_app(stop_after_s=3600.0, max=1)
    async with PretendNode(app, script=replace(SAVES, save_takes=0.3)) as node:
        first, *_ = await ask(node)
        (running,) = node.executor.running.values()
        await until(lambda: node.driver.world.lives[first].frozen)
        record = read_record(node.records()[0])
        assert record is not None and record.instance.state is State.CHECKPOINTING
        assert (await ask(node))[1] == first
        assert running.instance.state is State.READY
        assert options(node) == ["cold", "thaw"]
        assert node.wakes[1].note == "it stood still, as a checkpoint of it was being made"
        assert node.wakes[1].phases_us["first_byte"] > 100_000


async def test_a_session_that_comes_before_the_dump_has_begun_puts_it_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with PretendNode(make_app(stop_after_s=3600.0, max=1), script=SAVES) as node:
        asked, goes_on = asyncio.Event(), asyncio.Event()
        stats = node.driver.stats

        async def wait(handle: Handle) -> Stats:
            asked.set()
            await goes_on.wait()
            return await stats(handle)

        monkeypatch.setattr(node.driver, "stats", wait)
        first, *_ = await ask(node)
        await asked.wait()
        assert (await ask(node))[1] == first
        assert node.driver.world.saves[make_app().key] == 0
        goes_on.set()
        await until(lambda: node.checkpoints.store.all())
        assert [e.state for e in node.events].count(State.CHECKPOINTING) == 2


async def test_no_session_is_lost_however_it_meets_a_dump() -> None:
    app = make_app(concurrency=1, max=1, stop_after_s=3600.0)
    for number in range(12):
        async with PretendNode(app, script=replace(SAVES, save_takes=0.005)) as node:
            await ask(node)
            await asyncio.sleep(0.19 + number * 0.002)
            await ask(node)
            assert len(node.executor) == 1


async def test_sessions_one_after_the_other_put_the_dump_off() -> None:
    async with PretendNode(make_app(stop_after_s=3600.0), script=SAVES) as node:
        for _ in range(30):
            await ask(node)
            await asyncio.sleep(0.01)
        assert node.driver.world.saves[make_app().key] == 0
        await until(lambda: node.checkpoints.store.all())


async def test_a_stop_waits_for_the_dump_and_a_program_that_ends_in_it_is_told_of() -> None:
    async with PretendNode(
        make_app(stop_after_s=3600.0), script=replace(SAVES, save_takes=5.0)
    ) as node:
        await ask(node)
        (running,) = node.executor.running.values()
        await until(lambda: running.instance.state is State.CHECKPOINTING)
        node.executor.stop(running.instance.id, "told to")
        await until(lambda: not node.driver.world.lives)
        assert node.events[-1].reason == "told to"
        assert node.checkpoints.store.all() == []
        await ask(node)
        (running,) = (r for r in node.executor.running.values() if not r.ended)
        await until(lambda: running.instance.state is State.CHECKPOINTING)
        node.driver.world.lives[running.instance.id].end(replace(SAVES.dies, code=3))
        await until(lambda: not node.driver.world.lives)
        assert "code 3" in node.events[-1].reason


async def test_a_dump_that_fails_is_told_of_and_tried_again_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tabane.scheduler.attempts.DUMP_FIRST_S", 0.05)
    app = make_app(stop_after_s=3600.0)
    async with PretendNode(app, script=replace(SAVES, fail_save=2)) as node:
        await ask(node)
        await until(lambda: node.checkpoints.store.all())
        assert node.driver.world.saves[app.key] == 3
        told = [reason for reason in reasons(node) if "could be made" in reason]
        assert len(told) == 2 and "told to fail" in told[0]
        ledger = node.home.ledger(app.key)
        assert ledger is not None and ledger.unsaved == ""
        await until(lambda: not node.checkpoints.attempts(app, "fake").describe())


async def test_what_never_can_be_saved_is_tried_once() -> None:
    app = make_app()
    async with PretendNode(app, script=replace(SAVES, never_saves=True)) as node:
        for _ in range(2):
            await ask(node)
            await until(lambda: not node.driver.world.lives)
        assert node.driver.world.saves[app.key] == 1
        assert "cannot be saved" in node.checkpoints.attempts(app, "fake").describe()
        ledger = node.home.ledger(app.key)
        assert ledger is not None and "cannot be saved" in ledger.unsaved
        assert options(node) == ["cold", "cold"]


async def test_a_full_disk_is_told_of_and_the_instance_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def full(*_: Any) -> None:
        raise NoRoom("the disk is full")

    async with PretendNode(make_app(stop_after_s=3600.0), script=SAVES) as node:
        monkeypatch.setattr(node.checkpoints.store, "_write", full)
        first, *_ = await ask(node)
        await until(lambda: any("the disk is full" in reason for reason in reasons(node)))
        assert (await ask(node))[1] == first
        assert [*node.checkpoints.store.memory.directory.iterdir()] == []


async def test_what_is_saved_is_frozen_after_that_and_so_are_its_copies() -> None:
    app = make_app(freeze_after_s=0.02, stop_after_s=0.5)
    async with PretendNode(app, script=SAVES) as node:
        first, *_ = await ask(node)
        await rest(node)
        states = [event.state for event in node.events]
        saved = [State.STARTING, State.READY, State.CHECKPOINTING, State.READY]
        assert states[:6] == [*saved, State.FREEZING, State.FROZEN]
        assert (await ask(node))[0] == first
        (running,) = (r for r in node.executor.running.values() if not r.ended)
        await until(lambda: running.instance.state is State.FROZEN)
        assert (await ask(node))[0] == first
        assert options(node) == ["cold", "restore", "thaw"]


async def test_without_an_engine_that_can_nothing_is_saved() -> None:
    async with PretendNode(make_app(), script=replace(SAVES, saves=False)) as node:
        await ask(node)
        await until(lambda: not node.driver.world.lives)
        assert State.CHECKPOINTING not in [event.state for event in node.events]


async def test_what_is_not_known_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tabane.node.saving.HELD_AGAIN_S", 0.02)
    async with PretendNode(make_app(stop_after_s=3600.0), script=SAVES) as node:
        node.checkpoints.is_pending = True
        await ask(node)
        await asyncio.sleep(0.3)
        assert node.driver.world.saves[make_app().key] == 0
        node.checkpoints.is_pending = False
        await until(lambda: node.checkpoints.store.all())


async def saved(node: PretendNode) -> str:
    """Have a checkpoint made; returns of which instance."""
    first, *_ = await ask(node)
    await rest(node)
    return first


async def test_a_restore_that_fails_begins_cold_and_says_why() -> None:
    app = make_app()
    async with PretendNode(app, script=replace(SAVES, fail_restore=1)) as node:
        first = await saved(node)
        origin, identity, _ = await ask(node)
        assert origin == identity != first
        assert options(node) == ["cold", "cold"]
        assert node.wakes[1].note.startswith("it could not begin from its checkpoint: fake could")
        assert any("told to fail" in reason for reason in reasons(node))
        assert len({e.instance for e in node.events}) == 2  # the same instance began cold
        await until(lambda: not node.driver.world.lives)
        origin, identity, _ = await ask(node)
        assert origin == identity and "left alone for a while" in node.wakes[2].note
        node.checkpoints.attempts(app, "fake").restore_at = 0.0
        await until(lambda: not node.driver.world.lives)
        assert (await ask(node))[0] == first


async def test_a_copy_that_does_not_become_ready_gives_way_to_a_cold_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(restoring, "READY_S", 0.05)
    async with PretendNode(make_app(), script=replace(SAVES, deaf_copies=1)) as node:
        await saved(node)
        origin, identity, _ = await ask(node)
        assert origin == identity
        assert "did not become ready (http:/ on port 8000) within 0.05 s" in node.wakes[1].note


async def test_one_whose_restores_fail_again_and_again_is_discarded() -> None:
    app = make_app()
    async with PretendNode(app, script=replace(SAVES, fail_restore=99)) as node:
        await saved(node)
        attempts = node.checkpoints.attempts(app, "fake")
        for _ in range(3):
            assert (await ask(node))[0]
            attempts.restore_at = 0.0
            await until(lambda: not node.driver.world.lives)
        assert len(node.checkpoints.discarded) == 1
        assert "was discarded" in attempts.describe() and attempts.dump_in_s(0.0)


async def test_a_damaged_checkpoint_is_found_out_and_begins_cold() -> None:
    async with PretendNode(make_app(), script=SAVES) as node:
        await saved(node)
        store = node.checkpoints.store
        (stored,) = store.all()
        await until(lambda: store.memory.is_warm(stored.digest))
        await cool(store, stored.digest)
        for path in (p for p in store._directory.rglob("*") if p.is_file()):
            path.write_bytes(b"x" * path.stat().st_size)
        origin, identity, _ = await ask(node)
        assert origin == identity and "damaged" in node.wakes[1].note
        assert store.all() == []


async def test_a_refused_checkpoint_is_a_note() -> None:
    async with PretendNode(make_app(), script=SAVES) as node:
        await saved(node)
        node.checkpoints.refused = ("criu 4.2 made it, and here is 4.3",)
        await ask(node)
        assert node.wakes[1].note == "its checkpoint is refused: criu 4.2 made it, and here is 4.3"


async def test_a_new_revision_does_not_begin_from_the_old_one() -> None:
    async with PretendNode(make_app(), script=SAVES) as node:
        await saved(node)
        node.change(replace(make_app(), revision=2))
        origin, identity, _ = await ask(node)
        assert origin == identity
        await rest(node, checkpoints=2)
        assert (await ask(node))[0] == origin


@pytest.mark.parametrize("posts", ["204 Done", "500 No", "nothing"])
async def test_the_hook_is_called_before_the_first_session(posts: str) -> None:
    app = replace(make_app(stop_after_s=0.5), hooks=Hooks("http:/restored", deadline_s=0.05))
    script = replace(SAVES, posts=posts, answers=b"{origin} {id} {told}")
    async with PretendNode(app, script=script) as node:
        first = await saved(node)
        origin, identity, told = await ask(node)
        if posts == "204 Done":
            assert (origin, told) == (first, 1)
            return
        assert (origin, told) == (identity, 0)
        what = "answered 500" if posts == "500 No" else "answered by no HTTP"
        assert node.wakes[1].note.endswith(f"its hook `restored`, POST /restored, is {what}")


async def test_a_stop_in_the_middle_of_a_restore_leaves_nothing() -> None:
    async with PretendNode(make_app(), script=replace(SAVES, restore_takes=20.0)) as node:
        await saved(node)
        await until(lambda: not node.links.in_use)
        node.executor.start(node.apps[make_app().key], InstanceId("copy"), SYSTEM.now())
        await until(lambda: node.driver.world.restores)
        node.executor.stop(InstanceId("copy"), "told to")
        await until(lambda: node.events[-1].state is State.ABSENT)
        assert node.events[-1].reason == "told to"
        assert node.driver.world.lives == {}
        (stored,) = node.checkpoints.store.all()
        assert node.checkpoints.store.memory.users(stored.digest) == 0


# The end of an agent


class Agents:
    """Executors of a node, one after the other: each but the last was killed."""

    def __init__(self, directory: Path, script: Script) -> None:
        self.directory, self.world, self.script = directory, World(), script
        self.checkpoints = PretendCheckpoints(directory / "checkpoints")
        self.notices: list[Any] = []
        self.says: list[Transition] = []
        (directory / "run").mkdir()

    def make(self, tasks: Supervisor) -> Executor:
        driver = FakeDriver(self.script, self.world)
        return Executor(
            *(NODE, "one", self.directory / "run", self.directory / "logs", "/tabane/t"),
            links=PretendLinks(),
            services=PretendServices(),
            volumes=VolumeFiles(self.directory / "volumes"),
            images=PretendImages(),
            checkpoints=self.checkpoints,
            driver_for=lambda app: driver,
            driver_named=lambda name: driver,
            clock=SYSTEM,
            tasks=tasks,
            notify=self.notices.append,
            on_change=self.says.append,
        )

    def last_ready(self) -> InstanceReady:
        return [notice for notice in self.notices if isinstance(notice, InstanceReady)][-1]


@pytest.fixture
async def agents(tmp_path: Path) -> AsyncIterator[Agents]:
    made = Agents(tmp_path, SAVES)
    await made.checkpoints.store.load()
    yield made
    for life in list(made.world.lives.values()):
        await life.aclose()


I1, I2 = InstanceId("one"), InstanceId("two")
ASKED = ask_by_http(make_app())


async def test_the_next_agent_has_go_on_what_one_was_saving(agents: Agents) -> None:
    async with Supervisor("first") as tasks:
        first = agents.make(tasks)
        first.start(ASKED, I1, SYSTEM.now())
        await until(lambda: I1 in first.running and first.running[I1].instance.savable)
        record = replace(
            first.running[I1].record,
            instance=replace(first.running[I1].instance, state=State.CHECKPOINTING, freezes=1),
        )
        write_record(agents.directory / "run" / I1, record)
    async with Supervisor("next") as tasks:
        following = agents.make(tasks)
        await following.recover()
        running = following.running[I1]
        assert running.instance.state is State.READY and running.instance.savable
        assert agents.says[-1].reason == "the agent that saved it ended"
        assert agents.last_ready().instance == running.instance
        following.saver.save(I1, 2)
        await until(lambda: agents.checkpoints.store.all())


async def test_the_next_agent_takes_over_what_was_restored_meanwhile(agents: Agents) -> None:
    app = replace(ASKED, hooks=Hooks("http:/restored"))
    async with Supervisor("first") as tasks:
        first = agents.make(tasks)
        first.start(app, I1, SYSTEM.now())
        await until(lambda: I1 in first.running and first.running[I1].instance.savable)
        first.saver.save(I1, 1)
        await until(lambda: agents.checkpoints.store.all())
        first.start(app, I2, SYSTEM.now())
        await until(lambda: agents.last_ready().instance.id == I2)
        running = first.running[I2]
        assert agents.world.lives[I2].told == 1
        instance = replace(running.instance, state=State.STARTING, ready_at=0.0)
        write_record(agents.directory / "run" / I2, replace(running.record, instance=instance))
    async with Supervisor("next") as tasks:
        following = agents.make(tasks)
        agents.notices.clear()
        await following.recover()
        await until(lambda: following.running[I2].instance.state is State.READY)
        assert agents.world.lives[I2].told == 2
        trace = next(
            notice.trace
            for notice in agents.notices
            if isinstance(notice, InstanceReady) and notice.instance.id == I2
        )
        assert trace is not None and trace.option == "restore"


async def test_the_next_agent_clears_away_what_was_not_restored_yet(agents: Agents) -> None:
    agents.script = replace(SAVES, restore_takes=20.0)
    async with Supervisor("first") as tasks:
        first = agents.make(tasks)
        first.start(ASKED, I1, SYSTEM.now())
        await until(lambda: I1 in first.running and first.running[I1].instance.savable)
        first.saver.save(I1, 1)
        await until(lambda: agents.checkpoints.store.all())
        first.start(ASKED, I2, SYSTEM.now())
        await until(lambda: agents.world.restores)
    async with Supervisor("next") as tasks:
        following = agents.make(tasks)
        await following.recover()
        assert following.running[I2].ended and I2 not in agents.world.lives
        assert following.running[I1].instance.state is State.READY
