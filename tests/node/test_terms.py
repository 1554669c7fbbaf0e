"""When a node that cannot be seen is given up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tabane.node.membership import Terms
from tabane.supervise import Later
from tabane.testing.clock import VirtualClock

HUB = "tokyo/tokyo-2"
TERM_S = 5.0


class VirtualLater(Later):
    """`Later` by a virtual clock: of several with one name the earliest is done."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock = clock
        self._due: dict[str, float] = {}

    def call(self, name: str, delay_s: float, action: Callable[[], None]) -> None:
        when = self._clock.now() + delay_s
        if self._due.get(name, when + 1) > when:
            self._due[name] = when
            self._clock.call_at(when, lambda: self._perform(name, action))

    def _perform(self, name: str, action: Callable[[], None]) -> None:
        del self._due[name]
        action()


class Rig:
    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.over: list[str] = []
        later = VirtualLater(self.clock)
        self.terms = Terms(self.clock, later, self.over.append, TERM_S)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_node_is_given_up_when_its_term_is_over(rig: Rig) -> None:
    rig.terms.on_hub(HUB, False)
    rig.clock.advance(TERM_S - 0.1)
    assert rig.over == []
    rig.clock.advance(0.1)
    assert rig.over == [HUB]
    rig.clock.advance(10 * TERM_S)
    assert rig.over == [HUB]


def test_one_that_is_back_in_time_is_not(rig: Rig) -> None:
    rig.terms.on_hub(HUB, False)
    rig.clock.advance(TERM_S - 0.1)
    rig.terms.on_hub(HUB, True)
    rig.clock.advance(10 * TERM_S)
    assert rig.over == []


def test_a_second_silence_has_a_term_of_its_own(rig: Rig) -> None:
    rig.terms.on_hub(HUB, False)
    rig.clock.advance(3)
    rig.terms.on_hub(HUB, True)
    rig.terms.on_hub(HUB, False)
    rig.clock.advance(TERM_S - 0.1)
    assert rig.over == []
    rig.clock.advance(0.1)
    assert rig.over == [HUB]


def test_each_node_has_its_own(rig: Rig) -> None:
    rig.terms.on_hub("tokyo/tokyo-3", False)
    rig.clock.advance(1)
    rig.terms.on_hub(HUB, False)
    rig.clock.advance(TERM_S)
    assert rig.over == ["tokyo/tokyo-3", HUB]
