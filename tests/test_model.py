from __future__ import annotations

import signal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.model import (
    App,
    Class,
    ExitStatus,
    Generation,
    Instance,
    InstanceId,
    Node,
    NodeName,
    Placement,
    Reactive,
    Resources,
    State,
    Value,
    WakeRecord,
    new_instance_id,
)

HELLO = App(name="hello", image="host", command=("httpd", "-f"), port=8000, hosts=("hello.test",))
GENERATION = Generation("boot-1", InstanceId("0123456789ab"), 3)
INSTANCE = Instance(
    id=GENERATION.instance,
    app=HELLO.key,
    revision=2,
    node=NodeName("tokyo/tokyo-1"),
    generation=GENERATION,
    state=State.READY,
)
WAKE = WakeRecord(
    app=HELLO.key,
    revision=2,
    instance=GENERATION.instance,
    node=INSTANCE.node,
    gateway="tokyo-1",
    option="cold",
    at=1_700_000_000.0,
    phases_us={"queue": 12, "engine": 30_000},
    total_us=31_000,
)
NODE = Node("tokyo-1", "tokyo", "10.0.0.1", "boot-1")
VALUES = [HELLO, GENERATION, INSTANCE, WAKE, NODE, ExitStatus(signal=9)]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_comes_back_from_the_wire_as_it_went(value: Value) -> None:
    for codec in (msgspec.json, msgspec.msgpack):
        assert codec.decode(codec.encode(value), type=type(value)) == value


@given(st.builds(Reactive), st.builds(Resources), st.builds(Placement))
def test_any_policy_survives_the_wire(
    reactive: Reactive, resources: Resources, placement: Placement
) -> None:
    app = App("any", "host", reactive=reactive, resources=resources, placement=placement)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(app), type=App) == app


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_cannot_be_changed(value: Value) -> None:
    with pytest.raises(AttributeError):
        setattr(value, value.__struct_fields__[0], "other")


def test_what_has_its_default_is_not_sent() -> None:
    assert msgspec.json.decode(msgspec.json.encode(App("a", "host"))) == {
        "name": "a",
        "image": "host",
    }


def test_keys_name_the_namespace_and_the_datacenter() -> None:
    assert HELLO.key == "default/hello"
    assert NODE.key == "tokyo/tokyo-1"


def test_classes_are_listed_from_weakest_to_strongest() -> None:
    assert list(Class) == ["container", "sandbox", "unikernel", "microvm", "vm", "auto"]


def test_placement_allows_all_or_those_named() -> None:
    assert Placement().allows("tokyo")
    assert Placement(("osaka",)).allows("osaka")
    assert not Placement(("osaka",)).allows("tokyo")
    assert not Placement(()).allows("tokyo")


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (ExitStatus(), "exited with code 0"),
        (ExitStatus(code=3), "exited with code 3"),
        (ExitStatus(signal=signal.SIGTERM), "killed by SIGTERM"),
        (ExitStatus(signal=signal.SIGKILL, oom=True), "killed by SIGKILL (out of memory)"),
        (ExitStatus(signal=200), "killed by signal 200"),
    ],
)
def test_how_a_process_ended_in_words(status: ExitStatus, text: str) -> None:
    assert status.describe() == text


def test_instance_ids_are_short_fresh_and_free_of_place() -> None:
    ids = {new_instance_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(name) == 12 and int(name, 16) >= 0 for name in ids)
