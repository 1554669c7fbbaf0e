"""Who may do what, as a table: no process is looked at."""

import os
from typing import Any

import pytest

from tabane.errors import Denied, NotFound, Stale, TabaneError, UsageError
from tabane.k2i import orders
from tabane.k2i.orders import UNLIMITED, Affinity, Gpid, Limit, Limits, Nice, Order, Signal
from tabane.k2i.permission import (
    Here,
    Seen,
    check_address,
    check_cpus,
    check_identity,
    check_order,
    check_permission,
    new_limit,
    new_nice,
)
from tabane.model import NodeName
from tabane.security.identity import Principal

HERE = Here(NodeName("tokyo/tokyo-1"), "now")
TARGET = Gpid("tokyo", "tokyo-1", "now", 7, 100)
ROOT = Principal("peer", 0, 0)
TOKEN = Principal("token")
ALICE, BOB = Principal("peer", 5001, 5001), Principal("peer", 5002, 5002)
TERM = Signal(15)


def seen(**what: Any) -> Seen:
    known = {
        "pid": 7,
        "start_ticks": 100,
        "name": "httpd",
        "state": "S",
        "ppid": 1,
        "nice": 0,
        "uids": (5001, 5001, 5001),
        "gids": (5001, 5001, 5001),
    }
    return Seen(**(known | what))


def refusal(order: Order, who: Principal, **what: Any) -> str:
    """Why it is refused; empty when it is not."""
    try:
        check_permission(order, TARGET, seen(**what), who)
    except Denied as error:
        return error.message
    return ""


@pytest.mark.parametrize(
    ("target", "error", "problem"),
    [
        (Gpid("tokyo", "tokyo-1", "", 7, 100), UsageError, "say also its node's incarnation"),
        (Gpid("tokyo", "tokyo-1", "now", 7, 0), UsageError, "and its start_ticks"),
        (Gpid("tokyo", "tokyo-2", "now", 7, 100), NotFound, "not here: this is tokyo/tokyo-1"),
        (Gpid("", "", "now", 7, 100), NotFound, "7 is not here"),
        (Gpid("tokyo", "tokyo-1", "then", 7, 100), Stale, "tokyo/tokyo-1 was started anew since"),
    ],
)
def test_an_address_is_for_one_life_of_one_node(
    target: Gpid, error: type[TabaneError], problem: str
) -> None:
    check_address(TARGET, HERE)
    with pytest.raises(error, match=problem):
        check_address(target, HERE)


def test_a_pid_with_another_start_time_is_another_process() -> None:
    check_identity(TARGET, seen())
    with pytest.raises(Stale, match="its pid was given to another process, 'httpd'"):
        check_identity(TARGET, seen(start_ticks=101))


def test_one_that_has_ended_takes_no_orders() -> None:
    with pytest.raises(NotFound, match="has ended, and only waits for its parent 1"):
        check_identity(TARGET, seen(state="Z"))


ALL: list[orders.Action] = [
    TERM,
    Nice(5),
    Affinity((0,)),
    Limits({"core": Limit(0)}),
    orders.Pause(),
    orders.Resume(),
]


@pytest.mark.parametrize("action", ALL, ids=orders.name_of)
def test_who_may_touch_a_process(action: orders.Action) -> None:
    order = Order((TARGET,), action)
    assert not refusal(order, ROOT)
    assert not refusal(order, TOKEN)
    assert not refusal(order, ALICE)
    assert "is another user's process (uid 5001)" in refusal(order, BOB)
    assert "another user's" in refusal(order, Principal("peer", -1))
    assert not refusal(order, BOB, owner=5002)


@pytest.mark.parametrize(
    ("action", "allowed"),
    [
        (TERM, {"real", "saved"}),
        (orders.Pause(), {"real", "saved"}),
        (Nice(5), {"real", "effective"}),
        (Affinity((0,)), {"real", "effective"}),
        (Limits({"core": Limit(0)}), set()),
    ],
)
def test_which_of_its_uids_count_is_as_in_the_kernel(
    action: orders.Action, allowed: set[str]
) -> None:
    order = Order((TARGET,), action)
    for index, kind in enumerate(("real", "effective", "saved")):
        uids = tuple(5001 if index == other else 0 for other in range(3))
        assert bool(refusal(order, ALICE, uids=uids)) == (kind not in allowed), kind


def test_one_with_capabilities_is_signalled_but_not_slowed_down() -> None:
    for action, refused in ((TERM, False), (Nice(5), True), (Affinity((0,)), True)):
        order = Order((TARGET,), action)
        assert ("not only yours" in refusal(order, ALICE, has_capabilities=True)) == refused
        assert not refusal(order, BOB, has_capabilities=True, owner=BOB.uid)
        assert not refusal(order, ROOT, has_capabilities=True)


def test_limits_want_the_groups_to_be_the_same_too() -> None:
    order = Order((TARGET,), Limits({"core": Limit(0)}))
    assert refusal(order, ALICE, gids=(5001, 0, 5001))


def test_what_the_node_needs_is_touched_by_root_with_force_only() -> None:
    what = {"protected": "a kernel thread"}
    order, forced = Order((TARGET,), TERM), Order((TARGET,), TERM, force=True)
    assert "is a kernel thread: only with `--force`" in refusal(order, ROOT, **what)
    assert "only root may touch it" in refusal(order, ALICE, **what)
    assert "only root may touch it" in refusal(forced, ALICE, **what)
    assert not refusal(forced, ROOT, **what)
    assert not refusal(Order((TARGET,), Signal(0)), ROOT, **what)


@pytest.mark.parametrize(
    ("order", "who", "problem"),
    [
        (Order((TARGET,), TERM), Principal("anybody"), "only over a unix socket"),
        (Order((TARGET,), TERM, force=True), ALICE, "force is for root"),
        (Order((), TERM), ROOT, "targets: 0 is not from 1 to 1024"),
        (Order((TARGET,) * 1025, TERM), ROOT, "targets: 1025 is not"),
        (Order((TARGET,), TERM, key="k" * 129), ROOT, "more than 128 characters"),
        (Order((TARGET,), Signal(32)), ROOT, "there is no signal 32"),
        (Order((TARGET,), Signal(-1)), ROOT, "there is no signal -1"),
        (Order((TARGET,), Signal(65)), ROOT, "there is no signal 65"),
        (Order((TARGET,), Nice(20)), ROOT, "20 is not from -20 to 19"),
        (Order((TARGET,), Nice(-21)), ROOT, "-21 is not from -20 to 19"),
        (Order((TARGET,), Nice(40, relative=True)), ROOT, "is more than there is room for"),
        (Order((TARGET,), Limits({})), ROOT, "limits: '' is no resource"),
        (Order((TARGET,), Limits({"files": Limit(1)})), ROOT, "'files' is no resource"),
        (Order((TARGET,), Limits({"core": Limit(-2)})), ROOT, "core: -2 is not from -1"),
        (Order((TARGET,), Limits({"core": Limit(0, 1 << 63)})), ROOT, "core: 9223"),
    ],
)
def test_orders_that_make_no_sense(order: Order, who: Principal, problem: str) -> None:
    with pytest.raises((UsageError, Denied), match=problem):
        check_order(order, who)


def test_orders_that_do() -> None:
    for action in (*ALL, Signal(0), Signal(64), Nice(-20), Nice(19), Nice(-39, relative=True)):
        check_order(Order((TARGET,), action), ALICE)
    check_order(Order((TARGET,) * 1024, TERM, force=True, key="k" * 128), ROOT)


@pytest.mark.parametrize(
    ("action", "before", "after"),
    [
        (Nice(5), 0, 5),
        (Nice(5), 5, 5),
        (Nice(5, relative=True), 3, 8),
        (Nice(15, relative=True), 10, 19),
        (Nice(0, relative=True), -3, -3),
    ],
)
def test_anybody_may_be_nicer(action: Nice, before: int, after: int) -> None:
    assert new_nice(action, before, ALICE) == after


@pytest.mark.parametrize(
    ("action", "before", "after"), [(Nice(-5), 0, -5), (Nice(-30, relative=True), 0, -20)]
)
def test_only_root_may_be_less_nice(action: Nice, before: int, after: int) -> None:
    assert new_nice(action, before, ROOT) == after
    with pytest.raises(Denied, match="only root may lower a nice value"):
        new_nice(action, before, ALICE)


@pytest.mark.parametrize(
    ("wanted", "now", "after"),
    [
        (Limit(5), (10, 20), (5, 20)),
        (Limit(None, 15), (10, 20), (10, 15)),
        (Limit(20, 20), (10, 20), (20, 20)),
        (Limit(5, 8), (10, UNLIMITED), (5, 8)),
        (Limit(UNLIMITED), (10, UNLIMITED), (UNLIMITED, UNLIMITED)),
    ],
)
def test_limits_are_lowered_and_used_by_anybody(
    wanted: Limit, now: tuple[int, int], after: tuple[int, int]
) -> None:
    assert new_limit("core", wanted, now, ALICE) == after


@pytest.mark.parametrize("hard", [21, UNLIMITED])
def test_hard_limits_are_raised_by_root(hard: int) -> None:
    assert new_limit("core", Limit(None, hard), (10, 20), ROOT) == (10, hard)
    with pytest.raises(Denied, match="only root may raise a hard limit"):
        new_limit("core", Limit(None, hard), (10, 20), ALICE)


@pytest.mark.parametrize("wanted", [Limit(21), Limit(UNLIMITED), Limit(None, 5), Limit(7, 6)])
def test_a_soft_limit_is_never_above_the_hard_one(wanted: Limit) -> None:
    with pytest.raises(UsageError, match="would be above its hard limit"):
        new_limit("core", wanted, (10, 20), ROOT)


def test_cpus_are_those_that_are_there() -> None:
    assert check_cpus(Affinity((1, 0, 1)), [0, 1]) == {0, 1}
    with pytest.raises(UsageError, match=r"CPUs: 2 cannot be used here \(there are 0, 1\)"):
        check_cpus(Affinity((0, 2)), [0, 1])
    with pytest.raises(UsageError, match="CPUs: none cannot be used"):
        check_cpus(Affinity(()), [0, 1])


def test_who_runs_a_k2i_may_do_what_the_kernel_lets_it() -> None:
    assert not refusal(Order((TARGET,), TERM, force=True), Principal("peer", os.geteuid()))
