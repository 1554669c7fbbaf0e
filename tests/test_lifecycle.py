from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from tabane.errors import Conflict
from tabane.lifecycle import TRANSITIONS, Event, follow, render_diagram
from tabane.model import State

ARCHITECTURE = Path(__file__).parent.parent / "docs" / "architecture.md"
LEGAL = {(state, event) for state, events in TRANSITIONS.items() for event in events}
ILLEGAL = sorted(set(product(State, Event)) - LEGAL)


def reachable_from(state: State) -> set[State]:
    found: set[State] = set()
    waiting = [state]
    while waiting:
        following = set(TRANSITIONS[waiting.pop()].values()) - found
        found |= following
        waiting += following
    return found


def test_every_state_is_in_the_table() -> None:
    assert set(TRANSITIONS) == set(State)


def test_every_event_means_something() -> None:
    assert {event for _, event in LEGAL} == set(Event)


def test_every_state_is_reached_and_everything_can_end() -> None:
    assert reachable_from(State.ABSENT) == set(State)
    for state in State:
        assert State.ABSENT in reachable_from(state), state


def test_follow_reads_the_table() -> None:
    for state, event in LEGAL:
        assert follow(state, event) is TRANSITIONS[state][event]


@pytest.mark.parametrize(("state", "event"), ILLEGAL)
def test_what_is_not_in_the_table_is_refused(state: State, event: Event) -> None:
    with pytest.raises(Conflict) as refusal:
        follow(state, event)
    for legal in TRANSITIONS[state]:
        assert legal in refusal.value.message


def test_never_frozen_or_checkpointed_before_the_first_ready() -> None:
    early = reachable_from_without(State.ABSENT, {State.READY, State.UNKNOWN})
    assert not early & {State.FREEZING, State.FROZEN, State.CHECKPOINTING}


def reachable_from_without(state: State, avoided: set[State]) -> set[State]:
    found: set[State] = set()
    waiting = [state]
    while waiting:
        following = set(TRANSITIONS[waiting.pop()].values()) - found - avoided
        found |= following
        waiting += following
    return found


@pytest.mark.parametrize("state", sorted(set(State) - {State.ABSENT, State.FAILED, State.UNKNOWN}))
def test_a_node_may_fall_silent_and_an_instance_fail_at_any_time(state: State) -> None:
    assert follow(state, Event.FAIL) is State.FAILED
    assert follow(state, Event.NODE_SILENT) is State.UNKNOWN


@pytest.mark.parametrize("state", [State.FREEZING, State.DRAINING])
def test_a_session_wins_the_race_against_idleness(state: State) -> None:
    assert follow(state, Event.SESSION_WON) is State.READY


def test_the_diagram_draws_each_transition_once() -> None:
    head, *arrows = render_diagram().splitlines()
    assert head == "stateDiagram-v2"
    assert sorted(arrow.strip() for arrow in arrows) == sorted(
        f"{state} --> {TRANSITIONS[state][event]}: {event}" for state, event in LEGAL
    )


def test_the_page_shows_the_diagram_of_the_table() -> None:
    page = ARCHITECTURE.read_text()
    _, _, rest = page.partition("<!-- lifecycle: python -m tabane.lifecycle -->\n```mermaid\n")
    drawn, _, _ = rest.partition("\n```\n<!-- /lifecycle -->")
    assert drawn == render_diagram(), "paste what `python -m tabane.lifecycle` prints"


def test_the_module_prints_the_diagram() -> None:
    argv = [sys.executable, "-m", "tabane.lifecycle"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout == render_diagram() + "\n"
