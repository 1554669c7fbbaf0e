"""An app that is removed or deployed anew."""

import pytest

from tabane.gateway.activation import AppChanged, FloorChanged, GatewayJoined
from tabane.gateway.messages import Grant
from tabane.model import Placement, Reactive
from tabane.testing.home import HandledHome


def running(*gateways: str, **reactive: object) -> HandledHome:
    """`i1` is ready; each of the gateways holds one slot of it."""
    home = HandledHome(**reactive)
    home.demand("first", 1)
    home.ready("i1")
    home.returned("first", "i1", 1)
    for gateway in gateways:
        assert home.demand(gateway, 1).grants == [(gateway, "i1", 1)]
    return home


# Removal


def test_when_the_app_is_removed_all_is_refused_and_drained() -> None:
    home = running("g1", concurrency=1, max=2)
    home.demand("g2", 1)
    home.still_used("g1", "i1")
    decided = home.handle(AppChanged(home.app.key, None))
    assert decided.refusals == [("g2", "gone", 1)]
    assert decided.revokes == [("g1", "i1", None)]
    assert list(decided.stops) == ["i2"]
    assert list(home.returned("g1", "i1", 1).stops) == ["i1"]
    home.stopped("i1")
    home.stopped("i2")
    assert home.activation.apps() == ()
    assert home.wait(1000) == []


def test_a_removed_app_with_a_floor_is_forgotten_too() -> None:
    home = HandledHome()
    home.handle(FloorChanged(home.app.key, 1))
    assert list(home.handle(AppChanged(home.app.key, None)).stops) == ["i1"]
    home.stopped("i1")
    assert home.activation.apps() == ()


def test_sessions_of_an_app_that_is_gone_are_refused() -> None:
    home = HandledHome()
    home.handle(AppChanged(home.app.key, None))
    assert home.demand("g1", 3).refusals == [("g1", "gone", 3)]
    assert home.activation.apps() == ()


def test_where_an_app_may_not_run_any_more_it_is_drained() -> None:
    home = running("g1")
    home.node = None
    assert home.redeploy(placement=Placement(("osaka",))).revokes == [("g1", "i1", None)]
    assert home.returned("g1", "i1", 1).stops == {"i1": "it may not run in tokyo any more"}


# A new revision


def test_the_old_revision_is_drained_only_when_the_new_one_is_ready() -> None:
    home = running("g1", concurrency=10)
    decided = home.redeploy()
    assert (decided.starts, decided.revokes) == (["i2"], [])
    assert home.demand("g2", 1).grants == [("g2", "i1", 1)]
    assert home.ready("i2").revokes == [("g1", "i1", None), ("g2", "i1", None)]
    assert home.demand("g2", 1).grants == [("g2", "i2", 1)]
    home.returned("g1", "i1", 1)
    assert home.returned("g2", "i1", 1).stops == {"i1": "replaced by revision 2"}


def test_max_one_allows_one_more_while_revisions_change() -> None:
    home = running("g1", concurrency=1, max=1)
    assert home.redeploy().starts == ["i2"]
    assert home.demand("g2", 5).starts == []
    assert home.ready("i2").grants == [("g2", "i2", 1)]
    assert home.wait(5).starts == []


def test_only_one_of_a_new_revision_is_tried_before_it_is_ready() -> None:
    home = running("g1", concurrency=1, max=9)
    home.redeploy()
    assert home.demand("g2", 5).starts == []
    assert home.still_used("g1", "i1").starts == []
    assert len(home.ready("i2").starts) == 4


def test_an_instance_keeps_the_port_and_concurrency_of_its_own_revision() -> None:
    home = running("g1", concurrency=1, max=1)
    home.redeploy(port=9000, reactive=Reactive(concurrency=10, max=1))
    assert home.demand("g2", 5).grants == []
    ((_, grant),) = home.returned("g1", "i1", 1).told(Grant)
    assert (grant.port, grant.slots, grant.revision) == (8000, 1, 1)
    ((_, grant),) = home.ready("i2").told(Grant)
    assert (grant.port, grant.slots, grant.revision) == (9000, 4, 2)


def test_a_start_of_the_old_revision_goes_on_until_the_new_one_is_ready() -> None:
    home = HandledHome(concurrency=1, max=1)
    home.demand("g1", 1)
    assert home.redeploy().starts == ["i2"]
    assert home.ready("i2").stops == {"i1": "replaced by revision 2"}


def test_an_old_revision_that_gets_ready_first_serves_meanwhile() -> None:
    home = HandledHome(concurrency=1, max=1)
    home.demand("g1", 1)
    home.redeploy()
    assert home.ready("i1", revision=1).grants == [("g1", "i1", 1)]
    assert home.ready("i2").revokes == [("g1", "i1", None)]


@pytest.mark.parametrize("limit", [1, 5])
def test_many_sessions_during_a_roll_never_exceed_max_by_more_than_one(limit: int) -> None:
    home = HandledHome(concurrency=1, max=limit)
    home.demand("g1", limit)
    for number in range(limit):
        home.ready(f"i{number + 1}")
    home.redeploy()
    home.demand("g1", 100)
    home.wait(5)
    assert len(home.ledger.serving()) + len(home.ledger.starting()) == limit + 1


def test_a_new_revision_waits_until_what_is_above_a_lowered_max_may_be_stopped() -> None:
    home = HandledHome(concurrency=1, max=3)
    home.demand("g1", 3)
    for instance in ("i1", "i2", "i3"):
        home.ready(instance)
    home.handle(GatewayJoined("silent"))
    home.deploy(max=1)
    assert home.redeploy().starts == []
    assert home.report("silent").starts == ["i4"]
    assert len(home.ledger.draining()) == 2


def test_of_too_many_starts_that_of_the_new_revision_is_kept() -> None:
    home = HandledHome(concurrency=1, max=3)
    home.demand("g1", 3)
    assert home.redeploy().starts == ["i4"]
    assert list(home.deploy(max=1).stops) == ["i2", "i3"]
