"""How many starts at once: on pretended machines, in virtual time."""

from __future__ import annotations

import pytest

from tabane.scheduler.capacity import MOST_PER_PROCESSOR, Capacity


def burst(capacity: Capacity, count: int, processors: float, own_s: float = 0.02) -> list[int]:
    """So many starts in a row, each of which takes a processor for `own_s`; the limits found."""
    limits = []
    for number in range(count):
        together = min(capacity.limit, count - number)
        took_s = own_s * max(1.0, together / processors)
        waiting = count - number - together
        capacity.note("crun, cold", took_s, beside=together - 1, waiting=waiting)
        limits.append(capacity.limit)
    return limits


@pytest.mark.parametrize("processors", [1, 2, 4, 16, 64])
def test_it_keeps_the_processors_busy_and_little_more(processors: int) -> None:
    capacity = Capacity(processors)
    limits = burst(capacity, 300, processors)
    assert min(limits) == processors
    assert processors + 1 <= limits[-1] <= processors + 4
    assert limits[-50:] == [limits[-1]] * 50, "it has found its place"


def test_it_rises_while_starts_do_not_hinder_each_other() -> None:
    """They wait for disks, say."""
    limits = burst(Capacity(2), 2_000, processors=1_000.0)
    assert limits == sorted(limits)
    assert limits[-1] == 2 * MOST_PER_PROCESSOR


def test_it_falls_when_the_machine_becomes_slower_under_many() -> None:
    capacity = Capacity(2)
    burst(capacity, 500, processors=12)
    high = capacity.limit
    burst(capacity, 500, processors=3)
    assert high > 10
    assert 4 <= capacity.limit <= 6


def test_it_is_never_less_than_the_processors() -> None:
    capacity = Capacity(4)
    capacity.note("crun, cold", 0.02, beside=0, waiting=0)
    for _ in range(100):
        capacity.note("crun, cold", 9.0, beside=3, waiting=9)
    assert capacity.limit == 4


def test_a_few_starts_now_and_then_do_not_raise_it() -> None:
    capacity = Capacity(2)
    for _ in range(500):
        capacity.note("crun, cold", 0.02, beside=0, waiting=0)
    assert capacity.limit == 2


def test_what_one_takes_alone_follows_those_that_were_alone_and_any_faster_one() -> None:
    capacity = Capacity(2)
    capacity.note("crun, cold", 0.04, beside=1, waiting=9)
    assert capacity.own_s("crun, cold") == pytest.approx(0.04)
    capacity.note("crun, cold", 0.02, beside=3, waiting=9)
    assert capacity.own_s("crun, cold") == pytest.approx(0.02)
    capacity.note("crun, cold", 9.0, beside=1, waiting=9)
    assert capacity.own_s("crun, cold") == pytest.approx(0.02)
    for _ in range(20):
        capacity.note("crun, cold", 0.06, beside=0, waiting=0)
    assert capacity.own_s("crun, cold") == pytest.approx(0.06, rel=0.01)
    assert capacity.own_s("runsc, cold") is None


def test_slow_engines_are_not_taken_for_a_full_node() -> None:
    """Between containers, machines are started, which take a hundred times as long."""
    capacity = Capacity(2)
    for _ in range(100):
        capacity.note("crun, cold", 0.02, beside=1, waiting=9)
        capacity.note("qemu, cold", 2.0, beside=1, waiting=9)
    assert capacity.limit > 2


def test_how_long_one_waits_for_its_turn() -> None:
    capacity = Capacity(2)
    assert capacity.wait_s(1_000, 2) == 0.0, "nothing is known yet"
    for _ in range(4):
        capacity.note("crun, cold", 0.1, beside=1, waiting=0)
    assert capacity.limit == 2
    assert capacity.wait_s(0, 1) == 0.0
    assert capacity.wait_s(0, 2) == pytest.approx(0.05)
    assert capacity.wait_s(200, 2) == pytest.approx(201 * 0.1 / 2)
    for _ in range(4):
        capacity.note("qemu, cold", 3.0, beside=1, waiting=0)
    assert capacity.limit == 2
    assert capacity.wait_s(200, 2) == pytest.approx(201 * 0.1 / 2), "nobody is refused on a guess"
