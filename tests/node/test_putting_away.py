"""Instances that are put away with their own state, with a real gateway, home and store before a
pretended engine; and the ends of agents and nodes at each point of it."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest
from msgspec.structs import replace
from tests.node.test_saving import (
    ASKED,
    I1,
    NODE,
    Agents,
    agents,
    ask,
    make_app,
    options,
    reasons,
    until,
)

from tabane.clock import SYSTEM
from tabane.errors import EngineError
from tabane.gateway.activation import InstanceEnded
from tabane.gateway.ledger import AppLedger
from tabane.images.checkpoint import CheckpointStore
from tabane.images.room import NoRoom
from tabane.model import App, ExitStatus, State
from tabane.node import restoring
from tabane.node.instances import Executor
from tabane.node.records import write_record
from tabane.node.running import Transition
from tabane.reactions import Hooks
from tabane.runtimes import mounts
from tabane.runtimes.api import InstanceSpec
from tabane.runtimes.fake import FakeDriver, Script
from tabane.supervise import Supervisor
from tabane.testing.dumps import cool
from tabane.testing.pretend import PretendNode

__all__ = ["agents"]

TALLY = Script(saves=True, answers=b"{origin} {id} {answered}")


def make(**reactive: Any) -> App:
    limits = {"checkpoint": False, "checkpoint_after_s": 0.05, "stop_after_s": 3600.0, "max": 1}
    return make_app(**(limits | reactive))


def ledger_of(node: PretendNode) -> AppLedger:
    ledger = node.home.ledger(make().key)
    assert ledger is not None
    return ledger


async def rest(node: PretendNode) -> None:
    """Its one instance is put away."""
    await until(lambda: not node.driver.world.lives and len(node.checkpoints.store.all()) == 1)
    await until(lambda: not node.links.in_use)


async def test_it_goes_on_under_its_id_from_where_it_was_once() -> None:
    async with PretendNode(make(), script=TALLY) as node:
        for count in range(4):
            assert (await ask(node))[2] == count + 1
            (identity,) = {event.instance for event in node.events}
            (running,) = (r for r in node.executor.running.values() if not r.ended)
            assert running.instance.generation.counter == count + 1
            await rest(node)
        assert node.events[-1].reason == "put away, as idle for 50ms"
        assert node.driver.world.lives == {} and identity not in node.executor.running
        assert options(node) == ["cold", "resume", "resume", "resume"]
        assert {"open", "engine", "decide"} <= node.wakes[-1].phases_us.keys()
        assert node.wakes[-1].note == ""


async def test_its_hook_is_called_before_it_goes_on() -> None:
    app = replace(make(), hooks=Hooks("http:/restored"))
    script = replace(TALLY, posts="204 Done", answers=b"{origin} {id} {told}")
    async with PretendNode(app, script=script) as node:
        assert (await ask(node))[2] == 0
        await rest(node)
        assert (await ask(node))[2] == 1
        assert options(node) == ["cold", "resume"]


async def test_what_is_used_up_is_gone_before_the_first_session() -> None:
    async with PretendNode(make(checkpoint_after_s=0.3), script=TALLY) as node:
        await ask(node)
        await rest(node)
        await ask(node)
        assert node.checkpoints.store.all() == []
        assert not [*(node.checkpoints.store._directory / "manifests").iterdir()]


async def test_what_is_frozen_is_put_away_and_does_nothing_more() -> None:
    app = make(freeze_after_s=0.02, checkpoint_after_s=0.5)
    async with PretendNode(app, script=TALLY) as node:
        first, *_ = await ask(node)
        await rest(node)
        states = [event.state for event in node.events]
        assert states[-5:] == [
            State.FREEZING,
            State.FROZEN,
            State.CHECKPOINTING,
            State.STOPPING,
            State.ABSENT,
        ]
        assert (await ask(node))[:2] == (first, first)


async def test_a_session_in_the_middle_of_the_dump_wins() -> None:
    app = make(checkpoint_after_s=0.3)
    async with PretendNode(app, script=replace(TALLY, save_takes=0.2)) as node:
        first, *_ = await ask(node)
        await until(
            lambda: first in node.driver.world.lives and node.driver.world.lives[first].frozen
        )
        assert await ask(node) == (first, first, 2)
        assert node.checkpoints.store.all() == []
        assert [*node.checkpoints.store.memory.directory.iterdir()] == []
        await rest(node)


@pytest.mark.parametrize("wait_ms", range(0, 40, 4))
async def test_no_session_and_no_state_is_lost_however_they_meet(wait_ms: int) -> None:
    async with PretendNode(make(), script=replace(TALLY, save_takes=0.01)) as node:
        for count in range(6):
            assert (await ask(node))[2] == count + 1
            await asyncio.sleep(0.045 + wait_ms / 1000)


async def test_with_copies_the_one_that_is_put_away_comes_first() -> None:
    app = make(checkpoint=True, concurrency=1, max=2, checkpoint_after_s=0.4)
    async with PretendNode(app, script=TALLY) as node:
        first, *_ = await ask(node)
        await until(lambda: not node.driver.world.lives and len(node.checkpoints.store.all()) == 2)
        await until(lambda: not node.links.in_use)
        before = len(node.events)
        told = await asyncio.gather(ask(node), ask(node))
        assert {origin for origin, *_ in told} == {first}
        begun = [e.instance for e in node.events[before:] if e.state is State.STARTING]
        assert begun[0] == first and len(begun) == 2
        await until(lambda: [r.was_ready for r in node.executor.running.values()] == [True, True])
        assert {r.option for r in node.executor.running.values()} == {"resume", "restore"}


async def test_a_dump_that_fails_leaves_it_running_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tabane.scheduler.attempts.DUMP_FIRST_S", 0.05)
    async with PretendNode(make(), script=replace(TALLY, fail_save=2)) as node:
        await ask(node)
        await rest(node)
        told = [reason for reason in reasons(node) if "could not be put away" in reason]
        assert len(told) == 2 and "told to fail" in told[0]
        assert (await ask(node))[2] == 2


async def test_what_never_can_be_put_away_runs_until_it_is_stopped() -> None:
    app = make(stop_after_s=0.3)
    async with PretendNode(app, script=replace(TALLY, never_saves=True)) as node:
        await ask(node)
        await until(lambda: not node.driver.world.lives)
        assert node.driver.world.saves[app.key] == 1
        assert node.events[-1].reason == "idle for 0.3 s"


async def test_a_full_disk_leaves_it_running(monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: Any) -> None:
        raise NoRoom("the disk is full")

    async with PretendNode(make(), script=TALLY) as node:
        monkeypatch.setattr(node.checkpoints.store, "_write", full)
        first, *_ = await ask(node)
        await until(lambda: any("the disk is full" in reason for reason in reasons(node)))
        assert await ask(node) == (first, first, 2)
        assert [*node.checkpoints.store.memory.directory.iterdir()] == []


async def test_one_that_cannot_be_thawed_after_a_failed_dump_ends_and_is_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def stuck(handle: Any) -> None:
        raise EngineError("it is stuck")

    async with PretendNode(make(), script=replace(TALLY, fail_save=1)) as node:
        await ask(node)
        monkeypatch.setattr(node.driver, "thaw", stuck)
        await until(lambda: any("it could not be thawed: it is stuck" in r for r in reasons(node)))
        monkeypatch.undo()
        assert (await ask(node))[2] == 1


async def test_a_restore_that_fails_has_another_begin_and_keeps_the_state() -> None:
    async with PretendNode(make(), script=replace(TALLY, fail_restore=1)) as node:
        first, *_ = await ask(node)
        await rest(node)
        origin, identity, count = await ask(node)
        assert (origin, count) == (identity, 1) and identity != first
        assert options(node) == ["cold", "cold"]
        assert (
            f"{first}, which is put away, is left alone: it could not go on" in node.wakes[1].note
        )
        assert "told to fail" in node.wakes[1].note
        assert node.checkpoints.store.kept(first)  # type: ignore[arg-type]


async def test_a_copy_that_is_never_ready_again_is_one_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(restoring, "READY_S", 0.05)
    async with PretendNode(make(), script=replace(TALLY, deaf_copies=1)) as node:
        first, *_ = await ask(node)
        await rest(node)
        assert (await ask(node))[1] != first
        assert "did not become ready" in node.wakes[1].note
        assert node.checkpoints.store.kept(first)  # type: ignore[arg-type]
        assert first not in node.driver.world.lives


async def test_after_three_failures_it_is_given_up_and_told_of() -> None:
    async with PretendNode(make(), script=replace(TALLY, fail_restore=9)) as node:
        first, *_ = await ask(node)
        await rest(node)
        (stored,) = node.checkpoints.store.all()
        for _ in range(3):
            node.checkpoints.kept_attempts(stored.digest).restore_at = 0.0
            for away in node.home.ledger(make().key).away.values():  # type: ignore[union-attr]
                away.not_before = 0.0
            await ask(node)
            await until(lambda: len(node.driver.world.lives) == 0)
        assert not node.checkpoints.store.kept(first)  # type: ignore[arg-type]
        assert any("and is given up" in reason for reason in reasons(node))
        assert f"{first} was put away, and is lost" in node.wakes[-1].note


async def test_what_is_refused_is_kept_and_another_begins() -> None:
    async with PretendNode(make(), script=TALLY) as node:
        first, *_ = await ask(node)
        await rest(node)
        node.checkpoints.refused = ("criu 4.2 made it, and here is 4.3",)
        assert (await ask(node))[1] != first
        assert "criu 4.2 made it, and here is 4.3" in node.wakes[1].note
        assert node.checkpoints.store.kept(first)  # type: ignore[arg-type]


async def test_what_was_damaged_on_disk_is_lost_and_the_next_says_so() -> None:
    async with PretendNode(make(), script=TALLY) as node:
        first, *_ = await ask(node)
        await rest(node)
        store = node.checkpoints.store
        (stored,) = store.all()
        await until(lambda: store.memory.is_warm(stored.digest))
        await cool(store, stored.digest)
        for path in (store._directory / "chunks").iterdir():
            path.write_bytes(path.read_bytes()[:-1])
        assert (await ask(node))[1] != first
        assert "is lost" in node.wakes[1].note and "damaged" in node.wakes[1].note
        assert store.all() == []


async def test_what_somebody_removed_does_not_go_on() -> None:
    async with PretendNode(make(), script=TALLY) as node:
        first, *_ = await ask(node)
        await rest(node)
        (stored,) = node.checkpoints.store.all()
        await node.checkpoints.store.remove(stored.digest)
        assert (await ask(node))[1] != first
        assert "is not there any more" in node.wakes[1].note


async def test_a_new_revision_and_stop_after_drop_what_is_put_away() -> None:
    async with PretendNode(make(), script=TALLY) as node:
        first, *_ = await ask(node)
        await rest(node)
        node.change(replace(make(), revision=2))
        await until(lambda: not node.checkpoints.store.all())
        await until(lambda: node.events[-1].reason == "replaced by revision 2")
        assert (await ask(node))[1] != first
    async with PretendNode(make(stop_after_s=0.3), script=TALLY) as node:
        await ask(node)
        await rest(node)
        await until(lambda: not node.checkpoints.store.all())
        await until(lambda: node.events[-1].reason == "put away, and idle for 0.3 s")


async def test_what_is_removed_by_order_is_told_to_its_home() -> None:
    async with PretendNode(make(), script=TALLY) as node:
        first, *_ = await ask(node)
        await rest(node)
        (stored,) = node.checkpoints.store.all()
        await until(lambda: ledger_of(node).away.keys() == {first})
        await node.checkpoints.store.remove(stored.digest)
        node.executor.putting_away.lose(stored.about, "it was removed")
        assert ledger_of(node).away == {}
        assert (node.events[-1].instance, node.events[-1].reason) == (first, "it was removed")
        assert (await ask(node))[1] != first
        assert (options(node), node.wakes[-1].note) == (["cold", "cold"], "")


async def test_who_uses_it_breaks_it_off() -> None:
    async with PretendNode(make(), script=replace(TALLY, save_takes=0.1)) as node:
        first, *_ = await ask(node)
        (running,) = node.executor.running.values()
        await until(lambda: running.instance.state is State.CHECKPOINTING)
        await node.executor.freezer.wait_awake(running)
        assert running.instance.state is State.READY and first in node.driver.world.lives
        assert node.checkpoints.store.all() == []


# The end of an agent, and of everything


WANTS = replace(ASKED, reactive=replace(ASKED.reactive, checkpoint=False, checkpoint_after_s=60.0))


def halting(reached: asyncio.Event, original: Any) -> Any:
    """A function that does all of it, and never comes back: then the agent is killed."""

    async def halt(*values: Any, **named: Any) -> Any:
        if original is not None:
            await original(*values, **named)
        reached.set()
        await asyncio.Event().wait()

    return halt


def never_restoring(reached: asyncio.Event) -> Any:
    """It is killed with who asked for it."""

    async def halt(driver: FakeDriver, spec: InstanceSpec, *_: Any) -> None:
        reached.set()
        try:
            await asyncio.Event().wait()
        finally:
            driver.world.lives[spec.id].end(ExitStatus(signal=signal.SIGKILL))

    return halt


async def put_away_until(agents: Agents, patch: pytest.MonkeyPatch, where: str) -> None:
    """An agent is killed in that phase of putting I1 away."""
    agents.script = TALLY
    async with Supervisor("first") as tasks:
        first = agents.make(tasks)
        first.start(WANTS, I1, SYSTEM.now())
        await until(lambda: I1 in first.running and first.running[I1].instance.puttable)
        reached, driver = asyncio.Event(), first.running[I1].driver
        with patch.context() as patched:
            if where == "frozen":
                patched.setattr(driver, "freeze", halting(reached, driver.freeze))
            elif where == "dumped":
                patched.setattr(driver, "checkpoint", halting(reached, driver.checkpoint))
            elif where == "kept":
                patched.setattr(CheckpointStore, "keep", halting(reached, CheckpointStore.keep))
            else:
                patched.setattr(first.putting_away, "_end", halting(reached, None))
            first.putting_away.put_away(I1, 1)
            await reached.wait()
            record, frozen = first.running[I1].record, agents.world.lives[I1].frozen
    assert frozen
    write_record(agents.directory / "run" / I1, record)


@pytest.mark.parametrize("where", ["frozen", "dumped"])
async def test_before_it_is_on_disk_the_next_agent_has_it_go_on(
    agents: Agents, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    await put_away_until(agents, monkeypatch, where)
    async with Supervisor("next") as tasks:
        following = agents.make(tasks)
        await following.recover()
        running = following.running[I1]
        assert running.instance.state is State.READY and not agents.world.lives[I1].frozen
        assert agents.checkpoints.store.all() == []


@pytest.mark.parametrize("where", ["kept", "ending"])
async def test_once_it_is_on_disk_it_ends_and_goes_on_from_there(
    agents: Agents, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    await put_away_until(agents, monkeypatch, where)
    async with Supervisor("next") as tasks:
        following = agents.make(tasks)
        await following.recover()
        assert I1 not in agents.world.lives and following.running[I1].ended
        ended = agents.notices[-1]
        assert isinstance(ended, InstanceEnded) and ended.kept_after_s == 0.0
        await go_on(following, agents)
        assert following.running[I1].instance.generation.counter == 2


async def go_on(executor: Executor, agents: Agents) -> None:
    executor.release(I1)
    executor.start(WANTS, I1, SYSTEM.now(), resume=True)
    await until(lambda: I1 in executor.running and executor.running[I1].was_ready)
    assert agents.checkpoints.store.all() == []
    assert agents.world.lives[I1].origin == I1


async def test_a_node_that_ends_while_it_puts_one_away_has_it(
    agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is killed once it is on disk: the next node of that name tells of it."""
    await put_away_until(agents, monkeypatch, "kept")
    await agents.world.lives.pop(I1).aclose()
    (agents.directory / "run" / I1 / "record.json").unlink()
    async with Supervisor("next") as tasks:
        following = agents.make(tasks)
        await agents.checkpoints.store.load()
        told = [Transition(1.0, I1, WANTS.key, NODE, State.CHECKPOINTING)]
        await following.recover(told)
        assert agents.says[-1].state is State.ABSENT
        assert agents.says[-1].reason == "its node ended; it is put away"
        (agents.directory / "run" / I1).rmdir()
        await go_on(following, agents)


@pytest.mark.parametrize("kill", ["agent", "everything"])
@pytest.mark.parametrize("where", ["opened", "restored", "used up"])
async def test_killed_while_it_goes_on_there_is_either_it_or_its_state(
    agents: Agents, monkeypatch: pytest.MonkeyPatch, where: str, kill: str
) -> None:
    await put_away_until(agents, monkeypatch, "ending")
    world, reached = agents.world, asyncio.Event()
    async with Supervisor("second") as tasks:
        second = agents.make(tasks)
        await second.recover()
        second.release(I1)
        with monkeypatch.context() as patched:
            if where == "opened":
                patched.setattr(FakeDriver, "restore", never_restoring(reached))
            elif where == "restored":
                patched.setattr(agents.checkpoints, "use_up", halting(reached, None))
            else:
                used_up = halting(reached, agents.checkpoints.use_up)
                patched.setattr(agents.checkpoints, "use_up", used_up)
            second.start(WANTS, I1, SYSTEM.now(), resume=True)
            await reached.wait()
            assert second.running[I1].instance.state is State.STARTING
    if kill == "everything":
        await world.lives.pop(I1).aclose()
        mounts.remove_tree(agents.directory / "run" / I1)
    agents.notices.clear()
    async with Supervisor("next") as tasks:
        following = agents.make(tasks)
        await agents.checkpoints.store.load()
        await following.recover()
        if kill == "agent" and where != "opened":
            await until(lambda: following.running[I1].was_ready)
            assert agents.checkpoints.kept(I1) is None
            assert world.lives[I1].origin == I1
        elif where == "used up":
            assert agents.checkpoints.kept(I1) is None and I1 not in following.running
        else:
            assert agents.checkpoints.kept(I1) is not None and I1 not in world.lives
            if kill == "agent":
                ended = agents.notices[-1]
                assert isinstance(ended, InstanceEnded) and ended.kept_after_s == 0.0
            await go_on(following, agents)
