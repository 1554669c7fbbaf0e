"""What a node counts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tabane.errors import NotFound
from tabane.gateway.limits import HttpCounters, TcpCounters
from tabane.model import AppName, InstanceId, NodeName, State, WakeRecord
from tabane.node import messages as say
from tabane.node.journal import Journal
from tabane.node.meters import BOUNDS_S, Histogram, Meters, ask_gateways
from tabane.node.running import Transition

HELLO = AppName("default/hello")


def test_a_bound_is_in_its_own_bucket() -> None:
    histogram = Histogram()
    for took_s in (0.0, BOUNDS_S[0], BOUNDS_S[0] + 1e-6, BOUNDS_S[-1] + 1):
        histogram.add(took_s)
    assert histogram.counts == [2, 1, *[0] * (len(BOUNDS_S) - 2), 1]


def _wake(option: str, app: AppName = HELLO) -> WakeRecord:
    phases = {"queue": 300, "engine": 14_000}
    told = InstanceId("abc"), NodeName("tokyo/tokyo-1"), "gateway-0", option
    return WakeRecord(app, 1, *told, 0.0, phases, 18_000)


def _happened(state: State, part: str = "") -> Transition:
    return Transition(
        0.0, InstanceId("" if part else "abc"), HELLO, "tokyo/tokyo-1", state, "", part
    )


def test_wakes_and_events_are_counted_as_they_are_written(tmp_path: Path) -> None:
    wakes = Journal(tmp_path / "wakes", WakeRecord)
    events = Journal(tmp_path / "events", Transition)
    apps = {HELLO: SimpleNamespace(isolation="container")}
    meters = Meters(SimpleNamespace(wakes=wakes, events=events, app=apps.get))  # type: ignore[arg-type]
    for record in (_wake("cold"), _wake("cold"), _wake("thaw"), _wake("cold", AppName("a/b"))):
        wakes.add(record)
    for transition in (_happened(State.READY), _happened(State.ABSENT, "gateway-0")):
        events.add(transition)
    assert {key: sum(one.counts) for key, one in meters.wakes.items()} == {
        ("container", "cold"): 2,
        ("container", "thaw"): 1,
        ("removed", "cold"): 1,
    }
    assert meters.phases["container", "cold", "engine"].total_s == 0.028
    assert meters.states == {State.READY: 1}
    assert meters.part_ends == {"gateway-0": 1}
    wakes.close()
    events.close()


async def test_a_gateway_that_is_away_has_counted_nothing() -> None:
    counted = say.Counted({"clients": HttpCounters(requests=3)}, TcpCounters(sessions=2))

    async def call(member: str, data: bytes, *, timeout_s: float) -> bytes:
        assert say.parse(data) == say.AskCounted()
        if member.endswith("gateway-1"):
            raise NotFound(f"there is no {member}")
        return say.encode(counted)

    config = SimpleNamespace(gateways=2, key="tokyo/tokyo-1")
    agent: Any = SimpleNamespace(config=config, me=SimpleNamespace(call=call))
    assert await ask_gateways(agent) == {"gateway-0": counted, "gateway-1": None}
