import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tabane.errors import Busy
from tabane.gateway.grants import FEW_APPS, REST_S, Grants, Lease
from tabane.gateway.messages import (
    Broken,
    Demand,
    Grant,
    Held,
    Refuse,
    Returned,
    Revoke,
    StillUsed,
    encode,
    parse_to_gateway,
    parse_to_home,
)
from tabane.model import AppName, Generation, InstanceId, NodeName

APP = AppName("default/hello")
OTHER = AppName("default/other")
I1, I2 = InstanceId("i1"), InstanceId("i2")
EPOCH = 40


@pytest.fixture
def grants() -> Grants[str]:
    return Grants(EPOCH)


def grant(
    slots: int, answered: int, *, instance: str = "i1", epoch: int = EPOCH, app: AppName = APP
) -> Grant:
    generation = Generation("incarnation", InstanceId(instance), 1)
    node = NodeName("tokyo/tokyo-1")
    return Grant(app, 1, generation, node, "10.0.0.1", 8000, slots, epoch, answered)


def revoke(unused_s: float | None, instance: InstanceId = I1) -> Revoke:
    return Revoke(APP, instance, unused_s)


def refuse(sessions: int, answered: int, *, epoch: int = EPOCH) -> Refuse:
    return Refuse(APP, "broken", "it exits", 1.0, sessions, epoch, answered)


def demand(waiting: int, answered_seen: int, waited_s: float = 0.0, epoch: int = EPOCH) -> Demand:
    return Demand(APP, waiting, waited_s, epoch, answered_seen)


def hold(grants: Grants[str], slots: int, used: int, *, instance: str = "i1") -> Lease:
    """A lease with so many slots, of which so many are in use since 100."""
    for number in range(used):
        grants.wait(APP, f"{instance}-{number}", 1000, 100.0)
    served, _ = grants.on_grant(grant(slots, slots, instance=instance), 100.0)
    assert len(served) == used
    lease = next(lease for lease in grants.leases() if lease.instance == instance)
    assert (lease.slots, lease.used) == (slots, used)
    return lease


# Waiting


def test_nothing_is_free_before_the_first_grant(grants: Grants[str]) -> None:
    assert grants.take(APP, 0.0) is None


def test_the_home_learns_how_many_wait_and_how_long_the_first_has(grants: Grants[str]) -> None:
    assert grants.wait(APP, "a", 10, 100.0) == demand(1, 0, 0.0)
    assert grants.wait(APP, "b", 10, 103.0) == demand(2, 0, 3.0)
    assert grants.demand(APP, 105.0) == demand(2, 0, 5.0)
    assert grants.give_up(APP, "a", 105.0) == demand(1, 0, 2.0)


def test_a_full_queue_refuses(grants: Grants[str]) -> None:
    grants.wait(APP, "a", 2, 0.0)
    grants.wait(APP, "b", 2, 0.0)
    with pytest.raises(Busy, match="2 sessions wait for default/hello already"):
        grants.wait(APP, "c", 2, 0.0)
    grants.wait(OTHER, "d", 2, 0.0)
    assert grants.demand(APP, 0.0).waiting == 2


def test_giving_up_leaves_the_others_in_order(grants: Grants[str]) -> None:
    for waiter in "abc":
        grants.wait(APP, waiter, 10, 0.0)
    grants.give_up(APP, "b", 1.0)
    served, _ = grants.on_grant(grant(2, 2), 2.0)
    assert [waiter for waiter, _ in served] == ["a", "c"]


def test_who_does_not_wait_cannot_give_up(grants: Grants[str]) -> None:
    assert grants.give_up(APP, "a", 0.0) is None
    grants.wait(APP, "a", 10, 0.0)
    grants.on_grant(grant(1, 1), 0.0)
    assert grants.give_up(APP, "a", 0.0) is None


# Slots


def test_granted_slots_go_to_who_waits_first_and_the_rest_is_free(grants: Grants[str]) -> None:
    for waiter in "ab":
        grants.wait(APP, waiter, 10, 0.0)
    served, messages = grants.on_grant(grant(3, 3), 1.0)
    lease = served[0][1]
    assert [waiter for waiter, _ in served] == ["a", "b"]
    assert messages == []
    assert grants.take(APP, 1.0) is lease
    assert grants.take(APP, 1.0) is None
    assert lease.used == lease.slots == 3
    assert grants.demand(APP, 1.0) == demand(0, 3)


def test_a_released_slot_goes_to_the_next_who_waits_and_the_home_is_told(
    grants: Grants[str],
) -> None:
    lease = hold(grants, 1, 1)
    grants.wait(APP, "next", 10, 101.0)
    assert grants.release(lease, 102.0) == ([("next", lease)], [demand(0, 1)])
    assert lease.used == 1


def test_a_released_slot_stays_when_nobody_waits(grants: Grants[str]) -> None:
    lease = hold(grants, 1, 1)
    assert grants.release(lease, 102.0) == ([], [])
    assert grants.take(APP, 103.0) is lease


def test_sessions_are_packed_onto_few_instances(grants: Grants[str]) -> None:
    first = hold(grants, 2, 0, instance="i1")
    hold(grants, 2, 0, instance="i2")
    assert [grants.take(APP, 0.0), grants.take(APP, 0.0)] == [first, first]


def test_a_later_grant_adds_slots_to_the_lease(grants: Grants[str]) -> None:
    lease = hold(grants, 2, 2)
    grants.wait(APP, "more", 10, 101.0)
    served, _ = grants.on_grant(grant(1, 3), 101.0)
    assert served == [("more", lease)]
    assert lease.slots == 3


def test_apps_do_not_share_slots(grants: Grants[str]) -> None:
    grants.wait(OTHER, "other", 10, 0.0)
    hold(grants, 2, 0)
    assert grants.demand(OTHER, 0.0).waiting == 1
    assert grants.take(OTHER, 0.0) is None


# Giving back


def test_a_drain_takes_what_is_free_now_and_the_rest_as_sessions_end(grants: Grants[str]) -> None:
    lease = hold(grants, 3, 2)
    assert grants.on_revoke(revoke(None), 110.0) == [Returned(APP, I1, 1, 0.0)]
    assert grants.take(APP, 110.0) is None
    assert grants.release(lease, 111.0) == ([], [Returned(APP, I1, 1, 0.0)])
    assert grants.ended_generation(APP, I1) is None
    assert grants.release(lease, 112.0) == ([], [Returned(APP, I1, 1, 0.0)])
    assert grants.leases() == []


def test_a_second_drain_finds_nothing_more(grants: Grants[str]) -> None:
    hold(grants, 3, 2)
    grants.on_revoke(revoke(None), 110.0)
    assert grants.on_revoke(revoke(None), 111.0) == []


def test_a_drained_lease_serves_no_one_who_waits(grants: Grants[str]) -> None:
    lease = hold(grants, 1, 1)
    grants.on_revoke(revoke(None), 110.0)
    grants.wait(APP, "next", 10, 111.0)
    assert grants.release(lease, 112.0) == ([], [Returned(APP, I1, 1, 0.0)])


def test_asked_whether_idle_it_gives_back_what_was_not_used_for_that_long(
    grants: Grants[str],
) -> None:
    lease = hold(grants, 2, 1)
    grants.release(lease, 110.0)
    assert grants.on_revoke(revoke(30.0), 139.0) == [StillUsed(APP, I1, 29.0)]
    assert lease.slots == 2
    assert grants.on_revoke(revoke(30.0), 140.0) == [Returned(APP, I1, 2, 30.0)]
    assert grants.leases() == []


def test_asked_whether_idle_while_a_session_runs_it_keeps_all(grants: Grants[str]) -> None:
    lease = hold(grants, 2, 1)
    assert grants.on_revoke(revoke(30.0), 200.0) == [StillUsed(APP, I1, 0.0)]
    grants.release(lease, 201.0)
    assert lease.slots == 2


def test_slots_that_were_granted_but_never_used_are_idle_from_the_grant(
    grants: Grants[str],
) -> None:
    hold(grants, 2, 0)
    assert grants.on_revoke(revoke(30.0), 120.0) == [StillUsed(APP, I1, 20.0)]
    assert grants.on_revoke(revoke(30.0), 130.0) == [Returned(APP, I1, 2, 30.0)]


def test_when_others_wait_it_gives_back_what_is_free_at_once(grants: Grants[str]) -> None:
    lease = hold(grants, 3, 1)
    assert grants.on_revoke(revoke(0.0), 110.0) == [Returned(APP, I1, 2, 0.0)]
    assert grants.release(lease, 111.0) == ([], [])


def test_when_others_wait_and_nothing_is_free_it_gives_back_the_next_slot_only(
    grants: Grants[str],
) -> None:
    lease = hold(grants, 2, 2)
    grants.wait(APP, "mine", 10, 105.0)
    assert grants.on_revoke(revoke(0.0), 110.0) == [StillUsed(APP, I1, 0.0)]
    assert grants.release(lease, 111.0) == ([], [Returned(APP, I1, 1, 0.0)])
    assert grants.release(lease, 112.0) == ([("mine", lease)], [demand(0, 2)])


def test_a_revoke_of_what_was_given_back_already_needs_no_answer(grants: Grants[str]) -> None:
    assert grants.on_revoke(revoke(None), 0.0) == []
    hold(grants, 1, 0)
    grants.on_revoke(revoke(0.0), 110.0)
    assert grants.on_revoke(revoke(30.0), 200.0) == []


def test_a_broken_instance_is_not_used_again_and_reported_once(grants: Grants[str]) -> None:
    lease = hold(grants, 3, 2)
    assert grants.broken(lease, "connection refused") == [
        Broken(APP, I1, "connection refused"),
        Returned(APP, I1, 1, 0.0),
    ]
    assert grants.broken(lease, "connection refused") == []
    assert grants.take(APP, 101.0) is None
    assert grants.release(lease, 102.0) == ([], [Returned(APP, I1, 1, 0.0)])


def test_a_new_grant_makes_a_broken_instance_usable_again(grants: Grants[str]) -> None:
    lease = hold(grants, 2, 1)
    grants.broken(lease, "connection refused")
    grants.on_grant(grant(1, 3), 105.0)
    assert grants.take(APP, 106.0) is lease
    assert (lease.slots, lease.used) == (2, 2)


def test_the_generation_whose_last_slot_was_given_back_is_told_once(grants: Grants[str]) -> None:
    lease = hold(grants, 1, 0)
    grants.on_revoke(revoke(None), 110.0)
    assert grants.ended_generation(APP, I1) == lease.generation
    assert grants.ended_generation(APP, I1) is None
    assert grants.ended_generation(OTHER, I1) is None


def test_a_generation_that_was_granted_again_has_not_ended(grants: Grants[str]) -> None:
    hold(grants, 1, 0)
    grants.on_revoke(revoke(None), 110.0)
    grants.on_grant(grant(1, 2), 111.0)
    assert grants.ended_generation(APP, I1) is None


def test_another_generation_has_a_lease_of_its_own(grants: Grants[str]) -> None:
    old = hold(grants, 1, 1)
    thawed = Grant(APP, 1, Generation("x", I1, 2), NodeName("n"), "10.0.0.2", 80, 1, EPOCH, 2)
    grants.on_grant(thawed, 120.0)
    new = grants.take(APP, 121.0)
    assert new is not None and new is not old
    assert new.address == "10.0.0.2"


def test_what_a_home_granted_is_given_up_when_it_is_cut_off(grants: Grants[str]) -> None:
    grants.wait(APP, "a", 10, 100.0)
    ((_, lease),), _ = grants.on_grant(grant(3, 1), 100.0, "tokyo-1/agent")
    grants.on_grant(grant(1, 1, instance="i2"), 100.0, "tokyo-2/agent")
    assert grants.cut_off("tokyo-1/agent", 105.0) == [Returned(APP, I1, 2, 0.0)]
    assert grants.cut_off("tokyo-1/agent", 106.0) == []
    other = grants.take(APP, 107.0)
    assert other is not None and other.instance == I2
    assert grants.take(APP, 107.0) is None
    assert grants.release(lease, 108.0) == ([], [Returned(APP, I1, 1, 0.0)])


def test_a_home_that_is_back_grants_again(grants: Grants[str]) -> None:
    grants.on_grant(grant(1, 0), 100.0, "tokyo-1/agent")
    grants.cut_off("tokyo-1/agent", 105.0)
    grants.on_grant(grant(1, 0), 106.0, "tokyo-1/agent")
    assert grants.take(APP, 107.0) is not None


# Refusals


def test_a_refusal_reaches_the_first_who_wait_and_no_one_else(grants: Grants[str]) -> None:
    for waiter in "abc":
        grants.wait(APP, waiter, 10, 0.0)
    assert grants.on_refuse(refuse(2, 2), 1.0) == (["a", "b"], [])
    assert grants.demand(APP, 1.0) == demand(1, 2, 1.0)


def test_a_refusal_of_who_gave_up_meanwhile_refuses_no_one(grants: Grants[str]) -> None:
    grants.wait(APP, "a", 10, 0.0)
    grants.give_up(APP, "a", 1.0)
    assert grants.on_refuse(refuse(1, 1), 1.0) == ([], [])
    assert Grants[str]().on_refuse(refuse(1, 1), 1.0) == ([], [])


def test_who_has_not_waited_long_is_not_refused_and_asked_for_again(grants: Grants[str]) -> None:
    for since, waiter in enumerate("abcd"):
        grants.wait(APP, waiter, 10, float(since))
    late = replace(refuse(3, 3), waited_s=4.0)
    assert grants.on_refuse(late, 5.0) == (["a", "b"], [demand(2, 3, 3.0)])
    assert grants.on_refuse(replace(late, answered=5, sessions=2), 5.0) == (
        [],
        [demand(2, 5, 3.0)],
    )


# Reports and epochs


def test_a_report_tells_all_that_is_held_and_waits(grants: Grants[str]) -> None:
    lease = hold(grants, 2, 2)
    grants.on_revoke(revoke(None), 103.0)
    grants.release(lease, 104.0)
    grants.wait(APP, "a", 10, 105.0)
    (entry,) = grants.report(107.0, frozenset({APP}))
    assert entry.app == APP
    assert entry.demand == demand(1, 0, 2.0, EPOCH + 1)
    assert entry.held == (Held(I1, 1, 0.0),)


def test_a_report_leaves_out_other_apps_and_those_with_nothing(grants: Grants[str]) -> None:
    grants.wait(APP, "a", 10, 0.0)
    grants.wait(OTHER, "b", 10, 0.0)
    grants.give_up(OTHER, "b", 0.0)
    assert grants.apps() == {APP, OTHER}
    assert grants.report(1.0, frozenset({OTHER})) == ()
    assert [entry.app for entry in grants.report(1.0, grants.apps())] == [APP]


def test_what_was_answered_before_a_report_is_void_after_it(grants: Grants[str]) -> None:
    grants.wait(APP, "a", 10, 0.0)
    grants.report(1.0, frozenset({APP}))
    assert grants.on_grant(grant(1, 1), 2.0) == ([], [])
    assert grants.on_refuse(refuse(1, 1), 2.0) == ([], [])
    assert grants.leases() == []
    assert grants.demand(APP, 2.0) == demand(1, 0, 2.0, EPOCH + 1)
    served, _ = grants.on_grant(grant(1, 1, epoch=EPOCH + 1), 3.0)
    assert [waiter for waiter, _ in served] == ["a"]


def test_a_report_that_leaves_an_app_out_leaves_its_epoch_alone(grants: Grants[str]) -> None:
    grants.wait(APP, "a", 10, 0.0)
    grants.wait(OTHER, "b", 10, 0.0)
    grants.report(1.0, frozenset({OTHER}))
    served, _ = grants.on_grant(grant(1, 1), 2.0)
    assert [waiter for waiter, _ in served] == ["a"]


def test_a_new_process_ignores_what_was_meant_for_the_one_before() -> None:
    process: Grants[str] = Grants(EPOCH + 12345)
    assert process.on_grant(grant(5, 5), 0.0) == ([], [])
    assert process.leases() == []
    process.wait(APP, "a", 10, 0.0)
    assert process.on_grant(grant(5, 5), 0.0) == ([], [])


@given(st.lists(st.sampled_from(["arrive", "end", "grant", "drain", "recall", "ask"]), max_size=60))
def test_slots_are_neither_lost_nor_made(steps: list[str]) -> None:
    """Granted are those held and those returned; in use are never more than held."""
    grants: Grants[int] = Grants(EPOCH)
    numbers = itertools.count()
    running: list[Lease] = []
    granted = returned = 0
    for now, step in enumerate(steps):
        served: list[tuple[int, Lease]] = []
        messages: list[object] = []
        match step:
            case "arrive":
                if (lease := grants.take(APP, now)) is not None:
                    running.append(lease)
                else:
                    grants.wait(APP, next(numbers), 1000, now)
            case "end" if running:
                served, messages = grants.release(running.pop(0), now)
            case "grant":
                granted += 2
                served, messages = grants.on_grant(grant(2, granted), now)
            case "drain" | "recall" | "ask":
                unused_s = {"drain": None, "recall": 0.0, "ask": 3.0}[step]
                messages = grants.on_revoke(revoke(unused_s), now)
        running += [lease for _, lease in served]
        returned += sum(message.slots for message in messages if isinstance(message, Returned))
        assert sum(lease.slots for lease in grants.leases()) == granted - returned
        assert sum(lease.used for lease in grants.leases()) == len(running)
        assert all(0 <= lease.used <= lease.slots for lease in grants.leases())
        free = sum(lease.free for lease in grants.leases())
        assert not (free and grants.demand(APP, now).waiting), "someone waits beside a free slot"


# The wire


@pytest.mark.parametrize(
    "message",
    [
        demand(3, 1, 0.5),
        Returned(APP, I1, 2, 0.25),
        StillUsed(APP, I1, 0.0),
        Broken(APP, I1, "refused"),
        Broken(APP, I1, "it broke off", reached=True),
    ],
)
def test_what_the_home_is_told_survives_the_wire(message: object) -> None:
    assert parse_to_home(encode(message)) == message


@pytest.mark.parametrize("message", [grant(1, 2), revoke(None), revoke(0.0), refuse(1, 2)])
def test_what_gateways_are_told_survives_the_wire(message: object) -> None:
    assert parse_to_gateway(encode(message)) == message


def test_books_without_a_slot_or_a_session_are_closed_when_there_are_many(
    grants: Grants[str],
) -> None:
    """Their number follows that of the apps in use, not that of all that ever were."""
    lease = hold(grants, 2, 1)
    grants.wait(OTHER, "waits", 10, 100.0)
    for number in range(10 * FEW_APPS):
        app = AppName(f"default/app-{number}")
        now = 100.0 + number
        told = grants.wait(app, "one", 10, now)
        grants.on_grant(grant(1, 1, epoch=told.epoch, app=app), now)
        ((_, served),) = [(app, lease) for lease in grants.leases() if lease.app == app]
        grants.release(served, now)
        grants.on_revoke(Revoke(app, I1, None), now)
    assert len(grants.apps()) <= FEW_APPS + REST_S + 2
    assert {APP, OTHER} <= grants.apps(), "what is in use stays"
    grants.release(lease, 1e6)


def test_books_that_are_opened_again_are_of_another_epoch(grants: Grants[str]) -> None:
    """Their home may remember how many it answered in the one before: it would answer none."""
    first = grants.wait(APP, "one", 10, 0.0)
    grants.give_up(APP, "one", 0.0)
    for number in range(FEW_APPS):
        grants.wait(AppName(f"default/app-{number}"), "one", 10, 2 * REST_S)
    assert APP not in grants.apps()
    again = grants.wait(APP, "two", 10, 2 * REST_S)
    assert again.epoch != first.epoch and again.waiting == 1
    assert grants.on_grant(grant(1, 1), 2 * REST_S) == ([], []), "what was meant for those before"
