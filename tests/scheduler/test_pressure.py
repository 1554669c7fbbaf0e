"""Who goes down the ladder when a node is short of memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tabane.model import AppName, InstanceId
from tabane.scheduler.pressure import (
    ENOUGH,
    STALL_PAUSE_S,
    Gauge,
    Rung,
    Standing,
    Step,
    kept_bytes,
    plan,
    plan_room,
)

MIB = 1 << 20
GIB = 1 << 30


def make(
    name: str, idle_s: float | None, leave: int = 10, rest: int = 0, *, promised: bool = False
) -> Standing:
    return Standing(InstanceId(name), AppName(f"default/{name}"), idle_s, leave, rest, promised)


def shown(steps: tuple[Step, ...]) -> list[tuple[str, str]]:
    return [(step.instance, step.rung.value) for step in steps]


def test_the_coldest_leaves_and_no_more_than_are_needed() -> None:
    standing = [make("warm", 1), make("cold", 50), make("cool", 20)]
    assert shown(plan(standing, 5)) == [("cold", "leave")]
    assert shown(plan(standing, 15)) == [("cold", "leave"), ("cool", "leave")]


def test_what_is_in_use_stays_whatever_is_missing() -> None:
    assert plan([make("busy", None)], 1000) == ()


def test_nothing_missing_nobody_goes() -> None:
    assert plan([make("cold", 50)], 0) == ()


def test_rest_is_enough_where_it_frees_enough() -> None:
    standing = [make("cold", 50, rest=8), make("cool", 20, rest=8), make("warm", 1, rest=8)]
    assert shown(plan(standing, 12)) == [("cold", "rest"), ("cool", "rest")]
    assert shown(plan(standing, 25)) == [("cold", "leave"), ("cool", "rest"), ("warm", "rest")]


def test_what_rests_already_leaves_when_the_others_rest_is_not_enough() -> None:
    standing = [make("frozen", 50), make("cool", 20, rest=5)]
    assert shown(plan(standing, 5)) == [("cool", "rest")]
    assert shown(plan(standing, 6)) == [("frozen", "leave")]


def test_what_is_promised_rests_like_others_and_leaves_last() -> None:
    standing = [make("kept", 50, rest=4, promised=True), make("cold", 20, rest=4)]
    assert shown(plan(standing, 8)) == [("kept", "rest"), ("cold", "rest")]
    steps = plan(standing, 1000)
    assert shown(steps) == [("cold", "leave"), ("kept", "leave")]
    assert [step.last for step in steps] == [False, True]


def test_a_start_makes_nobody_leave_for_nothing_nor_what_is_promised() -> None:
    standing = [make("cold", 50), make("kept", 60, promised=True)]
    assert shown(plan_room(standing, 10)) == [("cold", "leave")]
    assert plan_room(standing, 11) == ()
    assert shown(plan_room([make("kept", 60, rest=3, promised=True)], 3)) == [("kept", "rest")]


STANDINGS = st.lists(
    st.builds(
        Standing,
        st.uuids().map(lambda uuid: InstanceId(str(uuid))),
        st.just(AppName("default/app")),
        st.none() | st.integers(0, 1000).map(float),
        st.integers(0, 100),
        st.integers(0, 60),
        st.booleans(),
    ).map(lambda one: one if one.rest_bytes <= one.leave_bytes else swapped(one)),
    max_size=12,
)


def swapped(one: Standing) -> Standing:
    """Who leaves gives at least what it gives at rest."""
    return Standing(
        one.instance, one.app, one.idle_s, one.rest_bytes, one.leave_bytes, one.promised
    )


def frees(steps: tuple[Step, ...]) -> int:
    return sum(step.frees_bytes for step in steps)


@given(STANDINGS, st.integers(1, 600))
def test_it_is_enough_if_anything_is_and_never_one_too_many(
    standing: list[Standing], need: int
) -> None:
    steps = plan(standing, need)
    most = sum(one.leave_bytes for one in standing if one.idle_s is not None)
    assert frees(steps) >= min(need, most)
    assert frees(steps[:-1]) < need
    leave = [step for step in steps if step.rung is Rung.LEAVE]
    if leave:
        others_rest = sum(
            one.rest_bytes
            for one in standing
            if one.idle_s is not None and one.instance not in {step.instance for step in leave[:-1]}
        )
        assert frees(tuple(leave[:-1])) + others_rest < need


@given(STANDINGS, st.integers(1, 600))
def test_nobody_is_lower_than_one_that_is_colder(standing: list[Standing], need: int) -> None:
    steps = {step.instance: step for step in plan(standing, need)}
    known = {one.instance: one for one in standing}
    assert all(known[instance].idle_s is not None for instance in steps)
    for step in steps.values():
        for other in standing:
            colder = other.idle_s is not None and other.idle_s > step.idle_s
            if not colder or other.leave_bytes == 0:
                continue
            theirs = steps.get(other.instance)
            if step.rung is Rung.LEAVE and other.promised <= known[step.instance].promised:
                assert theirs is not None and theirs.rung is Rung.LEAVE
            if step.rung is Rung.REST and other.rest_bytes:
                assert theirs is not None


@given(STANDINGS, st.integers(1, 600))
def test_a_promise_is_broken_only_when_all_others_have_left(
    standing: list[Standing], need: int
) -> None:
    steps = plan(standing, need)
    left = {step.instance for step in steps if step.rung is Rung.LEAVE}
    if any(step.last for step in steps):
        unpromised = (one for one in standing if one.idle_s is not None and not one.promised)
        assert all(one.instance in left for one in unpromised if one.leave_bytes)
    assert not any(step.last for step in plan_room(standing, need))


@given(STANDINGS, st.integers(1, 600))
def test_room_is_made_whole_or_not_at_all(standing: list[Standing], need: int) -> None:
    steps = plan_room(standing, need)
    assert steps == () or frees(steps) >= need


def test_a_share_is_kept_free_within_bounds() -> None:
    assert kept_bytes(4 * GIB) == 4 * GIB // 20
    assert kept_bytes(64 * GIB) == GIB
    assert kept_bytes(512 * MIB) == 64 * MIB
    assert kept_bytes(100 * MIB) == 25 * MIB


def test_pressure_begins_below_what_is_kept_and_ends_at_half_as_much_again() -> None:
    gauge = Gauge()
    assert gauge.need(100, 100, 0, now=0) == 0
    assert gauge.need(99, 100, 0, now=1) == 51
    assert gauge.need(130, 100, 0, now=2) == 20
    assert gauge.need(int(100 * ENOUGH), 100, 0, now=3) == 0
    assert gauge.need(130, 100, 0, now=4) == 0


def test_stalls_count_when_memory_is_scarce_and_are_answered_step_by_step() -> None:
    gauge = Gauge()
    assert gauge.need(1000, 100, stalled_percent=90, now=0) == 0
    assert gauge.need(250, 100, stalled_percent=9, now=0) == 0
    assert gauge.need(250, 100, stalled_percent=12, now=0) == 100
    assert gauge.need(250, 100, stalled_percent=12, now=STALL_PAUSE_S - 1) == 0
    assert gauge.need(250, 100, stalled_percent=12, now=STALL_PAUSE_S) == 100
    assert gauge.need(250, 100, stalled_percent=0, now=STALL_PAUSE_S + 1) == 0
    assert not gauge.is_short
