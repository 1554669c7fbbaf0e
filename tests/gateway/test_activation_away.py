"""When an app's home has an instance put away, and how that very one goes on."""

from __future__ import annotations

from msgspec.structs import replace

from tabane.gateway.activation import (
    GatewayJoined,
    InstanceAwake,
    InstanceEnded,
    InstanceReady,
    NodeReport,
    Start,
    StopAsked,
)
from tabane.gateway.events import PutAway, SavedThere
from tabane.gateway.instructions import Save
from tabane.gateway.messages import Grant, StartTrace
from tabane.model import InstanceId, NodeName, State
from tabane.scheduler.placement import Choice
from tabane.testing.home import NODE, Decided, HandledHome

I1 = InstanceId("i1")
AWAY_S, STOP_S = 5.0, 60.0


def orders(decided: Decided) -> list[tuple[InstanceId, int, bool]]:
    return [(one.instance, one.number, one.ends) for one in decided if isinstance(one, Save)]


def resumes(decided: Decided) -> list[tuple[InstanceId, bool]]:
    return [(one.instance, one.resume) for one in decided if isinstance(one, Start)]


def ready(home: HandledHome, name: str, trace: StartTrace | None = None) -> Decided:
    instance = replace(home.instance(name), puttable=True)
    return home.handle(InstanceReady(instance, trace))


def idle(**reactive: object) -> HandledHome:
    limits = {"checkpoint_after_s": AWAY_S, "stop_after_s": STOP_S} | reactive
    home = HandledHome(**limits)
    home.demand("g1", 1)
    ready(home, "i1")
    home.returned("g1", "i1", 1)
    return home


def going(**reactive: object) -> HandledHome:
    """It is being put away."""
    home = idle(**reactive)
    assert orders(home.wait(AWAY_S))[-1:] == [(I1, home.ledger.instances[I1].freezes, True)]
    return home


def ended(home: HandledHome, after_s: float | None = 0.0, *, failed: bool = False) -> Decided:
    end = InstanceEnded(home.app.key, I1, NODE, "why", failed, kept_after_s=after_s)
    return home.handle(end)


def away(**reactive: object) -> HandledHome:
    home = going(**reactive)
    assert ended(home).releases == [I1]
    return home


def awake(home: HandledHome, again_s: float | None = None, reason: str = "") -> Decided:
    told = home.app.key, I1, home.ledger.instances[I1].freezes
    awake = InstanceAwake(*told, used=False, again_s=again_s, reason=reason, ends=True)
    return home.handle(awake)


def test_it_is_put_away_in_time_and_the_next_session_has_that_very_one_go_on() -> None:
    home = idle()
    assert home.wait(AWAY_S - 0.01) == []
    assert orders(home.wait(0.02)) == [(I1, 1, True)]
    ended(home)
    decided = home.demand("g1", 1)
    assert resumes(decided) == [(I1, True)]
    assert home.ledger.away == {}
    ((_, grant),) = ready(home, "i1").told(Grant)
    assert grant.instance == I1


def test_what_is_frozen_is_put_away_too() -> None:
    home = idle(freeze_after_s=1.0)
    assert home.wait(2.0).freezes == [I1]
    assert orders(home.wait(AWAY_S)) == [(I1, 2, True)]


def test_without_a_wish_or_an_engine_for_it_nothing_is_put_away() -> None:
    assert orders(idle(checkpoint_after_s=None).wait(STOP_S - 1.0)) == []
    home = HandledHome(checkpoint_after_s=AWAY_S, stop_after_s=STOP_S)
    home.demand("g1", 1)
    home.ready("i1")
    home.returned("g1", "i1", 1)
    assert orders(home.wait(STOP_S - 1.0)) == []


def test_nobody_gets_a_slot_of_it_before_its_node_has_said_what_became_of_it() -> None:
    home = going()
    decided = home.demand("g1", 1)
    assert (decided.thaws, decided.grants, decided.starts) == ([I1], [], [])
    assert home.demand("g2", 1).thaws == []
    assert [(one, slots) for _, one, slots in awake(home).grants] == [(I1, 1), (I1, 1)]


def test_a_session_that_came_too_late_has_it_go_on_from_there() -> None:
    home = going()
    home.demand("g1", 1)
    decided = ended(home)
    assert (decided.releases, resumes(decided)) == ([I1], [(I1, True)])


def test_more_sessions_than_it_can_take_start_others_meanwhile() -> None:
    home = going(concurrency=1, max=3)
    decided = home.demand("g1", 3)
    assert (decided.thaws, len(decided.starts)) == ([I1], 2)
    home = going(concurrency=1, max=1)
    assert home.demand("g1", 3).starts == []


def test_what_could_not_be_put_away_is_tried_again_when_its_node_says_or_never() -> None:
    home = going()
    awake(home, again_s=2.0, reason="the disk is full")
    assert home.ledger.unsaved == "the disk is full"
    assert orders(home.wait(1.9)) == []
    assert orders(home.wait(0.2)) == [(I1, 2, True)]
    awake(home)
    decided = home.wait(STOP_S)
    assert (orders(decided), decided.stops) == ([], {I1: "idle for 60 s"})


def test_the_floor_is_not_put_away() -> None:
    home = idle(min=1)
    home.ledger.floor = 1
    assert orders(home.wait(STOP_S)) == []


def test_what_is_put_away_is_gone_by_stop_after_and_by_a_new_revision() -> None:
    home = away()
    assert home.wait(STOP_S - AWAY_S - 0.1) == []
    assert home.wait(0.2).stops == {I1: "put away, and idle for 60 s"}
    assert resumes(home.demand("g1", 1)) == [(InstanceId("i2"), False)]
    home = away()
    assert home.redeploy().stops == {I1: "replaced by revision 2"}
    home = away()
    home.handle(NodeReport(NODE, (), home.now, SavedThere((put_away(revision=7),))))
    assert home.redeploy().stops == {I1: "replaced by revision 2"}
    assert InstanceId("new") in home.ledger.away  # of a revision that is not known here yet


def put_away(name: str = "new", revision: int = 1, age_s: float = 1.0) -> PutAway:
    return PutAway(HandledHome().app.key, InstanceId(name), revision, age_s)


def test_where_it_cannot_go_on_another_begins_and_its_record_says_why() -> None:
    home = away()
    home.node = None
    pinned: list[str] = []

    def place(app: object, declines: object) -> Choice:
        pinned.append(app.pinned_to)  # type: ignore[attr-defined]
        return Choice(None if pinned[-1] else NodeName("tokyo/tokyo-2"), ("no memory",))

    home.activation._place = place  # type: ignore[assignment]
    decided = home.demand("g1", 1)
    assert pinned[:2] == [NODE, ""]
    assert resumes(decided) == [(InstanceId("i2"), False)]
    ((_, grant),) = home.ready("i2", trace=StartTrace({}, 1)).told(Grant)
    assert grant.trace is not None
    assert grant.trace.note == "i1 is put away on tokyo/tokyo-1, which cannot run it now"
    assert I1 in home.ledger.away


def test_one_that_did_not_go_on_is_kept_and_left_alone_for_a_while() -> None:
    home = away()
    home.demand("g1", 1)
    decided = ended(home, after_s=2.0)
    assert resumes(decided) == [(InstanceId("i2"), False)]
    assert home.ledger.setbacks.count == 0
    ((_, grant),) = home.ready("i2", trace=StartTrace({}, 1, note="cold")).told(Grant)
    assert grant.trace is not None
    assert grant.trace.note == "i1, which is put away, is left alone: why; cold"
    home.stopped("i2")
    home.wait(2.0)
    home.returned("g1", "i2", 1)
    assert resumes(home.demand("g1", 1)) == [(I1, True)]


def test_one_that_is_lost_is_told_of_in_the_record_of_the_next() -> None:
    home = away()
    home.demand("g1", 1)
    assert resumes(ended(home, after_s=None)) == [(InstanceId("i2"), False)]
    ((_, grant),) = home.ready("i2", trace=StartTrace({}, 1)).told(Grant)
    assert grant.trace is not None and grant.trace.note == "i1 was put away, and is lost: why"


def test_its_address_is_free_before_it_goes_on() -> None:
    home = going()
    home.handle(GatewayJoined("g9"))  # it may hold slots that nobody here knows of
    assert ended(home).releases == []
    assert home.demand("g1", 1).starts == []
    decided = home.report("g9")
    assert (decided.releases, resumes(decided)) == ([I1], [(I1, True)])


def test_a_new_home_learns_what_is_put_away() -> None:
    home = away()
    home.restart()
    home.deploy()
    there = SavedThere((put_away("i1", age_s=20.0),))
    home.handle(NodeReport(NODE, (), home.now, there))
    assert home.wait(STOP_S - 21.0) == []
    assert home.wait(2.0).stops == {I1: "put away, and idle for 60 s"}


def test_a_word_that_was_lost_is_made_good_by_what_the_node_reports() -> None:
    for named in ((), (State.STOPPING,), (State.ABSENT,)):
        home = going()
        home.wait(1.0)
        found = tuple(home.instance("i1", state) for state in named)
        home.handle(NodeReport(NODE, found, home.now, SavedThere((put_away("i1"),))))
        home.demand("g1", 1)
        if State.STOPPING in named:
            ended(home)
        assert home.ledger.away == {} and home.ledger.instances[I1].state is State.STARTING


def test_a_report_that_does_not_name_it_says_that_it_is_gone() -> None:
    home = away()
    asked_at = home.now
    home.wait(1.0)
    home.handle(NodeReport(NODE, (), asked_at))
    assert I1 in home.ledger.away  # put away since then
    home.handle(NodeReport(NODE, (), home.now))
    assert home.ledger.away == {}


def test_a_new_home_that_finds_one_being_put_away_waits_for_its_node() -> None:
    home = going()
    home.restart()
    home.deploy()
    found = replace(home.instance("i1"), state=State.CHECKPOINTING, freezes=1, puttable=True)
    home.handle(NodeReport(NODE, (found,), home.now))
    decided = home.demand("g1", 1)
    assert (decided.thaws, decided.grants, decided.starts) == ([I1], [], [])
    assert resumes(ended(home)) == [(I1, True)]


def test_a_person_stops_one_that_is_being_put_away() -> None:
    home = going()
    assert home.handle(StopAsked(home.app.key, I1)).stops == {I1: "stopped by request"}


def test_copies_that_nodes_have_are_known() -> None:
    home = idle()
    key, other = home.app.key, NodeName("tokyo/tokyo-2")
    home.handle(NodeReport(other, (), home.now, SavedThere(copies=((key, 1), (key, 0)))))
    assert home.activation.nodes_with_copy(home.app) == {other}
    home.handle(InstanceAwake(key, I1, 0, used=False, saved=True))
    assert home.activation.nodes_with_copy(home.app) == {other, NODE}
    ready(home, "i9", StartTrace({}, 1, "cold", "its checkpoint is refused: older"))
    assert home.activation.nodes_with_copy(home.app) == {other}
    ready(home, "i8", StartTrace({}, 1, "restore"))
    home.handle(NodeReport(other, (), home.now))
    assert home.activation.nodes_with_copy(home.app) == {NODE}
