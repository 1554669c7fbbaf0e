"""Sessions in instances whose resources follow them, as a gateway tells."""

from __future__ import annotations

from tabane.gateway.grants import Lease
from tabane.gateway.uses import Uses
from tabane.model import AppName, Generation, InstanceId, NodeName


class Told:
    def __init__(self) -> None:
        self.said: list[int] = []
        self.looks = 0
        self.uses = Uses(lambda lease, count: self.said.append(count), self.later)
        generation = Generation("one", InstanceId("i1"), 1)
        node = NodeName("tokyo/tokyo-1")
        self.lease = Lease(AppName("default/a"), 1, generation, node, "10.0.0.2", 80, "home")

    def later(self) -> None:
        self.looks += 1

    def use(self, *counts: int) -> None:
        for count in counts:
            self.lease.used = count
            self.uses.note(self.lease)


def test_a_rise_is_told_at_once_and_a_fall_when_it_lasted() -> None:
    told = Told()
    told.use(1, 2, 3, 2, 1)
    assert told.said == [1, 2, 3]
    told.uses.look()
    assert told.said == [1, 2, 3], "three were there since the last look"
    told.uses.look()
    assert told.said == [1, 2, 3, 1]


def test_one_request_after_the_other_is_one_message() -> None:
    told = Told()
    for _ in range(10):
        told.use(*(1, 0) * 100)
        told.uses.look()
    assert told.said == [1]
    told.uses.look()
    assert told.said == [1, 0]


def test_nobody_looks_when_there_is_nothing_to_see() -> None:
    told = Told()
    told.use(1, 0)
    assert told.looks == 1
    told.uses.look()
    told.uses.look()
    assert (told.looks, told.said) == (2, [1, 0])
    told.use(1)
    assert (told.looks, told.said) == (3, [1, 0, 1])


def test_all_is_told_to_a_new_agent() -> None:
    told = Told()
    told.use(1, 2)
    told.uses.tell_all()
    assert told.said == [1, 2, 2]
