"""A data center in virtual time, where everything fails that can (see `tabane.testing.wakes`)."""

import pytest
from msgspec.structs import replace

from tabane.gateway.activation import LowerAsked, StopAsked
from tabane.model import App, AppName, Reactive, State
from tabane.scheduler.pressure import Rung
from tabane.testing.wakes import Session, VirtualDatacenter, VirtualGateway
from tabane.testing.world import World

NAMES = ("a", "b")
SEEDS = range(15)
STEPS = 60
ROUND_TRIPS_S = 1.0
"""Enough for the questions and answers before an idle stop, at the slowest links here."""
EVENTS = {
    "calm": ("scale", "deploy", "stop", "use"),
    "short of memory": ("scale", "lower", "lower", "lower", "lower", "use"),
    "apps": ("scale", "deploy", "deploy", "remove", "crash", "flaky", "mortal", "stop"),
    "gateways": ("disconnect", "die", "crash", "scale"),
    "nodes": ("home", "node", "use"),
    "all": (
        *("scale", "deploy", "remove", "crash", "flaky", "mortal", "stop", "use", "lower"),
        *("disconnect", "die", "home", "node"),
    ),
}
STANDING = (State.READY, State.FROZEN, State.CHECKPOINTING)
SESSIONS_BETWEEN = 8
"""One event in so many steps is none of sessions, about."""


class Chaos:
    """Two apps, one or two nodes, one to three gateways, and what the dice say."""

    def __init__(self, seed: int, events: tuple[str, ...]) -> None:
        self.world = World(seed)
        self.dice = self.world.random
        self.events = events
        self.dc = VirtualDatacenter(self.world, late_s=self.dice.choice([0.001, 0.02, 0.2]))
        self.dc.add(nodes=self.dice.randint(1, 2), gateways=self.dice.randint(1, 3))
        self.flaky = 0.0
        self.dc.start_takes = lambda app: self.dice.uniform(0.01, 1.0)
        self.dc.fails = lambda app: self.dice.random() < self.flaky
        self.dies_after: float | None = None
        self.dc.dies_after = lambda app: self.dies_after
        self.revisions = dict.fromkeys(NAMES, 0)
        self.sessions: list[Session] = []
        for name in NAMES:
            self.deploy(name)

    def step(self) -> None:
        kind = self.dice.choice([*self.events, *["sessions"] * SESSIONS_BETWEEN])
        getattr(self, f"do_{kind}")()
        self.world.run(self.dice.choice([0.0, 0.001, 0.05, 0.3, 2.0]))

    def sessions_at(self, gateway: VirtualGateway, key: AppName, count: int, **how: float) -> None:
        for _ in range(count):
            session = Session(key, **how)
            self.sessions.append(session)
            gateway.arrive(session)

    def some_app(self) -> AppName:
        return AppName(f"default/{self.dice.choice(NAMES)}")

    # Events

    def do_sessions(self) -> None:
        gateway = self.dice.choice(list(self.dc.gateways.values()))
        self.sessions_at(
            gateway,
            self.some_app(),
            self.dice.choice([1, 1, 3, 15]),
            takes_s=self.dice.choice([0.01, 0.2, 2.0, 8.0]),
            patience_s=self.dice.choice([0.1, 11.0]),
        )

    def do_deploy(self) -> None:
        self.deploy(self.dice.choice(NAMES))

    def deploy(self, name: str) -> None:
        self.revisions[name] += 1
        reactive = Reactive(
            concurrency=self.dice.choice([1, 2, 10]),
            max=self.dice.choice([1, 2, 5]),
            stop_after_s=self.dice.choice([0.0, 0.3, 1.0, 5.0]),
            max_age_s=self.dice.choice([None, None, 3.0]),
            freeze_after_s=self.dice.choice([None, 0.0, 0.1, 0.9]),
            checkpoint=self.dice.choice([False, True]),
            checkpoint_after_s=self.dice.choice([None, None, 0.05, 0.2]),
        )
        revision = self.revisions[name]
        app = App(
            name=name, image="host", port=8000 + revision, revision=revision, reactive=reactive
        )
        self.dc.store(app, self.dice.choice([0, 0, 1]))

    def do_scale(self) -> None:
        if self.dc.apps:
            app = self.dice.choice(list(self.dc.apps.values()))
            reactive = replace(app.reactive, max=self.dice.choice([1, 3, 6]))
            self.dc.store(replace(app, reactive=reactive), self.dice.choice([0, 1]))

    def do_remove(self) -> None:
        self.dc.remove(self.some_app())

    def do_disconnect(self) -> None:
        if up := [gateway for gateway in self.dc.gateways.values() if gateway.up]:
            self.dice.choice(up).break_session(self.dice.uniform(0.01, 4.0))

    def do_die(self) -> None:
        if up := [gateway for gateway in self.dc.gateways.values() if gateway.up]:
            self.dice.choice(up).die(self.dice.uniform(0.01, 9.0))

    def do_home(self) -> None:
        if self.dc.home.up:
            self.dc.home.restart(self.dice.uniform(0.01, 2.0))

    def do_node(self) -> None:
        if up := [node for node in self.dc.nodes.values() if node.up]:
            self.dice.choice(up).restart_agent(self.dice.uniform(0.01, 2.0))

    def do_crash(self) -> None:
        if ready := [one for one in self.dc.instances() if one.state in STANDING]:
            instance = self.dice.choice(ready)
            self.dc.nodes[instance.node].end(instance, "killed by SIGSEGV", failed=True)

    def do_use(self) -> None:
        if running := [one for one in self.dc.instances() if one.state in STANDING]:
            used = self.dice.choice(running)
            self.dc.nodes[used.node].use(used, self.dice.choice([0.0, 0.5]))

    def do_lower(self) -> None:
        """The home finds out which are idle."""
        for one in [one for one in self.dc.instances() if one.state in STANDING]:
            rung, last = self.dice.choice(list(Rung)), self.dice.random() < 0.3
            asked = LowerAsked(one.app.key, one.instance, rung, "short of memory", last)
            self.dc.home.about(one.app.key, asked)

    def do_flaky(self) -> None:
        self.flaky = self.dice.choice([0.0, 0.3, 1.0])

    def do_mortal(self) -> None:
        self.dies_after = self.dice.choice([None, 0.02, 1.5])

    def do_stop(self) -> None:
        if instances := self.dc.instances():
            instance = self.dice.choice(instances)
            key = instance.app.key
            self.dc.home.about(key, StopAsked(key, instance.instance))

    # The end

    def calm_down(self) -> None:
        """All faults are over; both apps are there and grow as old as they like."""
        self.flaky, self.dies_after = 0.0, None
        self.world.run(60.0)
        for name in NAMES:
            if AppName(f"default/{name}") not in self.dc.apps:
                self.deploy(name)
        for key, app in self.dc.apps.items():
            reactive = replace(app.reactive, max_age_s=None)
            self.dc.store(replace(app, reactive=reactive), self.dc.floors[key])

    def last_sessions(self) -> list[Session]:
        """Some at every gateway, each of which must be served now; returns them."""
        count = len(self.sessions)
        for gateway in self.dc.gateways.values():
            for key in self.dc.apps:
                self.sessions_at(gateway, key, 7, takes_s=0.2, patience_s=100.0)
        self.world.run(30.0)
        return self.sessions[count:]


def run(kind: str, seed: int) -> Chaos:
    chaos = Chaos(seed, EVENTS[kind])
    for _ in range(STEPS):
        chaos.step()
        assert chaos.dc.problems == []
    chaos.calm_down()
    return chaos


@pytest.mark.parametrize("kind", EVENTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_nothing_forbidden_is_seen_and_all_ends_well(kind: str, seed: int) -> None:
    chaos = run(kind, seed)
    last = chaos.last_sessions()
    idle_s = max(app.reactive.stop_after_s for app in chaos.dc.apps.values())
    chaos.world.run(idle_s + ROUND_TRIPS_S)
    assert chaos.dc.problems == []
    assert {session.outcome for session in last} == {"served"}
    assert not {"waiting", "running"} & {session.outcome for session in chaos.sessions}
    check_what_is_left(chaos.dc)


def test_in_all_that_happens_instances_are_saved() -> None:
    assert sum(len(run("calm", seed).dc.home.saved) for seed in range(5)) > 10


def test_when_memory_is_short_instances_go_and_sessions_are_served_all_the_same() -> None:
    done = [run("short of memory", seed) for seed in range(5)]
    stopped = [stop for each in done for stop in each.dc.home.stopped]
    assert sum(stop.reason == "short of memory" for stop in stopped) > 5
    outcomes = [session.outcome for each in done for session in each.sessions]
    assert outcomes.count("served") > 100
    assert "instance crashed" not in outcomes


def check_what_is_left(dc: VirtualDatacenter) -> None:
    """Each app's floor runs, in its current revision, and nothing else; no slot is in use."""
    for key, app in dc.apps.items():
        left = [
            (running.state, running.app.revision)
            for running in dc.instances()
            if running.app.key == key
        ]
        rests = app.reactive.freeze_after_s is not None
        state = State.FROZEN if rests else State.READY
        assert left == [(state, app.revision)] * dc.floors[key]
    there = {running.instance for running in dc.instances()}
    for gateway in dc.gateways.values():
        assert all(lease.used == 0 for lease in gateway.grants.leases())
        assert {lease.instance for lease in gateway.grants.leases()} <= there
    for key in dc.home.activation.apps():
        ledger = dc.home.activation.ledger(key)
        assert ledger is not None
        assert ledger.instances.keys() <= there
        assert ledger.total_waiting() == 0


def cold(late_s: float = 0.002, gateways: int = 3, **reactive: object) -> VirtualDatacenter:
    """One app that nobody asked for yet."""
    dc = VirtualDatacenter(World(1), late_s=late_s)
    dc.add(nodes=2, gateways=gateways)
    dc.store(App(name="a", image="host", port=80, revision=1, reactive=Reactive(**reactive)))
    return dc


def send(dc: VirtualDatacenter, number: int, count: int, takes_s: float) -> list[Session]:
    """Sessions come to the gateway of that number, all at once."""
    gateway = list(dc.gateways.values())[number]
    sessions = [Session(AppName("default/a"), takes_s, 10.0) for _ in range(count)]
    for session in sessions:
        gateway.arrive(session)
    return sessions


@pytest.mark.parametrize("gateways", [1, 3])
def test_two_hundred_sessions_at_once_start_twenty_instances_and_all_are_served(
    gateways: int,
) -> None:
    dc = cold(gateways=gateways, concurrency=10, max=20)
    sessions = [send(dc, number % gateways, 1, takes_s=1.0)[0] for number in range(200)]
    dc.world.run(1.0)
    assert len(dc.home.started) == 20
    assert {session.outcome for session in sessions} == {"running"}
    dc.world.run(1.0)
    assert {session.outcome for session in sessions} == {"served"}
    dc.world.run(60.0)
    assert (dc.instances(), dc.problems) == ([], [])
    assert len(dc.home.started) == 20


def test_what_was_started_for_one_gateway_serves_the_others_too() -> None:
    dc = cold(concurrency=1, max=20, stop_after_s=30.0)
    for number in range(30):
        (session,) = send(dc, number % 3, 1, takes_s=0.1)
        dc.world.run(1.0)
        assert session.outcome == "served"
    assert len(dc.home.started) == 1


def test_at_max_a_busy_gateway_does_not_starve_the_others() -> None:
    dc = cold(concurrency=4, max=1)
    dc.queue = 10_000
    greedy = send(dc, 0, 400, takes_s=0.1)
    dc.world.run(3.0)
    others = send(dc, 1, 5, takes_s=0.1) + send(dc, 2, 5, takes_s=0.1)
    for _ in range(60):
        greedy += send(dc, 0, 5, takes_s=0.1)
        dc.world.run(0.1)
    outcomes = [session.outcome for session in others]
    assert "timed out" not in outcomes
    assert dc.problems == []
    assert [session.outcome for session in greedy].count("served") > 250


def test_alternating_idle_stops_and_sessions_lose_none() -> None:
    dc = cold(concurrency=1, max=2, stop_after_s=1.0, late_s=0.01)
    for number in range(1000):
        (session,) = send(dc, number % 3, 1, takes_s=0.01)
        dc.world.run(1.0 + dc.world.random.uniform(-0.15, 0.2))
        assert session.outcome == "served", number
    assert len(dc.home.stopped) > 200
    assert dc.problems == []


@pytest.mark.parametrize("takes_s", [0.05, 70.0])
def test_it_is_stopped_soon_after_it_was_idle_for_stop_after(takes_s: float) -> None:
    dc = cold(concurrency=5, stop_after_s=30.0, late_s=0.01)
    send(dc, 0, 1, takes_s=takes_s)
    dc.world.run(0.5)
    (session,) = send(dc, 1, 1, takes_s=takes_s)
    dc.world.run(takes_s + 0.1)
    assert session.outcome == "served"
    dc.world.run(29.7)
    assert dc.home.stopped == []
    dc.world.run(0.6)
    assert len(dc.home.stopped) == 1


def test_one_that_is_killed_again_and_again_refuses_nobody() -> None:
    """Four times a second after it was ready: pauses of 0, 1, 2 and 4 s are waited for."""
    dc = cold(concurrency=10, max=1)
    sessions, kills = [], 0
    for _ in range(120):
        sessions += send(dc, 0, 1, takes_s=0.01)
        dc.world.run(0.1)
        for instance in dc.instances():
            served_s = dc.world.now - instance.ready_at
            if kills < 4 and instance.state is State.READY and served_s >= 1.0:
                kills += 1
                dc.nodes[instance.node].end(instance, "killed by SIGTERM", failed=True)
    dc.world.run(20.0)
    assert kills == 4
    assert {session.outcome for session in sessions} <= {"served", "instance crashed"}
    assert [session.outcome for session in sessions].count("instance crashed") <= kills
    assert dc.problems == []


@pytest.mark.parametrize("most", [1, 5])
def test_one_that_crashes_right_after_each_start_is_started_ever_more_rarely(most: int) -> None:
    """Each that is ready lets all that is missing start."""
    dc = cold(concurrency=10, max=most)
    dc.dies_after = lambda app: 0.05
    sessions = []
    for _ in range(3_000):
        sessions += send(dc, 0, 1, takes_s=0.01)
        dc.world.run(0.1)
    assert len(dc.home.started) <= 16 * most
    refused = [session for session in sessions if session.outcome == "refused"]
    assert refused
    assert all(session.reason.startswith("ended right after its start") for session in refused)
    dc.dies_after = lambda app: None
    last = send(dc, 1, 1, takes_s=0.01)
    dc.world.run(60.0)
    (again,) = send(dc, 1, 1, takes_s=0.01)
    dc.world.run(5.0)
    assert last[0].outcome in ("refused", "served")
    assert again.outcome == "served"
    assert dc.problems == []
