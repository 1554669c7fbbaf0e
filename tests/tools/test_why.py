"""What `tabane why` tells."""

from __future__ import annotations

from typing import Any

from tests.tools.answers import APP
from tests.tools.conftest import Pretended, Run, reply

HOME: dict[str, Any] = {
    "home": "tokyo/tokyo-1",
    "callers": None,
    "failures": 0,
    "reason": "",
    "problem": "",
    "trouble": "",
    "waiting": 0,
    "waits_for": "",
    "next": "tokyo/tokyo-1",
    "placement": ["tokyo/tokyo-1: can run it with crun, has 0 of this app, 0 in all"],
}
WAKE = {
    "app": "default/hello",
    "node": "tokyo/tokyo-1",
    "at": 0,
    "option": "cold",
    "phases_us": {"queue": 100, "decide": 0, "engine": 20_000, "boot": 5000, "ready": 300},
    "total_us": 25_400,
}
TOLD = {"app": APP, "advice": [], "instances": [], "events": [], "silent": []}


def test_where_it_would_run_and_what_a_wake_cost(tabane: Run, pretended: Pretended) -> None:
    pretended.begin(tokyo=reply(TOLD | {"homes": [HOME], "wakes": [WAKE]}))
    shown = tabane("why", "hello")
    assert shown.code == 0
    assert "in tokyo the next instance would run on tokyo/tokyo-1\n" in shown.out
    assert "can run it with crun" in shown.out
    assert "cold  25.4 ms: engine 20.0, boot 5.0, ready 0.3\n" in shown.out


def test_why_it_cannot_run(tabane: Run, pretended: Pretended) -> None:
    refused = HOME | {
        "callers": "anonymous",
        "next": None,
        "waiting": 2,
        "waits_for": "instance abc starts on tokyo/tokyo-1 since 3 s",
        "placement": ["tokyo/tokyo-1: has nothing for anonymous callers (no driver works there)"],
        "problem": "does not start",
        "trouble": "it closed",
    }
    pretended.begin(tokyo=reply(TOLD | {"homes": [refused], "wakes": [], "silent": ["osaka/o"]}))
    shown = tabane("why", "hello")
    assert shown.code == 1 and "osaka/o" in shown.err
    assert "in tokyo the next instance for anonymous callers would be refused\n" in shown.out
    waits_for = "instance abc starts on tokyo/tokyo-1 since 3 s"
    assert f"  2 sessions wait for it: {waits_for}\n  it does not start\n" in shown.out
    assert "  the last session that broke off: it closed\n" in shown.out
    assert "it was not woken yet" in shown.out


def test_what_is_put_away_and_what_keeps_it_from_going_on(
    tabane: Run, pretended: Pretended
) -> None:
    one = {"instance": "abc", "node": "tokyo/tokyo-1", "idle_s": 90.0, "problem": ""}
    other = one | {"instance": "def", "problem": "it failed"}
    home = HOME | {"away": [one, other]}
    pretended.begin(tokyo=reply(TOLD | {"homes": [home], "wakes": []}))
    said = (
        "abc is put away on tokyo/tokyo-1, idle for 1m30s, and goes on with the next session",
        "def is put away on tokyo/tokyo-1, and left alone for now: it failed",
    )
    for command, before in (("why", "  "), ("show", "  away      ")):
        shown = tabane(command, "hello").out
        assert all(f"{before}{sentence}\n" in shown for sentence in said)


def test_why_an_instance_went_down_the_ladder(tabane: Run, pretended: Pretended) -> None:
    at = {"instance": "abc", "app": "default/hello", "node": "tokyo/tokyo-1"}
    events = [
        at | {"at": 1.0, "state": "ready"},
        at | {"at": 2.0, "state": "freezing"},
        at | {"at": 3.0, "state": "stopping", "reason": "its node is short of memory"},
        at | {"at": 4.0, "state": "absent", "reason": "its node is short of memory"},
    ]
    pretended.begin(tokyo=reply(TOLD | {"homes": [HOME], "wakes": [], "events": events}))
    shown = tabane("why", "hello")
    said = "  abc on tokyo/tokyo-1 was stopped: its node is short of memory\n"
    assert said in shown.out and "\\n" not in shown.out
