"""A node whose memory a test sets: real decisions and a real gateway, a pretended engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from tabane.gateway.activation import AppChanged, LowerAsked
from tabane.gateway.uses import InUse
from tabane.model import App, AppName, InstanceId, Reactive, Resources, State
from tabane.node.pressure import LOOK_S, Memory, Pressure
from tabane.node.running import Running, Transition
from tabane.runtimes.cgroups import MemoryUse
from tabane.runtimes.fake import Script
from tabane.testing import VirtualClock
from tabane.testing.pretend import NODE, PretendNode, fetch

MIB = 1 << 20
CAPACITY_MIB = 1000
KEPT_MIB = 64
WAIT_S = 60.0


def make_app(name: str, *, memory_mib: int = 100, **reactive: object) -> App:
    return App(
        name=name,
        image="host",
        command=("serve",),
        port=8000,
        hosts=(f"{name}.test",),
        revision=1,
        resources=Resources(memory_bytes=memory_mib * MIB),
        reactive=Reactive(**{"stop_after_s": 3600.0, "start_timeout_s": 60.0, **reactive}),
    )


@dataclass
class Machine:
    """Each instance holds what its app may once it is ready; all but a MiB could be swapped out."""

    node: PretendNode
    used_by_others_mib: int = 0
    swap_mib: int = 0
    stalled: float = 0.0
    reclaimed: set[InstanceId] = field(default_factory=set)
    lowered: list[LowerAsked] = field(default_factory=list)
    holds_mib: int = 0
    """What each holds, if not all that it may."""
    on_memory: Callable[[], None] = lambda: None
    is_deaf: bool = False
    """The gateway does not say what it uses."""
    asked: int = 0
    """How often it was asked."""

    def memory(self) -> Memory:
        self.on_memory()
        running = self.node.executor.running.values()
        there = (one for one in running if not one.ended and one.instance.ready_at)
        held = sum(self.measure(one).held_bytes for one in there)
        available = (CAPACITY_MIB - self.used_by_others_mib) * MIB - held
        return Memory(CAPACITY_MIB * MIB, max(0, available), self.swap_mib * MIB)

    def stalled_percent(self) -> float:
        return self.stalled

    async def uses(self) -> list[InUse]:
        self.asked += 1
        return [] if self.is_deaf else list(self.node.router.in_use(NODE))

    def measure(self, running: Running) -> MemoryUse:
        if running.instance.id in self.reclaimed:
            return MemoryUse(MIB, 0)
        held = self.holds_mib * MIB or running.record.app.resources.memory_bytes
        return MemoryUse(held, held - MIB)

    def reclaim(self, running: Running) -> None:
        self.reclaimed.add(running.instance.id)

    def lower(self, asked: LowerAsked) -> None:
        self.lowered.append(asked)
        self.node.home.about(asked.app, asked)


class Bench:
    """A node, its machine, and what watches over it."""

    def __init__(self, node: PretendNode, clock: VirtualClock) -> None:
        self.node, self.clock = node, clock
        self.machine = Machine(node)
        self.pressure = Pressure(node.executor, self.machine, clock, node.tasks)
        node.executor.find_room = self.pressure.find_room
        node.on_change = self._on_change

    def _on_change(self, transition: Transition) -> None:
        self.node.events.append(transition)
        self.pressure.follow(transition)

    async def wake(self, name: str) -> int:
        """One request; then 10 s pass."""
        status, _ = await self.let_pass(fetch(self.node.port, f"{name}.test"))
        self.clock.advance(10.0)
        return status

    async def let_pass(self, work: object) -> tuple[int, bytes]:
        """Until it is done, time passes."""
        task = asyncio.ensure_future(work)  # type: ignore[arg-type]
        async with asyncio.timeout(WAIT_S):
            while not task.done():
                await asyncio.sleep(0.002)
                self.clock.advance(0.01)
        return task.result()

    async def look(self, *, wait: bool = True) -> None:
        """Look, and let what follows from it happen; `wait`: to its end."""
        looked = asyncio.ensure_future(self.pressure.look())
        await self.until(looked.done)
        for _ in range(int(LOOK_S / 0.05)):
            self.clock.advance(0.05)
            await asyncio.sleep(0.002)
        if wait:
            await self.until(self.is_settled)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110 (the virtual clock stands still)
                await asyncio.sleep(0.002)

    def is_settled(self) -> bool:
        """No instance is on its way from one rung to another."""
        rungs = (State.READY, State.FROZEN)
        there = (one for one in self.node.executor.running.values() if not one.ended)
        return all(one.instance.state in rungs and one.saving is None for one in there)

    def state(self, name: str) -> str:
        found = (one.instance for one in self.node.executor.running.values() if not one.ended)
        return next((one.state for one in found if one.app == f"default/{name}"), State.ABSENT)

    def app_of(self, instance: InstanceId) -> AppName:
        return self.node.executor.running[instance].instance.app

    def ends(self, names: str) -> int:
        """How many of these apps' instances have ended."""
        return sum(len(self.reasons(name, State.ABSENT)) for name in names)

    def reasons(self, name: str, state: State) -> list[str]:
        key = AppName(f"default/{name}")
        told = (one for one in self.node.events if one.app == key)
        return [one.reason for one in told if one.state is state]


@asynccontextmanager
async def bench_of(*apps: App, script: Script | None = None) -> AsyncIterator[Bench]:
    clock = VirtualClock()
    async with PretendNode(*apps, script=script, clock=clock) as node:
        yield Bench(node, clock)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """`a` is the coldest, `c` was used last; each holds 100 MiB of 1000."""
    async with bench_of(*map(make_app, "abcdefgh")) as bench:
        for name in "abc":
            assert await bench.wake(name) == 200
        yield bench


async def test_while_there_is_memory_nobody_goes(bench: Bench) -> None:
    await bench.look()
    assert [bench.state(name) for name in "abc"] == [State.READY] * 3
    assert bench.machine.lowered == []


async def test_the_coldest_leaves_first_and_the_event_says_why(bench: Bench) -> None:
    bench.machine.used_by_others_mib = 650
    await bench.look()
    assert [bench.state(name) for name in "abc"] == [State.ABSENT, State.READY, State.READY]
    (reason,) = bench.reasons("a", State.STOPPING)
    assert reason.startswith("its node is short of memory (50 MiB available, 64 are kept free)")
    assert reason.endswith("it was idle for 30 s")
    await bench.look()
    assert bench.state("b") == State.READY


async def test_as_many_as_are_needed_leave() -> None:
    async with bench_of(*(make_app(name, memory_mib=40) for name in "abc")) as bench:
        for name in "abc":
            await bench.wake(name)
        bench.machine.used_by_others_mib = 850
        await bench.look()
        assert [bench.state(name) for name in "abc"] == [State.ABSENT, State.ABSENT, State.READY]


async def test_where_there_is_swap_they_rest(bench: Bench) -> None:
    bench.machine.swap_mib = 1000
    bench.machine.used_by_others_mib = 650
    await bench.look()
    assert [bench.state(name) for name in "abc"] == [State.FROZEN, State.READY, State.READY]
    assert [one.app for one in bench.machine.lowered] == ["default/a"]
    assert len(bench.machine.reclaimed) == 1
    assert "short of memory" in bench.reasons("a", State.FREEZING)[0]
    assert await bench.wake("a") == 200


async def test_one_with_a_session_stays_though_it_is_the_coldest(bench: Bench) -> None:
    lease = bench.node.router._grants.take(AppName("default/a"), bench.clock.now())
    assert lease is not None
    bench.clock.advance(1000.0)
    bench.machine.used_by_others_mib = 650
    await bench.look()
    assert [bench.state(name) for name in "abc"] == [State.READY, State.ABSENT, State.READY]


async def test_a_session_that_nobody_told_of_wins_all_the_same(bench: Bench) -> None:
    """It is found out when the slots are to be given back; then others are picked."""
    lease = bench.node.router._grants.take(AppName("default/a"), bench.clock.now())
    assert lease is not None
    bench.machine.is_deaf = True
    bench.machine.used_by_others_mib = 650
    for _ in range(4):
        await bench.look()
    assert [bench.state(name) for name in "abc"] == [State.READY, State.ABSENT, State.READY]


async def test_what_somebody_uses_stays(bench: Bench) -> None:
    (running,) = (
        one for one in bench.node.executor.running.values() if one.instance.app == "default/a"
    )
    bench.node.executor.freezer.hold(running)
    bench.machine.used_by_others_mib = 650
    await bench.look()
    assert [bench.state(name) for name in "abc"] == [State.READY, State.ABSENT, State.READY]


async def test_what_min_promises_leaves_last_and_that_is_said() -> None:
    apps = [make_app("kept", min=1), make_app("other")]
    async with bench_of(*apps) as bench:
        for name in ("kept", "other"):
            await bench.wake(name)
        bench.machine.used_by_others_mib = 750
        await bench.look()
        assert (bench.state("kept"), bench.state("other")) == (State.READY, State.ABSENT)
        bench.machine.used_by_others_mib = 850
        await bench.look()
        assert bench.state("kept") == State.ABSENT
        assert "so its app's min is not kept" in bench.reasons("kept", State.STOPPING)[0]


async def test_pressure_ends_above_where_it_began(bench: Bench) -> None:
    """Else each that leaves would be followed by the next start, and that by the next to leave."""
    bench.machine.used_by_others_mib = 650
    await bench.look()
    bench.machine.used_by_others_mib = 720  # 80 MiB available: more than is kept, less than enough
    await bench.look()
    assert bench.state("b") == State.ABSENT
    await bench.look()  # it is over
    bench.machine.used_by_others_mib = 820  # 80 again
    await bench.look()
    assert bench.state("c") == State.READY


async def test_a_start_without_room_has_the_coldest_leave(bench: Bench) -> None:
    bench.machine.used_by_others_mib = 600  # 100 are left, 64 of them kept
    assert await bench.wake("d") == 200
    assert [bench.state(name) for name in "abcd"] == [State.ABSENT, *[State.READY] * 3]
    (reason,) = bench.reasons("a", State.STOPPING)
    assert reason.startswith("its node needs its memory for default/d: it was idle for")


async def test_many_starts_at_once_find_room_one_after_the_other(bench: Bench) -> None:
    bench.machine.used_by_others_mib = 500  # 200 are left: two starts and what is kept are more
    starts = (fetch(bench.node.port, f"{name}.test") for name in "defg")
    answers = await bench.let_pass(gathered(starts))
    assert [status for status, _ in answers] == [200] * 4
    assert bench.machine.memory().available_bytes >= KEPT_MIB * MIB
    assert sum(bench.state(name) is State.READY for name in "abcdefg") == 4


async def test_those_of_a_herd_do_not_wait_for_each_others_room() -> None:
    """What is to leave for all of them leaves at once: one after the other would be too late."""
    async with bench_of(*map(make_app, "abcdefgh"), script=Script(stop_takes=1.0)) as bench:
        for name in "abcd":
            assert await bench.wake(name) == 200
        bench.machine.used_by_others_mib = 600 - KEPT_MIB  # and nothing is left
        starts = (fetch(bench.node.port, f"{name}.test") for name in "efgh")
        answers = asyncio.ensure_future(bench.let_pass(gathered(starts)))
        await bench.until(lambda: len(bench.machine.lowered) == 4 or bench.ends("abcd") > 0)
        assert (len(bench.machine.lowered), bench.ends("abcd")) == (4, 0)
        assert [status for status, _ in await answers] == [200] * 4
        assert bench.machine.memory().available_bytes >= KEPT_MIB * MIB


async def test_a_herd_that_finds_no_room_looks_for_it_no_more_often_than_one_start_does() -> None:
    apps = [make_app("deaf"), *(make_app(f"herd-{n}") for n in range(40))]
    async with bench_of(*apps) as bench:
        bench.node.driver.scripts[AppName("default/deaf")] = Script(listens_after=None)
        bench.machine.used_by_others_mib = 700
        deaf = asyncio.ensure_future(fetch(bench.node.port, "deaf.test"))
        await bench.until(lambda: bool(bench.pressure._claims))
        bench.machine.used_by_others_mib = CAPACITY_MIB - KEPT_MIB
        began, bench.machine.asked = bench.clock.now(), 0
        starts = (fetch(bench.node.port, f"herd-{n}.test") for n in range(40))
        answers = await bench.let_pass(gathered(starts))
        assert [status for status, _ in answers] == [503] * 40
        assert bench.machine.asked <= 11 * (bench.clock.now() - began)
        await bench.let_pass(deaf)


async def test_a_start_that_is_not_wanted_any_more_waits_for_no_room() -> None:
    async with bench_of(*map(make_app, "ab"), script=Script(stop_takes=1.0)) as bench:
        await bench.wake("a")
        bench.machine.used_by_others_mib = 800
        start = asyncio.ensure_future(fetch(bench.node.port, "b.test"))
        await bench.until(lambda: bench.state("a") is State.STOPPING)
        bench.node.home.handle(AppChanged(AppName("default/b"), None))
        bench.clock.advance(0.1)
        await bench.until(lambda: not bench.node.executor.beginning)
        assert (bench.ends("a"), bench.ends("b")) == (0, 1)
        assert bench.reasons("b", State.ABSENT) == ["the app was removed"]
        assert (await start)[0] == 404


async def gathered(work: object) -> object:
    return await asyncio.gather(*work)  # type: ignore[misc]


async def test_a_start_that_cannot_have_room_is_refused_and_nobody_leaves_for_it() -> None:
    apps = [make_app("kept", min=1), make_app("big", memory_mib=900)]
    async with bench_of(*apps) as bench:
        await bench.wake("kept")
        bench.machine.used_by_others_mib = 100
        status, body = await bench.let_pass(fetch(bench.node.port, "big.test"))
        assert status == 503
        assert b"736 MiB for it, 900 are needed" in body
        assert bench.state("kept") == State.READY


async def test_a_start_does_not_take_what_is_in_use(bench: Bench) -> None:
    for name in "abc":
        assert bench.node.router._grants.take(AppName(f"default/{name}"), bench.clock.now())
    bench.machine.used_by_others_mib = 600
    status, body = await bench.let_pass(fetch(bench.node.port, "d.test"))
    assert (status, b"is in use" in body) == (503, True)
    assert [bench.state(name) for name in "abc"] == [State.READY] * 3


async def test_what_idle_instances_would_free_is_known(bench: Bench) -> None:
    """Whatever is available: a large app may need more than that."""
    assert bench.pressure.idle_bytes() == 300 * MIB
    bench.machine.used_by_others_mib = 300
    assert bench.node.router._grants.take(AppName("default/a"), bench.clock.now())
    await bench.look()
    assert bench.pressure.idle_bytes() == 200 * MIB
    assert bench.pressure.free_bytes() == (400 - KEPT_MIB) * MIB


async def test_stalls_alone_are_enough_where_memory_is_scarce(bench: Bench) -> None:
    bench.machine.stalled = 50.0
    await bench.look()
    assert bench.machine.lowered == []
    bench.machine.used_by_others_mib = 550  # 150 are available
    await bench.look()
    assert [one.app for one in bench.machine.lowered] == ["default/a"]


async def test_one_that_takes_long_to_stop_counts_as_coming() -> None:
    apps = map(make_app, "abc")
    async with bench_of(*apps, script=Script(stop_takes=1.0)) as bench:
        for name in "abc":
            await bench.wake(name)
        bench.machine.used_by_others_mib = 650
        await bench.look(wait=False)
        await bench.look(wait=False)
        assert [one.app for one in bench.machine.lowered] == ["default/a"]


async def test_what_is_put_away_otherwise_is_put_away_for_that_too() -> None:
    apps = [make_app("keeps", checkpoint_after_s=1800.0), make_app("other")]
    async with bench_of(*apps, script=Script(saves=True)) as bench:
        for name in ("keeps", "other"):
            await bench.wake(name)
        (before,) = (one for one in bench.node.executor.running if "keeps" in bench.app_of(one))
        bench.machine.used_by_others_mib = 750
        await bench.look()
        assert (bench.state("keeps"), bench.state("other")) == (State.ABSENT, State.READY)
        reason = bench.reasons("keeps", State.STOPPING)[0]
        assert reason.startswith("put away, as its node is short of memory (50 MiB available")
        bench.machine.used_by_others_mib = 0
        assert await bench.wake("keeps") == 200
        assert before in bench.node.executor.running


async def test_for_what_others_that_start_may_come_to_hold_nobody_leaves() -> None:
    """It is waited for, until it is seen what they do hold."""
    async with bench_of(*map(make_app, "abcd"), script=Script(start_takes=0.05)) as bench:
        await bench.wake("a")
        bench.machine.holds_mib = 10
        bench.machine.used_by_others_mib = 776  # 150 are left beside what is kept
        starts = (fetch(bench.node.port, f"{name}.test") for name in "bcd")
        answers = await bench.let_pass(gathered(starts))
        assert [status for status, _ in answers] == [200] * 3
        assert bench.machine.lowered == []


async def test_what_its_like_hold_is_what_a_start_claims() -> None:
    apps = (make_app(name, memory_mib=80) for name in "abcdef")
    async with bench_of(*apps, script=Script(start_takes=0.05)) as bench:
        for name in "abc":
            await bench.wake(name)
        bench.machine.holds_mib = 10
        bench.machine.used_by_others_mib = 790  # 180 are available
        await bench.look()
        claims: list[int] = []
        bench.machine.on_memory = lambda: claims.append(len(bench.pressure._claims))
        starts = (fetch(bench.node.port, f"{name}.test") for name in "def")
        answers = await bench.let_pass(gathered(starts))
        assert [status for status, _ in answers] == [200] * 3
        assert bench.machine.lowered == []
        assert max(claims) >= 2
