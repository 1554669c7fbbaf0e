"""When the cluster is asked anew, and how long a reader waits for it."""

from __future__ import annotations

import threading

import pytest

from tabane.clock import SystemClock
from tabane.errors import Unreachable
from tabane.tools.procfs.feed import FRESH_S, LONGEST_S, PATIENCE_S, Feed, Freshness
from tabane.tools.procfs.pretend import Pretend
from tabane.tools.procfs.source import Answer
from tabane.tools.procfs.users import local_groups, local_users
from tabane.tools.procfs.view import AGE_LIMIT_S, View


def test_what_is_fresh_is_read_at_once() -> None:
    freshness = Freshness()
    freshness.on_fetched(10.0, 10.1, True)
    assert freshness.wait_s(10.1 + FRESH_S - 0.01) == 0
    assert not freshness.is_wanted
    assert freshness.wait_s(10.1 + FRESH_S) == pytest.approx(PATIENCE_S)
    assert freshness.is_wanted


def test_a_slow_answer_is_waited_for_only_so_long() -> None:
    freshness = Freshness()
    freshness.on_fetched(10.0, 10.0, True)
    assert freshness.wait_s(12.0) == pytest.approx(PATIENCE_S)
    assert freshness.wait_s(12.4) == pytest.approx(PATIENCE_S - 0.4), "all wait for the same fetch"
    assert freshness.wait_s(12.6) == 0, "what is there is young enough"
    late = 10.0 + AGE_LIMIT_S
    assert freshness.wait_s(late) == pytest.approx(12.0 + LONGEST_S - late), (
        "nothing is to be shown"
    )


def test_a_failed_fetch_is_not_repeated_for_every_reader() -> None:
    freshness = Freshness()
    freshness.on_fetched(10.0, 12.0, False)
    assert freshness.wait_s(12.5) == 0
    assert freshness.wait_s(12.0 + FRESH_S) > 0


def test_after_a_change_nothing_is_fresh() -> None:
    freshness = Freshness()
    freshness.on_fetched(10.0, 10.0, True)
    freshness.expire()
    assert freshness.wait_s(10.1) > 0


class Gate(Pretend):
    """Answers when it is let."""

    def __init__(self) -> None:
        super().__init__({"tokyo/a": 2})
        self.open = threading.Event()

    def fetch(self) -> Answer:
        self.open.wait(30)
        return super().fetch()


def test_readers_get_what_a_fetch_brings() -> None:
    source = Gate()
    feed = Feed(source, View(local_users(), local_groups()))
    feed.start()
    seen: list[int] = []
    readers = [
        threading.Thread(target=lambda: (feed.wait(), seen.append(len(feed.view.processes))))
        for _ in range(3)
    ]
    for reader in readers:
        reader.start()
    assert not seen
    source.open.set()
    for reader in readers:
        reader.join(30)
    assert seen == [2, 2, 2]
    assert source.fetches == 1
    feed.expire()
    feed.wait()
    assert source.fetches == 2
    feed.close()


class LateClock(SystemClock):
    """The machine's clock, put forward at will."""

    ahead_s = 0.0

    def now(self) -> float:
        return super().now() + self.ahead_s


def test_a_silent_node_vanishes_though_others_answer() -> None:
    source, clock = Pretend({"tokyo/a": 2, "osaka/b": 2}), LateClock()
    feed = Feed(source, View(local_users(), local_groups()), clock=clock)
    feed.fetch()
    source.silent.add("osaka/b")
    clock.ahead_s = AGE_LIMIT_S + 1
    feed.fetch()
    assert feed.wait_s() == 0, "it is fresh"
    assert {remote.key.node for remote in feed.view.processes.values()} == {"tokyo/a"}
    source.silent.add("tokyo/a")
    clock.ahead_s *= 2
    with pytest.raises(Unreachable):
        feed.fetch()
    assert feed.view.processes == {}


def test_nobody_answers() -> None:
    source = Pretend({"tokyo/a": 2})
    source.silent.add("tokyo/a")
    feed = Feed(source, View(local_users(), local_groups()))
    with pytest.raises(Unreachable):
        feed.fetch()
    feed.start()
    feed.wait()
    assert feed.view.processes == {}
    feed.close()
