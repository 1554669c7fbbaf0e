"""What an instance has of its resources, as its sessions come and go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.model import App, Reactive, Resources
from tabane.scheduler.shares import HOLD_S, Share, cpu_for, memory_for

RESOURCES = Resources(cpu=1.0, cpu_min=0.2, memory_bytes=256 << 20, memory_min_bytes=64 << 20)
APP = App("a", "host", port=80, resources=RESOURCES, reactive=Reactive(concurrency=4))


def test_it_goes_with_the_sessions_within_its_bounds() -> None:
    assert [cpu_for(RESOURCES, n, 4) for n in range(6)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    )
    assert memory_for(RESOURCES, 0, 4) == 64 << 20
    assert memory_for(RESOURCES, 4, 4) == 256 << 20
    assert memory_for(Resources(), 0, 4) is None
    assert cpu_for(Resources(cpu=2.0), 0, 4) == 2.0


def rested() -> Share:
    share = Share.begin(APP, 0.0)
    assert not share.look(HOLD_S - 0.1)
    assert share.look(HOLD_S)
    return share


def test_it_begins_with_all_and_has_the_least_when_nobody_comes() -> None:
    share = Share.begin(APP, 0.0)
    assert share.cpu == 1.0
    assert rested().cpu == pytest.approx(0.2)


def test_a_rise_is_followed_at_once() -> None:
    share = rested()
    assert share.hear("g1", 1, 10.0)
    assert share.cpu == pytest.approx(0.4)
    assert share.hear("g2", 2, 10.0)
    assert share.cpu == pytest.approx(0.8)


def test_a_fall_is_followed_after_a_while_without_a_rise() -> None:
    share = rested()
    share.hear("g1", 4, 10.0)
    assert not share.hear("g1", 1, 11.0)
    assert not share.hear("g1", 2, 12.0)
    assert not share.look(11.0 + HOLD_S), "there was a rise meanwhile"
    assert share.look(12.0 + HOLD_S)
    assert share.level == 2
    assert share.lower_at is None


def test_waves_do_not_brake() -> None:
    share = rested()
    share.hear("g1", 4, 10.0)
    for second in range(20):
        assert not share.hear("g1", 0, 10.0 + second)
        assert not share.look(10.5 + second)
        assert not share.hear("g1", 4, 10.5 + second)
    assert share.cpu == 1.0


@given(st.lists(st.tuples(st.sampled_from(["g1", "g2"]), st.integers(0, 6), st.floats(0.0, 10.0))))
def test_it_never_has_less_than_its_sessions_need(
    events: list[tuple[str, int, float]],
) -> None:
    share, now, counts = rested(), 10.0, {"g1": 0, "g2": 0}
    for gateway, count, pause_s in events:
        counts[gateway] = count
        share.hear(gateway, count, now)
        now += pause_s
        share.look(now)
        assert share.level >= min(4, sum(counts.values()))
    now += 2 * HOLD_S
    share.look(now)
    assert share.level == min(4, sum(counts.values()))
