"""The order of starts: every order of comings, turns and ends that a state machine finds, and what
a burst means for others in virtual time."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tabane.model import AppName, InstanceId
from tabane.scheduler.fair_queue import FairQueue, Start

ROOT, ALICE, BOB = 0, 1000, 1001


def start(name: str, app: str = "a", user: int = ALICE) -> Start:
    return Start(InstanceId(name), AppName(f"default/{app}"), user)


def many(app: str, count: int, user: int = ALICE) -> list[Start]:
    return [start(f"{app}{number}", app, user) for number in range(count)]


def filled(*starts: Start) -> FairQueue:
    queue = FairQueue()
    for each in starts:
        queue.add(each)
    return queue


def taken(queue: FairQueue, count: int | None = None) -> list[str]:
    """The next ones, each of which ends at once."""
    found: list[str] = []
    while (count is None or len(found) < count) and (one := queue.take()) is not None:
        queue.end(one.instance)
        found.append(one.instance)
    return found


def test_of_one_app_the_first_that_came_is_the_first() -> None:
    starts = many("a", 20)
    assert taken(filled(*starts)) == [each.instance for each in starts]


def test_one_start_of_another_app_is_next_after_a_burst_of_hundreds() -> None:
    queue = filled(*many("a", 300))
    taken(queue, 5)
    queue.add(start("b0", "b"))
    assert taken(queue, 2) == ["a5", "b0"]


def test_apps_take_turns_and_so_do_users() -> None:
    queue = filled(*many("a", 6), *many("b", 6), *many("c", 6, BOB))
    order = [name[0] for name in taken(queue)]
    assert Counter(order[:8]) == {"a": 2, "b": 2, "c": 4}
    assert order[:2] in (["a", "c"], ["c", "a"])


def test_who_has_turns_that_last_long_waits_for_who_has_none() -> None:
    """Three turns are taken by one app; the next two go to others, however late they came."""
    queue = filled(*many("slow", 5))
    assert [queue.take() for _ in range(3)] == many("slow", 5)[:3]
    queue.add(start("b0", "b"))
    queue.add(start("c0", "c", BOB))
    assert queue.take() == start("c0", "c", BOB)
    assert queue.take() == start("b0", "b")
    assert queue.take() == many("slow", 5)[3]


def test_apps_that_are_held_back_keep_their_place() -> None:
    queue = filled(*many("a", 2), *many("b", 1), *many("c", 1, BOB))
    a, b, c = (AppName(f"default/{name}") for name in "abc")
    assert queue.take({a, b, c}) is None
    assert queue.take({a, b}) == start("c0", "c", BOB)
    assert queue.take({b, c}) == start("a0")
    assert queue.take({a}) == start("b0", "b")
    assert queue.take({a}) is None
    assert queue.take() == start("a1")


def test_what_is_removed_is_not_taken() -> None:
    queue = filled(*many("a", 3))
    assert queue.remove(InstanceId("a1"))
    assert not queue.remove(InstanceId("a1"))
    assert taken(queue) == ["a0", "a2"]
    assert not queue.remove(InstanceId("a0"))


def test_it_tells_how_many_are_before_one() -> None:
    queue = filled(*many("a", 10), *many("b", 3), *many("c", 2, BOB))
    assert queue.ahead(start("new", "d")) == 2 + 2
    assert queue.ahead(start("new", "d", ROOT)) == 2
    assert queue.ahead(start("a9")) == 9 + 3 + 2


def test_nothing_is_kept_of_who_is_done() -> None:
    queue = filled(*many("a", 3), *many("b", 3, BOB))
    taken(queue)
    assert not queue._users
    assert (len(queue), queue.turns) == (0, 0)


class Orders(RuleBasedStateMachine):
    """At most `limit` turns at a time, as its owner gives them."""

    waiting, running = Bundle("waiting"), Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue()
        self.number = 0
        self.order: dict[AppName, list[InstanceId]] = {}
        self.turns: dict[InstanceId, Start] = {}
        self.passed: Counter[int] = Counter()
        """How often each user who has no turn and waits was passed over, since that is so."""

    def waiting_of(self, user: int) -> bool:
        return self.queue.waiting_of(user) > 0

    def has_none(self, user: int) -> bool:
        return all(each.user != user for each in self.turns.values())

    def idle_apps(self, user: int, turns: list[Start]) -> set[AppName]:
        """Those of that user that wait, and have no turn."""
        mine = {app for app, waiting in self.order.items() if waiting and app.endswith(str(user))}
        return mine - {each.app for each in turns}

    @rule(target=waiting, app=st.sampled_from("abcd"), user=st.integers(0, 4))
    def come(self, app: str, user: int) -> Start:
        self.number += 1
        one = start(f"i{self.number}", f"{app}{user}", user)
        self.queue.add(one)
        self.order.setdefault(one.app, []).append(one.instance)
        return one

    @rule(one=consumes(waiting))
    def leave(self, one: Start) -> None:
        was_waiting = one.instance in self.order.get(one.app, [])
        assert self.queue.remove(one.instance) == was_waiting
        if was_waiting:
            self.order[one.app].remove(one.instance)
        if not self.waiting_of(one.user):
            del self.passed[one.user]

    @rule()
    def take(self) -> None:
        candidates = {u for u in range(5) if self.waiting_of(u) and self.has_none(u)}
        waits = any(self.order.values())
        one = self.queue.take()
        assert (one is not None) == waits, "nothing waits while a turn is free"
        if one is None:
            return
        assert self.order[one.app].pop(0) == one.instance, "an app's starts keep their order"
        others = list(self.turns.values())
        self.turns[one.instance] = one
        if candidates:
            assert one.user in candidates, "who has no turn goes first"
        if any(each.app == one.app for each in others):
            assert not self.idle_apps(one.user, others), "an app that has no turn goes first"
        for user in candidates - {one.user}:
            self.passed[user] += 1
        del self.passed[one.user]

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.turns:
            instance = data.draw(st.sampled_from(sorted(self.turns)))
            self.queue.end(instance)
            del self.turns[instance]

    @invariant()
    def nobody_starves(self) -> None:
        assert max(self.passed.values(), default=0) < 5, "once by each other user at the most"

    @invariant()
    def it_counts(self) -> None:
        assert len(self.queue) == sum(map(len, self.order.values()))
        assert self.queue.turns == len(self.turns)


TestOrders = Orders.TestCase
TestOrders.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
