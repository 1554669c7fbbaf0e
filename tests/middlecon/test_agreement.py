"""Agreements as programs have them, over real hubs."""

from __future__ import annotations

import asyncio

import pytest

from tabane.errors import Closed, Refused
from tabane.middlecon import Agreement, Limits, Outcome, agreement
from tabane.middlecon.chat import LOBBY


class Taker:
    """A member that can prepare, and what it was told."""

    def __init__(self, client, room):
        self.client, self.room = client, room
        self.heard: list[Outcome] = []
        self.prepared: list[bytes] = []
        room.on_prepare(lambda proposal: self.prepared.append(proposal.value))
        room.on_outcome(self.heard.append)

    @property
    def outcomes(self):
        return [(outcome.value, outcome.committed) for outcome in self.heard]


@pytest.fixture
def taker(cluster):
    async def make(name, hub="hub", **options):
        client = await cluster.client(name, hub, **options)
        return Taker(client, await client.join("r"))

    return make


async def test_members_of_one_hub_agree(cluster, taker):
    await cluster.hub()
    x, y, z = [await taker(name) for name in "xyz"]
    result = await x.room.agree(b"v42")
    assert result == Agreement(True, result.prepared)
    assert set(result.prepared) == {"y", "z"}
    assert y.prepared == z.prepared == [b"v42"]
    assert x.prepared == x.heard == []
    for one in (y, z):
        (outcome,) = one.heard
        assert (outcome.proposer, outcome.value, outcome.committed) == ("x", b"v42", True)
    assert y.heard[0].id == z.heard[0].id


async def test_who_raises_or_has_no_handler_refuses(cluster, taker, caplog):
    await cluster.hub()
    x, y = await taker("x"), await taker("y")
    spectator = await cluster.client("s")
    await spectator.join("r")

    @y.room.on_prepare
    async def cannot(proposal):
        raise Refused("the disk is full", reason="full")

    result = await x.room.agree(b"v")
    assert not result.committed
    assert result.refused["y"].text == "the disk is full"
    assert "takes no part" in result.refused["s"].text
    assert y.outcomes == [(b"v", False)]


async def test_an_outcome_waits_for_the_preparation_it_is_for(cluster, taker, eventually):
    hub = await cluster.hub()
    x, y, z = [await taker(name) for name in "xyz"]
    began, go = asyncio.Event(), asyncio.Event()
    order = []

    @y.room.on_prepare
    async def slowly(proposal):
        began.set()
        await go.wait()
        order.append("prepared")

    @y.room.on_outcome
    async def heard(outcome):
        order.append(outcome.committed)

    asking = asyncio.create_task(x.room.agree(b"v", timeout_s=60))
    await began.wait()
    await z.client.aclose()
    await eventually(lambda: "z" not in hub.members)
    go.set()
    assert not (await asking).committed
    assert order == ["prepared", False]


@pytest.mark.parametrize("proposer_at", ["a", "b"])
async def test_members_of_linked_hubs_agree(cluster, taker, eventually, proposer_at):
    await cluster.pair()
    x, y, z = await taker("x", proposer_at), await taker("y", "a"), await taker("z", "b")
    for one in (x, y, z):
        await eventually(lambda one=one: len(one.room.members) == 3)
    result = await x.room.agree(b"v")
    assert result.committed
    assert set(result.prepared) == {"y", "z"}
    assert y.outcomes == z.outcomes == [(b"v", True)]


async def test_members_of_a_tree_of_hubs_agree_and_abort(cluster, taker, eventually):
    for name in ("a1", "b1", "b2", "c1"):
        hub = await cluster.hub(name, datacenter=name[0])
        for peer in ("a1", "b1", "b2"):
            if peer < name:
                hub.link(peer, cluster.url(peer), datacenter=peer[0])
    takers = [await taker(f"{hub}/m", hub) for hub in ("a1", "b1", "b2", "c1")]
    for one in takers:
        await eventually(lambda one=one: len(one.room.members) == len(takers))
    for proposer in takers:
        result = await proposer.room.agree(proposer.client.name.encode())
        assert result.committed
        assert len(result.prepared) == 3
    takers[3].room.on_prepare(lambda proposal: 1 / 0)
    result = await takers[0].room.agree(b"no")
    assert (result.committed, [*result.refused]) == (False, ["c1/m"])
    assert [len(one.heard) for one in takers] == [3, 4, 4, 4]
    assert all(one.outcomes[-1] == (b"no", False) for one in takers[1:])


async def test_a_member_lost_before_the_outcome_learns_it_in_its_next_run(cluster, taker):
    await cluster.hub()
    x, y, z = [await taker(name) for name in "xyz"]

    @z.room.on_outcome
    def crash(outcome):
        z.client.abort()

    result = await x.room.agree(b"v")
    assert (result.committed, result.untold) == (True, ("z",))
    assert y.outcomes == [(b"v", True)]
    await z.client.aclose()
    client = await cluster.client("z")
    room = await client.join("r")
    told = asyncio.get_running_loop().create_future()
    room.on_outcome(told.set_result)
    outcome = await told
    assert (outcome.value, outcome.committed) == (b"v", True)


async def test_a_member_is_told_once_whatever_the_hub_sends(cluster, taker, eventually):
    hub = await cluster.hub()
    x, z = await taker("x"), await taker("z")
    began, go = asyncio.Event(), asyncio.Event()
    calls = []

    @z.room.on_outcome
    async def slowly(outcome):
        calls.append(outcome.committed)
        began.set()
        await go.wait()

    asking = asyncio.create_task(x.room.agree(b"v", timeout_s=60))
    await began.wait()
    z.client.abort()
    assert (await asking).untold == ("z",)
    assert len(hub._relay.agreements) == 1
    go.set()
    await eventually(lambda: not hub._relay.agreements._kept)
    assert calls == [True]


async def test_a_proposer_that_dies_aborts(cluster, taker, eventually):
    await cluster.hub()
    x, y, z = [await taker(name) for name in "xyz"]
    began = asyncio.Event()

    @z.room.on_prepare
    async def never(proposal):
        began.set()
        await asyncio.Event().wait()

    asking = asyncio.create_task(x.room.agree(b"v", timeout_s=600))
    await began.wait()
    x.client.abort()
    with pytest.raises(Closed):
        await asking
    await eventually(lambda: y.heard)
    assert y.outcomes == [(b"v", False)]
    await eventually(lambda: x.heard)  # when it is back, so does the proposer
    assert x.outcomes == [(b"v", False)]


async def test_without_its_coordinator_an_outcome_is_not_known(cluster, taker, eventually):
    hub = await cluster.hub()
    x, y, z = [await taker(name) for name in "xyz"]
    z.room.on_prepare(lambda proposal: asyncio.Event().wait())
    asking = asyncio.create_task(x.room.agree(b"v", timeout_s=600))
    await eventually(lambda: y.prepared)
    await hub.aclose()
    with pytest.raises(Closed):
        await asking
    await cluster.hub()
    await eventually(lambda: y.heard)
    assert y.outcomes == [(b"v", None)]


async def test_an_outcome_that_does_not_come_in_time_is_not_known_until_it_does(
    cluster, taker, eventually, monkeypatch
):
    monkeypatch.setattr(agreement, "GRACE_S", -600.0)
    await cluster.hub()
    x, y, z = [await taker(name) for name in "xyz"]
    go = asyncio.Event()
    z.room.on_prepare(lambda proposal: go.wait())
    asking = asyncio.create_task(x.room.agree(b"v", timeout_s=600))
    await eventually(lambda: y.heard)
    assert y.outcomes == [(b"v", None)]
    go.set()
    assert (await asking).committed
    assert y.outcomes == [(b"v", None), (b"v", True)]


async def test_what_is_too_large_and_the_lobby_are_refused(cluster):
    await cluster.hub(limits=Limits(agree_bytes=3))
    client = await cluster.client("x")
    with pytest.raises(Refused, match="3 bytes"):
        await (await client.join("r")).agree(b"1234")
    with pytest.raises(Refused, match="lobby"):
        await (await client.join(LOBBY)).agree(b"1")


async def test_a_handler_that_raises_at_an_outcome_was_told(cluster, taker, caplog):
    await cluster.hub()
    x, y = await taker("x"), await taker("y")

    @y.room.on_outcome
    async def broken(outcome):
        raise ValueError(outcome.value)

    result = await x.room.agree(b"v")
    assert (result.committed, result.untold) == (True, ())
    assert "on_outcome" in caplog.text
