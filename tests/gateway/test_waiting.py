"""Those who have waited too long are told what is known of what they wait for."""

from __future__ import annotations

import pytest

from tabane.gateway.activation import StillStarting
from tabane.gateway.decisions import VERDICT_S
from tabane.gateway.messages import Broken, Refuse
from tabane.model import App, InstanceId, Volume
from tabane.testing.home import NODE, Decided, HandledHome

START_S = 10.0


def reasons(decided: Decided) -> list[str]:
    assert {refuse.kind for _, refuse in decided.told(Refuse)} <= {"late"}
    return [refuse.reason for _, refuse in decided.told(Refuse)]


def late(home: HandledHome) -> str:
    """What a session at `g2` is told that comes now, when its time is up."""
    assert reasons(home.demand("g2", 1)) == []
    return reasons(home.wait(START_S + VERDICT_S))[-1]


def test_that_it_starts_is_said_with_where_since_when_and_what_it_is_at() -> None:
    home = HandledHome()
    home.demand("g1", 1)
    home.wait(1)
    doing = "its module is being compiled"
    assert home.handle(StillStarting(home.app.key, InstanceId("i1"), NODE, doing)) == []
    (reason,) = reasons(home.wait(START_S))
    assert reason == "instance i1 starts on tokyo/tokyo-1 since 10 s: its module is being compiled"


def test_those_who_came_later_wait_on() -> None:
    home = HandledHome()
    home.demand("g1", 1)
    home.wait(5)
    home.demand("g2", 1)
    ((gateway, refuse),) = home.wait(START_S).told(Refuse)
    assert (gateway, refuse.sessions, refuse.waited_s) == ("g1", 1, START_S + VERDICT_S)
    assert home.ready("i1").grants == [("g2", "i1", 1)]


def test_of_many_that_start_the_first_is_told() -> None:
    home = HandledHome(concurrency=1, max=3)
    home.demand("g1", 3)
    (reason,) = reasons(home.wait(START_S + VERDICT_S))
    assert reason == "instance i1 starts on tokyo/tokyo-1 since 10 s, and 2 more"


@pytest.mark.parametrize(
    ("concurrency", "count", "words"),
    [
        (1, 1, "its instance's one slot is in use (max = 1)"),
        (5, 1, "all 5 slots of its instance are in use (max = 1)"),
        (5, 2, "all 10 slots of its 2 instances are in use (max = 2)"),
    ],
)
def test_slots_that_are_all_in_use(concurrency: int, count: int, words: str) -> None:
    home = HandledHome(concurrency=concurrency, max=count, stop_after_s=1000.0)
    home.demand("g1", concurrency * count)
    for number in range(count):
        home.ready(f"i{number + 1}")
    assert late(home) == words


def test_why_the_last_start_failed_is_said_with_what_starts_now() -> None:
    home = HandledHome()
    home.demand("g1", 1)
    home.ended("i1", "exited with code 3")
    assert late(home) == (
        "instance i2 starts on tokyo/tokyo-1 since 10 s; it did not start once: exited with code 3"
    )


def test_what_could_not_be_reached() -> None:
    home = HandledHome(max=1, concurrency=1, stop_after_s=1000.0)
    home.demand("g1", 1)
    home.ready("i1")
    home.demand("g2", 1)
    home.wait(START_S + VERDICT_S - 0.5)
    home.hear("g1", Broken(home.app.key, InstanceId("i1"), "connection refused"))
    (reason,) = reasons(home.wait(0.5))
    assert reason == "instance i1 on tokyo/tokyo-1 could not be reached"


def test_one_that_has_to_stop_first() -> None:
    """Nothing else has its volumes before."""
    app = App(name="hello", image="host", port=8000, revision=1, volumes=(Volume("v", "/v"),))
    home = HandledHome(app, max=1, stop_after_s=1.0)
    home.demand("g1", 1)
    home.ready("i1")
    home.returned("g1", "i1", 1)
    home.wait(2)
    assert late(home) == "instance i1 on tokyo/tokyo-1 is being stopped"


def test_words_about_a_start_that_is_over_change_nothing() -> None:
    home = HandledHome()
    assert home.handle(StillStarting(home.app.key, InstanceId("i9"), NODE, "it starts")) == []
    assert home.ledger.instances == {}
