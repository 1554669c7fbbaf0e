from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.model import App, AppName, Class, NodeName, Placement, Reactive, Resources
from tabane.scheduler.engines import EngineView
from tabane.scheduler.placement import NodeView, floors, home_of, place
from tabane.scheduler.quotas import Account, Quota, Usage

NODES = [NodeName(f"tokyo/tokyo-{number}") for number in range(5)]
APPS = [AppName(f"default/app-{number}") for number in range(500)]


def view(name: str = "tokyo-1", *, instances: int = 0, memory: int | None = None) -> NodeView:
    node = NodeName(f"tokyo/{name}")
    return NodeView(node, (EngineView("runc", Class.CONTAINER),), instances, memory)


def app(**changes: object) -> App:
    return App(name="hello", image="host", **changes)


def test_without_nodes_there_is_no_home() -> None:
    assert home_of(APPS[0], []) is None


def test_every_node_computes_the_same_home() -> None:
    for key in APPS:
        assert home_of(key, NODES) == home_of(key, reversed(NODES)) == home_of(key, iter(NODES))


def test_homes_are_spread_over_the_nodes() -> None:
    counts = Counter(home_of(key, NODES) for key in APPS)
    assert set(counts) == set(NODES)
    assert min(counts.values()) > len(APPS) / len(NODES) / 2


def test_when_a_node_goes_only_its_own_apps_move() -> None:
    gone, *left = NODES
    for key in APPS:
        before = home_of(key, NODES)
        if before != gone:
            assert home_of(key, left) == before


def test_homes_do_not_change_with_the_version_of_the_code() -> None:
    assert [home_of(key, NODES) for key in APPS[:4]] == [
        "tokyo/tokyo-2",
        "tokyo/tokyo-4",
        "tokyo/tokyo-1",
        "tokyo/tokyo-0",
    ]


def test_an_instance_goes_where_the_fewest_of_its_app_are() -> None:
    nodes = [view("tokyo-1", instances=1), view("tokyo-2", instances=9)]
    assert place(app(), nodes, {nodes[0].name: 1}).node == nodes[1].name


def test_then_where_the_fewest_are_in_all_then_by_name() -> None:
    crowded, quiet = view("tokyo-1", instances=3), view("tokyo-2", instances=2)
    assert place(app(), [crowded, quiet], {}).node == quiet.name
    assert place(app(), [view("tokyo-2"), view("tokyo-1")], {}).node == "tokyo/tokyo-1"


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (app(isolation=Class.VM), "has no working driver for class vm"),
        (app(driver="crun"), "has no working driver crun"),
        (app(placement=Placement(("osaka",))), "may not run in tokyo"),
        (
            app(pinned_to=NodeName("osaka/osaka-1")),
            "does not have the app's volumes, which are on osaka/osaka-1",
        ),
        (
            app(resources=Resources(memory_bytes=300 << 20)),
            "has 200 MiB of memory available, 300 are needed",
        ),
    ],
)
def test_a_node_that_cannot_run_it_says_why(wanted: App, reason: str) -> None:
    choice = place(wanted, [view(memory=200 << 20)], {})
    assert choice.node is None
    assert choice.reasons == (f"tokyo/tokyo-1: {reason}",)


def test_idle_instances_leave_where_nothing_else_is_free() -> None:
    wanted = app(resources=Resources(memory_bytes=300 << 20))
    tight = msgspec.structs.replace(view("tokyo-1", memory=200 << 20), memory_idle_bytes=100 << 20)
    choice = place(wanted, [tight], {})
    assert choice.node == "tokyo/tokyo-1"
    assert choice.reasons[0].endswith(", idle ones leave for it")
    free = view("tokyo-2", instances=100, memory=300 << 20)
    assert place(wanted, [tight, free], {}).node == "tokyo/tokyo-2"
    tighter = msgspec.structs.replace(tight, memory_idle_bytes=99 << 20)
    choice = place(wanted, [tighter], {})
    assert choice.node is None
    said = "has 200 MiB of memory available, and 99 that idle instances would free, 300 are needed"
    assert choice.reasons == (f"tokyo/tokyo-1: {said}",)
    assert choice.crowded


def test_only_where_memory_is_all_that_is_missing_may_there_be_a_place_soon() -> None:
    wanted = app(resources=Resources(memory_bytes=300 << 20))
    full, other = view("tokyo-1", memory=200 << 20), view("tokyo-2", memory=1 << 30)
    assert place(wanted, [full], {}).crowded
    assert not place(wanted, [other], {}, {other.name: "9 starts wait there"}).crowded
    assert not place(wanted, [full], {}, {full.name: "9 starts wait there"}).crowded
    assert not place(app(isolation=Class.VM), [full], {}).crowded


def test_a_layer_in_memory_needs_memory() -> None:
    wanted = app(resources=Resources(memory_bytes=100 << 20, disk_bytes=101 << 20))
    outside = view(memory=200 << 20)
    (engine,) = outside.engines
    beside = msgspec.structs.replace(engine, layer_in_memory=True)
    inside = msgspec.structs.replace(outside, engines=(beside,))
    assert place(wanted, [outside], {}).node == outside.name
    assert place(wanted, [inside], {}).reasons == (
        "tokyo/tokyo-1: has 200 MiB of memory available, 201 are needed for memory and disk",
    )
    enough = msgspec.structs.replace(inside, memory_available_bytes=201 << 20)
    assert place(wanted, [enough], {}).node == inside.name


def test_memory_that_is_not_known_is_no_reason_to_refuse() -> None:
    assert place(app(), [view(memory=None)], {}).node == "tokyo/tokyo-1"


def test_every_node_looked_at_is_explained() -> None:
    nodes = [view("tokyo-1", instances=4), NodeView(NodeName("tokyo/tokyo-2"))]
    choice = place(app(), nodes, {nodes[0].name: 2})
    assert choice.reasons == (
        "tokyo/tokyo-1: can run it with runc, has 2 of this app, 4 in all",
        "tokyo/tokyo-2: has no working driver for class container",
    )


@given(
    st.integers(0, 50),
    st.sets(st.sampled_from(["tokyo", "osaka", "ishikari", "naha"])),
    st.sets(st.sampled_from(["tokyo", "osaka", "ishikari"]), min_size=1),
)
def test_min_is_spread_evenly_over_the_allowed_data_centers(
    low: int, live: set[str], allowed: set[str]
) -> None:
    wanted = app(reactive=Reactive(min=low), placement=Placement(tuple(allowed)))
    shares = floors(wanted, live, {})
    assert set(shares) == live & allowed
    if shares:
        assert sum(shares.values()) == low
        assert max(shares.values()) - min(shares.values()) <= 1


def test_a_data_center_that_may_not_run_it_has_no_share() -> None:
    wanted = app(reactive=Reactive(min=3), placement=Placement(("osaka",)))
    assert floors(wanted, ["tokyo", "osaka"], {}) == {"osaka": 3}
    assert floors(wanted, ["tokyo"], {"tokyo": 1}) == {}


@given(
    st.integers(0, 50),
    st.dictionaries(st.sampled_from(["tokyo", "osaka", "naha"]), st.integers(0, 20)),
)
def test_min_is_never_exceeded_and_keeps_what_runs(low: int, ready: dict[str, int]) -> None:
    live = ["ishikari", "osaka", "tokyo"]
    shares = floors(app(reactive=Reactive(min=low)), live, ready)
    assert sum(shares.values()) == low
    there = sum(ready.get(dc, 0) for dc in live)
    started = sum(max(0, shares[dc] - ready.get(dc, 0)) for dc in live)
    assert started == max(0, low - there), "none is started that need not be"


def test_those_that_run_have_their_share_first() -> None:
    wanted = app(reactive=Reactive(min=2))
    live = ["ishikari", "osaka", "tokyo"]
    assert floors(wanted, live, {"tokyo": 1}) == {"ishikari": 1, "osaka": 0, "tokyo": 1}
    assert floors(wanted, live, {"tokyo": 2}) == {"ishikari": 0, "osaka": 0, "tokyo": 2}
    assert floors(wanted, live, {"tokyo": 5, "osaka": 5}) == {
        "ishikari": 0,
        "osaka": 1,
        "tokyo": 1,
    }


def test_instances_are_spread_over_kernels_before_nodes() -> None:
    """Nodes of one machine share its kernel: its end takes all of them along."""
    first, second = (msgspec.structs.replace(view(name), kernel="one") for name in ("a", "b"))
    other = msgspec.structs.replace(view("c", instances=9), kernel="two")
    assert place(app(), [first, second, other], {first.name: 1}).node == other.name
    assert place(app(), [first, second, other], {first.name: 1, other.name: 1}).node == second.name


def test_a_node_that_declined_lately_and_one_where_its_owner_has_enough_are_passed_over() -> None:
    account = Account(Quota(instances=2), Usage(instances=2))
    full = msgspec.structs.replace(view("a"), accounts={1000: account})
    busy, last = view("b"), view("c", instances=9)
    told = msgspec.msgpack.decode(msgspec.msgpack.encode(full), type=NodeView)
    declined = {busy.name: "300 starts wait on it already"}
    choice = place(app(owner=1000), [told, busy, last], {}, declined)
    assert choice.node == last.name
    assert choice.reasons[:2] == (
        "tokyo/a: user 1000 has 2 instances on it, and may have 2",
        "tokyo/b: 300 starts wait on it already",
    )
    assert place(app(owner=7), [told], {}).node == full.name


def test_of_equal_nodes_the_one_with_a_checkpoint_begins_it() -> None:
    nodes = [view("tokyo-1"), view("tokyo-2", instances=5)]
    saved = {nodes[1].name}
    choice = place(app(), nodes, {}, saved=saved)
    assert choice.node == nodes[1].name
    assert choice.reasons[1].endswith("5 in all, and a checkpoint of it")
    assert place(app(), nodes, {nodes[1].name: 1}, saved=saved).node == nodes[0].name
