"""The one transition table of an instance's life.

`TRANSITIONS[state][event]` is the state that follows; what is not in the table is illegal and
raises. `python -m tabane.lifecycle` prints the diagram in docs/architecture.md (a test compares).
An image made from a running instance is an artefact, not a state.
"""

from __future__ import annotations

from enum import StrEnum

from tabane.errors import Conflict
from tabane.model import State


class Event(StrEnum):
    PREPARE = "prepare"
    START = "start"
    READY = "ready"
    FREEZE = "freeze"
    FROZEN = "frozen"
    THAW = "thaw"
    CHECKPOINT = "checkpoint"
    BACK_TO_READY = "back_to_ready"
    BACK_TO_FROZEN = "back_to_frozen"
    DRAIN = "drain"
    SESSION_WON = "session_won"
    STOP = "stop"
    GONE = "gone"
    FAIL = "fail"
    NODE_SILENT = "node_silent"
    LEASE_ENDED = "lease_ended"
    # What a node says of an instance when it is back after a silence.
    FOUND_READY = "found_ready"
    FOUND_FROZEN = "found_frozen"


_LOST = {Event.FAIL: State.FAILED, Event.NODE_SILENT: State.UNKNOWN}

TRANSITIONS: dict[State, dict[Event, State]] = {
    State.ABSENT: {Event.PREPARE: State.PREPARING},
    State.PREPARING: {Event.START: State.STARTING, Event.STOP: State.STOPPING, **_LOST},
    State.STARTING: {Event.READY: State.READY, Event.STOP: State.STOPPING, **_LOST},
    State.READY: {
        Event.FREEZE: State.FREEZING,
        Event.CHECKPOINT: State.CHECKPOINTING,
        Event.DRAIN: State.DRAINING,
        Event.STOP: State.STOPPING,
        **_LOST,
    },
    State.FREEZING: {
        Event.FROZEN: State.FROZEN,
        Event.SESSION_WON: State.READY,
        Event.STOP: State.STOPPING,
        **_LOST,
    },
    State.FROZEN: {
        Event.THAW: State.READY,
        Event.CHECKPOINT: State.CHECKPOINTING,
        Event.DRAIN: State.DRAINING,
        Event.STOP: State.STOPPING,
        **_LOST,
    },
    State.CHECKPOINTING: {
        Event.BACK_TO_READY: State.READY,
        Event.BACK_TO_FROZEN: State.FROZEN,
        Event.STOP: State.STOPPING,
        **_LOST,
    },
    State.DRAINING: {Event.SESSION_WON: State.READY, Event.STOP: State.STOPPING, **_LOST},
    State.STOPPING: {Event.GONE: State.ABSENT, **_LOST},
    State.FAILED: {Event.GONE: State.ABSENT},
    State.UNKNOWN: {
        Event.FOUND_READY: State.READY,
        Event.FOUND_FROZEN: State.FROZEN,
        Event.GONE: State.ABSENT,
        Event.LEASE_ENDED: State.ABSENT,
        Event.FAIL: State.FAILED,
    },
}


AT_REST = (State.FREEZING, State.FROZEN)
STANDING = (State.READY, *AT_REST, State.CHECKPOINTING)
"""An instance that was ready, and serves at once, or when it is thawed, or saved."""


def follow(state: State, event: Event) -> State:
    """The state after `event`. Raises `Conflict` when the table has no such transition."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        legal = ", ".join(TRANSITIONS[state]) or "nothing"
        raise Conflict(f"an instance that is {state} takes no '{event}' (only: {legal})") from None


def render_diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2"]
    for state, events in TRANSITIONS.items():
        lines += [f"    {state} --> {after}: {event}" for event, after in events.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(render_diagram())
