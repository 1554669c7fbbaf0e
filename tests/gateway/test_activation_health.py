"""Instances whose checks fail: no new sessions, another in their place, and pauses in between."""

from tabane.gateway.activation import FloorChanged, InstanceEnded, StopAsked
from tabane.gateway.setbacks import BACKOFF_FIRST_S, HEALTHY_S
from tabane.model import App, InstanceId
from tabane.reactions import Health
from tabane.testing.home import NODE, Decided, HandledHome

WHY = "unhealthy: GET / is answered 500, 3 times in a row"
HEALTH = Health(http="/", interval_s=10.0, timeout_s=2.0)


def checked() -> HandledHome:
    """`i1` is ready, `g1` holds a slot of it."""
    home = HandledHome(App("hello", "host", port=8000, revision=1, health=HEALTH))
    home.demand("g1", 1)
    home.ready("i1")
    return home


def hung(home: HandledHome, instance: str) -> Decided:
    return home.handle(StopAsked(home.app.key, InstanceId(instance), WHY, hung=True))


def ended(home: HandledHome, instance: str) -> Decided:
    return home.handle(InstanceEnded(home.app.key, InstanceId(instance), NODE, WHY, failed=True))


def test_its_slots_are_had_back_and_the_next_session_gets_another() -> None:
    home = checked()
    home.wait(HEALTHY_S + HEALTH.verdict_s)
    decided = hung(home, "i1")
    assert decided.revokes == [("g1", "i1", None)]
    decided = home.demand("g2", 1)
    assert (decided.grants, decided.starts) == ([], ["i2"])
    assert home.ready("i2").grants == [("g2", "i2", 1)]


def test_nobody_wants_it_and_none_is_started() -> None:
    home = checked()
    hung(home, "i1")
    assert ended(home, "i1").starts == []


def test_what_is_to_be_kept_is_replaced_at_once() -> None:
    home = checked()
    home.handle(FloorChanged(home.app.key, 1))
    assert hung(home, "i1").starts == ["i2"]


def test_one_that_never_was_well_is_a_setback_and_counts_once() -> None:
    """Its checks took longer to find that than others take to show that starts work."""
    home = checked()
    home.wait(HEALTH.verdict_s - 1.0)
    hung(home, "i1")
    assert home.ledger.setbacks.early_ends == 1
    ended(home, "i1")
    assert home.ledger.setbacks.early_ends == 1
    home.demand("g2", 1)
    home.ready("i2")
    home.wait(HEALTH.verdict_s - 1.0)
    hung(home, "i2")
    assert home.ledger.setbacks.early_ends == 2
    assert home.ledger.setbacks.left_s(home.now) == 2 * BACKOFF_FIRST_S
    assert home.demand("g3", 1).starts == []


def test_one_that_was_well_for_long_is_none() -> None:
    home = checked()
    home.wait(HEALTHY_S + HEALTH.verdict_s)
    hung(home, "i1")
    ended(home, "i1")
    assert home.ledger.setbacks.count == 0


def test_its_home_heard_of_its_end_only() -> None:
    home = checked()
    home.wait(HEALTH.verdict_s - 1.0)
    ended(home, "i1")
    assert home.ledger.setbacks.early_ends == 1
