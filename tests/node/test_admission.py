"""Turns of starts, as the executor asks for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tabane.model import App, InstanceId, Reactive, Resources
from tabane.node import admission
from tabane.node.admission import AGAIN_S, HOLD_S, LOOK_S, Admission, NoTurn
from tabane.scheduler.quotas import Quota, Quotas, Usage
from tabane.supervise import Supervisor
from tabane.testing import VirtualClock

ALICE, BOB = 1000, 1001
BURST = App("burst", "host", port=80, owner=ALICE)
OTHER = App("other", "host", port=80, owner=ALICE)


class Starts:
    """Those that ask for turns, and hold them until they are told to end."""

    def __init__(self, tasks: Supervisor, quotas: Quotas | None = None) -> None:
        self.used: dict[int, Usage] = {}
        self.are_busy = False
        self.clock = VirtualClock()
        self.admission = Admission(
            self.clock,
            lambda but: self.used,
            lambda: quotas or Quotas(),
            processors=2,
            is_busy=lambda: self.are_busy,
        )
        self.order: list[str] = []
        self.refused: dict[str, NoTurn] = {}
        self.ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._tasks = tasks

    async def ask(self, *names: str, app: App = BURST, again: bool = False) -> None:
        for name in names:
            self.ends[name] = asyncio.Event()
            work = self._ask(name, app, again)
            self.tasks[name] = self._tasks.start(name, work)
        await settle()

    async def _ask(self, name: str, app: App, again: bool) -> None:
        try:
            if not again:
                self.admission.admit(app, InstanceId(name))
            async with self.admission.turn(app, InstanceId(name), again=again):
                self.order.append(name)
                await self.ends[name].wait()
        except NoTurn as no:
            self.refused[name] = no

    async def end(self, *names: str) -> None:
        for name in names:
            self.ends[name].set()
        await settle()


async def settle() -> None:
    """Let what can go on go on."""
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
async def starts() -> AsyncIterator[Starts]:
    async with Supervisor("test") as tasks:
        yield Starts(tasks)


def names(count: int, first: int = 0) -> list[str]:
    return [f"b{number}" for number in range(first, count)]


async def test_so_many_at_once_and_the_others_in_a_fair_order(starts: Starts) -> None:
    await starts.ask(*names(5))
    await starts.ask("other", app=OTHER)
    assert starts.order == ["b0", "b1"]
    await starts.end("b1")
    assert starts.order[2:] == ["other"]
    await starts.end("b0", "other", "b2")
    assert starts.order[3:] == ["b2", "b3", "b4"]


async def test_who_waits_is_told_how_many_are_before_it(starts: Starts) -> None:
    await starts.ask(*names(12))
    said = starts.admission.describe(InstanceId("b11"))
    assert said == "it waits for its turn, 9 other starts of its node are before it"
    assert starts.admission.describe(InstanceId("b0")) == ""


async def test_one_that_is_not_wanted_any_more_leaves_at_once(starts: Starts) -> None:
    await starts.ask(*names(4))
    for name in ("b0", "b2"):
        starts.admission.withdraw(InstanceId(name), "the app was removed")
    await settle()
    assert {name: no.reason for name, no in starts.refused.items()} == {"b2": "the app was removed"}
    assert not starts.refused["b2"].failed
    await starts.end("b0")
    assert starts.order == ["b0", "b1", "b3"]


@pytest.mark.parametrize("has_turn", [True, False])
async def test_one_that_is_cancelled_makes_room(starts: Starts, has_turn: bool) -> None:
    await starts.ask(*names(4))
    starts.tasks["b0" if has_turn else "b2"].cancel()
    await settle()
    assert starts.order == (["b0", "b1", "b2"] if has_turn else ["b0", "b1"])
    await starts.end("b1")
    assert starts.order[-1] == "b3"


async def test_one_that_is_cancelled_in_the_moment_of_its_turn_gives_it_on(starts: Starts) -> None:
    await starts.ask(*names(4))
    starts.ends["b0"].set()
    starts.tasks["b2"].cancel()
    await settle()
    assert starts.order == ["b0", "b1", "b3"]


async def test_when_a_start_fails_those_like_it_are_not_tried(starts: Starts) -> None:
    newer = BURST.__class__("burst", "host", port=80, owner=ALICE, revision=2)
    await starts.ask(*names(6))
    await starts.ask("other", app=OTHER)
    await starts.ask("newer", app=newer)
    await starts.ask("again", again=True)
    held = starts.admission.hold(BURST)
    await starts.end("b0")
    assert starts.order == ["b0", "b1", "other"]
    assert not starts.refused, "the one that failed is told first"
    starts.admission.tell_untried(held, "it exited with code 1", retry=False)
    await starts.end("b1", "other")
    assert starts.order[3:] == ["newer", "again"]
    assert [*starts.refused] == names(6, first=2)
    no = starts.refused["b5"]
    assert (no.failed, no.retry, no.again_s) == (True, False, None)
    assert "another start of its app failed: it exited with code 1" in no.reason


async def test_one_that_could_not_be_in_time_is_refused_at_once(starts: Starts) -> None:
    patient = BURST.__class__("patient", "host", reactive=Reactive(start_timeout_s=99.0))
    for _ in range(4):
        starts.admission.capacity.note("crun", 0.5, beside=1, waiting=0)
    await starts.ask(*names(45))
    assert len(starts.order) == 2
    assert [*starts.refused] == names(45, first=42)
    no = starts.refused["b44"]
    assert no.reason == "40 other starts are before it there, which takes about 10 s"
    assert (no.failed, no.again_s) == (False, AGAIN_S)
    await starts.ask("patient", app=patient)
    await starts.ask("other", app=OTHER)
    assert "patient" not in starts.refused
    assert "other" not in starts.refused, "it is its turn soon, whatever waits of others"


async def boot(starts: Starts, *instances: str) -> None:
    """Their engines are done, their programs not."""
    for instance in instances:
        starts.admission.begin_boot(InstanceId(instance), BURST)
    await starts.end(*instances)


async def test_while_the_processors_are_busy_an_app_waits_for_its_own_programs(
    starts: Starts,
) -> None:
    starts.are_busy = True
    await starts.ask(*names(8))
    await boot(starts, "b0", "b1")
    assert starts.order == names(3), "two programs and a turn are more than two processors"
    await starts.ask("other", app=OTHER)
    assert starts.order[3:] == ["other"], "who has none on its way is not held back"
    await starts.end("other")
    await boot(starts, "b2")
    assert starts.order[4:] == []
    starts.admission.end_boot(InstanceId("b0"))
    await settle()
    assert starts.order[4:] == ["b3"]


async def test_it_is_looked_again_whether_they_are_busy(starts: Starts) -> None:
    starts.are_busy = True
    await starts.ask(*names(6))
    await boot(starts, "b0", "b1")
    starts.clock.advance(LOOK_S)
    await settle()
    assert starts.order == names(3)
    starts.are_busy = False
    starts.clock.advance(LOOK_S)
    await settle()
    assert starts.order == names(4)


async def test_an_app_is_not_held_back_for_ever(starts: Starts) -> None:
    """What else keeps the processors busy may go on and on."""
    starts.are_busy = True
    await starts.ask(*names(8))
    await boot(starts, "b0", "b1")
    await boot(starts, "b2")
    for count in (4, 5):
        starts.clock.advance(HOLD_S - LOOK_S)
        await settle()
        assert starts.order == names(count - 1)
        starts.clock.advance(2 * LOOK_S)
        await settle()
        assert starts.order == names(count), "one each time"


async def test_programs_that_only_wait_hold_nobody_back(starts: Starts) -> None:
    await starts.ask(*names(8))
    for first in range(0, 8, 2):
        await boot(starts, f"b{first}", f"b{first + 1}")
    assert starts.order == names(8)


async def test_there_is_an_end_to_what_waits(
    starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "MOST_WAITING", 3)
    await starts.ask(*names(8))
    assert [*starts.refused] == ["b5", "b6", "b7"]
    await starts.ask("again", again=True)
    assert "again" not in starts.refused


@pytest.mark.parametrize(
    ("quota", "reason"),
    [
        (Quota(instances=5), "user 1000 has 5 instances on it, and may have 5"),
        (Quota(memory_bytes=300 << 20), "user 1000 has 50.0 MiB of memory left on it, "),
        (Quota(starts=2), "user 1000 has 2 starts waiting on it, and may have 2"),
        (Quota(instances=6, memory_bytes=1 << 40, starts=3), ""),
    ],
)
async def test_a_user_who_has_enough_is_refused(quota: Quota, reason: str) -> None:
    app = BURST.__class__("burst", "host", owner=ALICE, resources=Resources(memory_bytes=64 << 20))
    async with Supervisor("test") as tasks:
        starts = Starts(tasks, Quotas(users={ALICE: quota}))
        await starts.ask(*names(4), app=BURST.__class__("filler", "host", owner=BOB))
        starts.admission.withdraw(InstanceId("b2"), "")
        starts.admission.withdraw(InstanceId("b3"), "")
        starts.used = {ALICE: Usage(0, 0), BOB: Usage(99, 1 << 50)}
        await starts.ask("a0", "a1", app=app)
        starts.used[ALICE] = Usage(5, 250 << 20)
        await starts.ask("a2", app=app)
        assert ("a2" in starts.refused) == bool(reason)
        if reason:
            assert starts.refused["a2"].reason.startswith(reason)
            assert starts.refused["a2"].again_s == AGAIN_S
        await starts.ask("root", app=BURST.__class__("roots", "host"))
        assert "root" not in starts.refused
        limited = starts.admission.accounts()
        assert limited == {ALICE: limited[ALICE]}
        assert (limited[ALICE].quota, limited[ALICE].usage) == (quota, Usage(5, 250 << 20))
