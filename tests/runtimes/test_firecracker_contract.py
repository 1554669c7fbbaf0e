"""Firecracker's API as the table has it: what is right, and what is wrong with what is not."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tabane.runtimes.firecracker.contract import (
    ACTIONS,
    AFTER,
    ALWAYS,
    BEFORE,
    CALLS,
    FRESH,
    MESSAGES,
    PARTIAL,
    PAUSED,
    find_answer_faults,
    find_call,
    find_faults,
    is_legal,
)
from tabane.runtimes.firecracker.machine import (
    Plan,
    load_requests,
    make_requests,
    snapshot_request,
    trial_requests,
)

PLAN = Plan(144 << 20, 2, "tap0", "02:7a:b0:01:00:05")


def sample(kind: str, *, full: bool = True) -> Any:
    """A value of that kind; `full`: with all that may be left out."""
    kind = kind.removesuffix("!")
    if kind.startswith("["):
        return [sample(kind[1:-1], full=full)]
    if kind in MESSAGES:
        fields = MESSAGES[kind].items()
        return {name: sample(of, full=full) for name, of in fields if full or of.endswith("!")}
    if kind == "truth":
        return True
    if kind == "number":
        return 7
    if ".." in kind:
        least, _, most = kind.partition("..")
        return int(least or most)
    return kind.split("|")[0]


def sample_body(key: str, *, full: bool = True) -> tuple[Any, dict[str, str]]:
    names = dict.fromkeys(re.findall(r"\{(\w+)\}", key), "one")
    body = sample(CALLS[key].body, full=full) if CALLS[key].body else None
    return (body | names if names else body), names


def test_the_table_is_whole() -> None:
    kinds = [kind for fields in MESSAGES.values() for kind in fields.values()]
    kinds += [kind for call in CALLS.values() for kind in (call.body, call.answer) if kind]
    for kind in kinds:
        inner = kind.removesuffix("!").strip("[]")
        plain = ("text", "number", "truth", "any")
        assert inner in MESSAGES or inner in plain or "|" in inner or ".." in inner, kind
    assert {call.legal for call in CALLS.values()} == {BEFORE, AFTER, ALWAYS}
    assert CALLS.keys() >= PARTIAL | FRESH | PAUSED
    actions = MESSAGES["InstanceActionInfo"]["action_type"].removesuffix("!").split("|")
    assert sorted(ACTIONS) == sorted(actions)
    reached = {kind.removesuffix("!").strip("[]") for kind in kinds}
    assert MESSAGES.keys() - reached == {"Error"}


@pytest.mark.parametrize("key", CALLS)
def test_every_call(key: str) -> None:
    """It is found by its path; its fields may all be there, or only those required; without one of
    these, with one that is unknown, or of a wrong kind, it is refused by name."""
    method, _, form = key.partition(" ")
    path = re.sub(r"\{\w+\}", "one", form)
    found = find_call(method, path)
    body, names = sample_body(key)
    assert found == (key, names)
    assert find_call("DELETE", path) is None
    assert find_faults(key, body, names) == []
    assert bool(find_faults(key, None, names)) == bool(CALLS[key].body and not CALLS[key].may_lack)
    if CALLS[key].body not in MESSAGES:
        assert find_faults(key, {"x": 1}, names) == ([] if CALLS[key].body else NO_BODY)
        return
    assert find_faults(key, sample_body(key, full=False)[0], names) == []
    assert find_faults(key, body | {"odd": 1}, names) == ["odd is unknown"]
    for name, kind in MESSAGES[CALLS[key].body].items():
        lacking = {field: value for field, value in body.items() if field != name}
        expected = [f"{name} is missing"] if kind.endswith("!") and key not in PARTIAL else []
        if name in names:
            expected.append(f"{name} is not 'one', as in the path")
        assert find_faults(key, lacking, names) == expected
        if kind != "any":
            assert any(name in fault for fault in find_faults(key, body | {name: 1.5}, names))


NO_BODY = ["there may be no body"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"vcpu_count": 33}, "vcpu_count is not in 1..32"),
        ({"vcpu_count": 0}, "vcpu_count is not in 1..32"),
        ({"vcpu_count": True}, "vcpu_count is no whole number"),
        ({"huge_pages": "1G"}, "huge_pages is none of None|Transparent|2M"),
        ({"smt": "no"}, "smt is neither true nor false"),
    ],
)
def test_values(change: dict[str, Any], fault: str) -> None:
    body = {"vcpu_count": 1, "mem_size_mib": 128} | change
    assert find_faults("PUT /machine-config", body, {}) == [fault]


def test_faults_are_named_by_their_place() -> None:
    body = {"cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers": [{}]}]}
    faults = find_faults("PUT /cpu-config", body, {})
    where = "cpuid_modifiers[0].modifiers[0]"
    assert faults == [f"{where}.register is missing", f"{where}.bitmap is missing"]
    assert find_faults("PUT /cpu-config", [], {}) == ["the body is no object"]
    assert find_faults("PUT /cpu-config", {"msr_modifiers": {}}, {}) == ["msr_modifiers is no list"]


def test_when_what_is_legal() -> None:
    for key, call in CALLS.items():
        for started in (False, True):
            if key != "PUT /actions":
                expected = call.legal in (ALWAYS, AFTER if started else BEFORE)
                assert is_legal(key, None, started=started) == expected
    for action, legal in ACTIONS.items():
        body = {"action_type": action}
        assert is_legal("PUT /actions", body, started=False) == (legal == BEFORE)
        assert is_legal("PUT /actions", body, started=True) == (legal == AFTER)


def test_answers_may_say_more_than_is_known() -> None:
    body = sample("InstanceInfo")
    assert find_answer_faults("GET /", body | {"newer": 1}) == []
    assert find_answer_faults("GET /", {"state": "Gone"}) != []
    assert find_answer_faults("PUT /vsock", None) == []


@pytest.mark.parametrize("plan", [PLAN, Plan(144 << 20, 1)])
def test_what_the_driver_says_is_in_the_contract(plan: Plan) -> None:
    """Each call is known and right, and legal when it comes."""
    started = False
    for method, path, body in [*make_requests(plan), snapshot_request()]:
        found = find_call(method, path)
        assert found is not None, path
        assert find_faults(found[0], body, found[1]) == []
        assert is_legal(found[0], body, started=started)
        started = started or path == "/actions"
    for method, path, body in (*load_requests(plan), *trial_requests(plan, "x")):
        found = find_call(method, path)
        assert found is not None and find_faults(found[0], body, found[1]) == []
        assert is_legal(found[0], body, started=False)
