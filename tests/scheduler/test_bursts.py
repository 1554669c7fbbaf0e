"""What a burst means for the others on its node: queue and capacity together, on a pretended
machine whose processors are shared by the starts under way, in virtual time."""

from __future__ import annotations

import heapq
import itertools
from random import Random

import pytest

from tabane.model import AppName, InstanceId
from tabane.scheduler.capacity import Boots, Capacity
from tabane.scheduler.fair_queue import FairQueue, Start

PROCESSORS = 2
OWN_S = 0.025
"""Of processor time for each start."""
STEP_S = 0.001
HOLD_S = 1.0


class Machine:
    """`fair` False: whoever comes first is first, as many at once as there are. A program takes a
    processor for `boot_s` after its engine has; if it `sleeps`, it only waits so long."""

    def __init__(self, *, fair: bool = True, boot_s: float = 0.0, sleeps: bool = False) -> None:
        self.now = 0.0
        self.queue, self.capacity = FairQueue(), Capacity(PROCESSORS)
        self.boots, self.boot_s, self.sleeps = Boots(PROCESSORS), boot_s, sleeps
        self.booting: dict[InstanceId, float] = {}
        self.launched: dict[InstanceId, float] = {}
        self.apps: dict[InstanceId, AppName] = {}
        self.are_busy = False
        self.fair = fair
        self.left: dict[InstanceId, float] = {}
        """Work of those under way."""
        self.began: dict[InstanceId, tuple[float, int]] = {}
        self.came: dict[InstanceId, float] = {}
        self.done: dict[InstanceId, float] = {}
        self.most = 0
        self.numbers = itertools.count()
        self.plans: list[tuple[float, int, str, int]] = []

    def plan(self, at: float, app: str, user: int = 0) -> InstanceId:
        number = next(self.numbers)
        heapq.heappush(self.plans, (at, number, app, user))
        return InstanceId(f"i{number}")

    def run(self) -> None:
        while self.plans or len(self.queue) or self.left or self.booting:
            while self.plans and self.plans[0][0] <= self.now:
                _, number, app, user = heapq.heappop(self.plans)
                key = AppName("all" if not self.fair else app)
                start = Start(InstanceId(f"i{number}"), key, user if self.fair else 0)
                self.came[start.instance] = self.now
                self.apps[start.instance] = start.app
                self.queue.add(start)
            self.give()
            self.work()

    def give(self) -> None:
        limit = self.capacity.limit if self.fair else 1_000
        while self.queue.turns < limit:
            busy, turns = self.are_busy and self.fair, self.queue.turns
            held = self.boots.held(self.now, turns=turns, is_busy=busy)
            if (start := self.queue.take(held)) is None:
                return
            self.left[start.instance] = OWN_S
            self.boots.note_turn(start.app, self.now + HOLD_S)
            beside = self.queue.turns - 1
            self.began |= {each: (at, max(n, beside)) for each, (at, n) in self.began.items()}
            self.began[start.instance] = self.now, beside
            self.most = max(self.most, self.queue.turns)

    def work(self) -> None:
        self.now += STEP_S
        working = len(self.left) + (0 if self.sleeps else len(self.booting))
        self.are_busy = working >= PROCESSORS
        share = min(1.0, PROCESSORS / max(1, working)) * STEP_S
        self.boot(STEP_S if self.sleeps else share)
        for instance in list(self.left):
            self.left[instance] -= share
            if self.left[instance] <= 1e-9:
                del self.left[instance]
                self.queue.end(instance)
                self.launched[instance] = self.now
                self.booting[instance] = self.boot_s
                self.boots.begin(instance, self.apps[instance], self.now + HOLD_S)
                began, beside = self.began.pop(instance)
                took_s, waiting = self.now - began, len(self.queue)
                self.capacity.note("crun", took_s, beside=beside, waiting=waiting)

    def boot(self, share: float) -> None:
        for instance in list(self.booting):
            self.booting[instance] -= share
            if self.booting[instance] <= 1e-9:
                del self.booting[instance]
                self.boots.end(instance)
                self.done[instance] = self.now

    def boot_took_s(self, instance: InstanceId) -> float:
        return self.done[instance] - self.launched[instance]

    def waited_s(self, instance: InstanceId) -> float:
        return self.done[instance] - self.came[instance]


def test_a_wake_in_the_middle_of_a_burst_takes_but_a_few_starts_times() -> None:
    machine, plain = Machine(), Machine(fair=False)
    for each in (machine, plain):
        for _ in range(100):
            each.plan(0.0, "burst")
        other = each.plan(0.3, "other")
        each.run()
    assert machine.waited_s(other) < 6 * OWN_S
    assert plain.waited_s(other) > 4 * machine.waited_s(other)
    assert machine.most <= PROCESSORS + 4


def test_it_keeps_the_machine_busy() -> None:
    """The whole burst is done as soon as without any limit."""
    machine = Machine()
    for _ in range(100):
        machine.plan(0.0, "burst")
    machine.run()
    assert machine.now == pytest.approx(100 * OWN_S / PROCESSORS, rel=0.1)


def test_a_user_with_many_apps_is_one_user() -> None:
    machine = Machine()
    for app in range(50):
        for _ in range(4):
            machine.plan(0.0, f"app{app}", user=1000)
    others = [machine.plan(0.2 + number / 10, "theirs", user=1001) for number in range(10)]
    machine.run()
    assert max(map(machine.waited_s, others)) < 6 * OWN_S


@pytest.mark.parametrize("seed", range(5))
def test_whatever_comes_all_are_done_and_single_wakes_soon(seed: int) -> None:
    dice, machine = Random(seed), Machine()
    for app in range(4):
        at = dice.uniform(0, 1)
        for _ in range(dice.randint(20, 80)):
            machine.plan(at, f"burst{app}", user=app % 2)
    singles = [machine.plan(dice.uniform(0, 2), f"single{n}", user=2 + n) for n in range(10)]
    machine.run()
    assert len(machine.done) == next(machine.numbers)
    assert max(map(machine.waited_s, singles)) < 15 * OWN_S


START_TIMEOUT_S = 10.0


@pytest.mark.parametrize("fair", [True, False])
def test_programs_that_take_a_second_of_a_processor_are_ready_in_time(fair: bool) -> None:
    """Sixty at once would all take thirty."""
    machine = Machine(fair=fair, boot_s=1.0)
    burst = [machine.plan(0.0, "burst") for _ in range(60)]
    machine.run()
    late = [each for each in burst if machine.boot_took_s(each) > START_TIMEOUT_S]
    assert bool(late) is not fair


def test_a_wake_beside_such_programs_does_not_wait_for_them() -> None:
    machine = Machine(boot_s=1.0)
    for _ in range(60):
        machine.plan(0.0, "burst")
    other = machine.plan(5.0, "other")
    machine.run()
    assert machine.launched[other] - machine.came[other] < 10 * OWN_S
    assert machine.waited_s(other) < 6.0


def test_programs_that_only_wait_are_started_all_the_same() -> None:
    machine = Machine(boot_s=3.0, sleeps=True)
    for _ in range(100):
        machine.plan(0.0, "burst")
    machine.run()
    assert machine.now == pytest.approx(3.0 + 100 * OWN_S / PROCESSORS, rel=0.3)
