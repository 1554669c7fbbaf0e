"""What the journal has not seen the end of."""

from __future__ import annotations

from tabane.model import InstanceId, State
from tabane.node.running import Transition, without_end


def told(instance: str, state: State, at: float) -> Transition:
    return Transition(at, InstanceId(instance), "default/hello", "tokyo/tokyo-1", state)


def test_only_what_is_neither_gone_nor_known_has_no_end() -> None:
    events = [
        told("ended", State.READY, 1),
        told("lost", State.STARTING, 2),
        told("ended", State.ABSENT, 3),
        told("lost", State.READY, 4),
        told("adopted", State.READY, 5),
        told("failed", State.FAILED, 6),
    ]
    assert without_end(events, {"adopted"}) == [events[3], events[5]]
    assert without_end([], ()) == []
