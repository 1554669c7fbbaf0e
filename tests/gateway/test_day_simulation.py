"""A whole day of 10,000 apps in virtual time, under the real decisions: memory follows sessions,
not apps; when it is short the coldest go down the ladder first; and no session is lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.benches import load_bench

from tabane.gateway.activation import LowerAsked
from tabane.lifecycle import STANDING
from tabane.model import App, AppName, InstanceId, NodeName, Reactive, State
from tabane.scheduler.pressure import Gauge, Standing, plan, plan_room
from tabane.testing.wakes import Session, VirtualDatacenter
from tabane.testing.world import Running, World

day = load_bench("day")

STOP_AFTER_S = 3600.0
TAKES_S = 5.0
SAMPLE_S = 60.0
SLACK_S = 2.0
"""From the end of an idle time to the instance's end: questions, answers and the stop."""
HELD = 10
"""Of memory, by each instance."""
ROOM_INSTANCES = 30
KEPT = 4 * HELD
CAPACITY = ROOM_INSTANCES * HELD + KEPT
WHY = "its node is short of memory"


class Day:
    """The recorded day on a node with little memory, until the last of it is gone."""

    def __init__(self) -> None:
        self.world = World(1)
        self.dc = VirtualDatacenter(self.world)
        self.dc.add(nodes=1, gateways=3)
        (self.node,) = self.dc.nodes.values()
        self.sessions: list[Session] = []
        self.samples: list[tuple[float, int, int, int]] = []
        """When, instances, apps with a session then, and apps with one in the last hour."""
        self.last: dict[AppName, float] = {}
        """When each app's latest session ends."""
        self.gauge = Gauge()
        self.lowered: dict[InstanceId, float] = {}
        self.peak = 0
        reactive = Reactive(stop_after_s=STOP_AFTER_S, freeze_after_s=60.0, start_timeout_s=30.0)
        for number in range(day.APPS):
            self.dc.store(App(f"a{number}", "host", port=80, revision=1, reactive=reactive))
        self.dc.place = self.place

    def play(self) -> None:
        gateways = list(self.dc.gateways.values())
        began, sampled = self.world.now, self.world.now
        for number, recorded in enumerate(day.load_day().sessions):
            while sampled + SAMPLE_S <= began + recorded.at:
                sampled += SAMPLE_S
                self.run_until(sampled)
                self.sample()
            self.run_until(began + recorded.at)
            session = Session(AppName(f"default/a{recorded.app}"), TAKES_S, 60.0)
            self.sessions.append(session)
            self.last[session.app] = self.world.now + TAKES_S
            gateways[number % len(gateways)].arrive(session)
        self.world.run(STOP_AFTER_S + 60.0)

    def run_until(self, moment: float) -> None:
        self.world.run(max(0.0, moment - self.world.now))

    def sample(self) -> None:
        now = self.world.now
        busy = sum(now < ended for ended in self.last.values())
        recent = sum(now < ended + STOP_AFTER_S + SLACK_S for ended in self.last.values())
        self.samples.append((now, len(self.running()), busy, recent))

    def running(self) -> list[Running]:
        return [one for one in self.node.running.values() if one.state is not State.ABSENT]

    # What a node with little memory does

    def place(self, app: App) -> NodeName:
        """The node finds room for the start that comes to it, as `tabane.node.pressure` does."""
        self.world.after(0.0, self.make_room)
        return self.node.name

    def make_room(self) -> None:
        running = self.running()
        self.peak = max(self.peak, len(running))
        available = CAPACITY - HELD * len(running)
        coming = HELD * sum(one.instance in self.lowered for one in running)
        need = self.gauge.need(available + coming, KEPT, 0.0, self.world.now)
        missing = HELD + KEPT - available - coming
        if need <= 0 and missing <= 0:
            return
        standing = list(self.standing())
        idle = [one.idle_s for one in standing if one.idle_s is not None]
        steps = plan(standing, need) or plan_room(standing, missing)
        assert [step.idle_s for step in steps] == sorted(idle, reverse=True)[: len(steps)]
        for step in steps:
            self.lowered[step.instance] = self.world.now
            asked = LowerAsked(step.app, step.instance, step.rung, WHY, step.last)
            self.dc.home.about(step.app, asked)

    def standing(self) -> Iterator[Standing]:
        leases = [lease for at in self.dc.gateways.values() for lease in at.grants.leases()]
        used = {lease.instance for lease in leases if lease.used}
        for one in self.running():
            if one.state in STANDING and one.instance not in self.lowered:
                idle_s = None if one.instance in used else self.world.now - one.last_used
                yield Standing(one.instance, one.app.key, idle_s, HELD)


@pytest.fixture(scope="module")
def done() -> Day:
    played = Day()
    played.play()
    return played


def test_every_session_is_served(done: Day) -> None:
    assert {session.outcome for session in done.sessions} == {"served"}
    assert done.dc.problems == []


def test_memory_follows_sessions_not_apps(done: Day) -> None:
    for at, instances, busy, recent in done.samples:
        assert busy <= instances <= recent, at
    assert max(recent for _, _, _, recent in done.samples) < day.APPS * 0.02
    assert done.running() == []


def test_when_memory_is_short_the_coldest_make_room(done: Day) -> None:
    """Which those are is checked each time."""
    stopped = [stop for stop in done.dc.home.stopped if stop.reason == WHY]
    assert len(stopped) > 100
    assert max(recent for _, _, _, recent in done.samples) > 2 * ROOM_INSTANCES
    assert done.peak <= ROOM_INSTANCES + KEPT // HELD
