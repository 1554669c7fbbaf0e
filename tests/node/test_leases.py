"""Which nodes there are: leases, and what a hub is told."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tabane.model import NodeName
from tabane.network.uplink import ClusterNetwork
from tabane.node.config import HUB_PORT, ClusterConfig, KeptNode, Peer
from tabane.node.leases import NODES, TERM_S, NodeLeases, hubs_of, parse_node
from tabane.store.memory import MemoryStore
from tabane.testing.clock import VirtualClock

A1, A2, B1, C1 = (
    Peer(name[0], name, f"10.0.0.{number}")
    for number, name in enumerate(("a1", "a2", "b1", "c1"), 2)
)
CLUSTER = ClusterConfig("c", (A1, A2, B1, C1), A1.key, ClusterNetwork("c", "10.0.0.0/24"))
NODE = KeptNode(B1, "first life")


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
async def store(clock: VirtualClock) -> AsyncIterator[MemoryStore]:
    store = MemoryStore(clock=clock)
    yield store
    await store.aclose()


async def kept(store: MemoryStore) -> list[KeptNode]:
    return [parse_node(entry.value) for entry in (await store.range(NODES))[1]]


async def test_a_node_is_there_while_it_is_kept(store: MemoryStore, clock: VirtualClock) -> None:
    leases = NodeLeases(store)
    for _ in range(5):
        await leases.keep(NODE)
        clock.advance(TERM_S * 0.9)
        assert await kept(store) == [NODE]
    async with store.watch(NODES) as watch:
        clock.advance(TERM_S)
        (change,) = await anext(aiter(watch))
    assert (change.key, change.value) == (NODES + B1.key, None)
    assert await kept(store) == []


async def test_one_that_is_back_is_kept_again(store: MemoryStore, clock: VirtualClock) -> None:
    leases = NodeLeases(store)
    await leases.keep(NODE)
    async with store.watch(NODES) as watch:
        clock.advance(TERM_S + 1)
        await anext(aiter(watch))
    await leases.keep(NODE)
    assert await kept(store) == [NODE]


async def test_renewing_makes_no_revision(store: MemoryStore) -> None:
    leases = NodeLeases(store)
    await leases.keep(NODE)
    before, _ = await store.range(NODES)
    await leases.keep(NODE)
    assert (await store.range(NODES))[0] == before


async def test_another_incarnation_takes_the_place(store: MemoryStore, clock: VirtualClock) -> None:
    leases = NodeLeases(store)
    await leases.keep(NODE)
    again = KeptNode(B1, "second life")
    clock.advance(TERM_S * 0.5)
    await leases.keep(again)
    clock.advance(TERM_S * 0.7)
    assert await kept(store) == [again]


async def test_a_new_agent_of_the_control_node_renews_what_is_there(store: MemoryStore) -> None:
    await NodeLeases(store).keep(NODE)
    await NodeLeases(store).keep(NODE)
    assert await kept(store) == [NODE]


def test_near_and_earlier_ones_are_dialed_and_later_ones_dial() -> None:
    peers = {peer.name: peer.url for peer in hubs_of(CLUSTER, B1.key)}
    assert peers == {
        A1.key: f"tcp://10.0.0.2:{HUB_PORT}",
        A2.key: f"tcp://10.0.0.3:{HUB_PORT}",
        C1.key: "",
    }


def test_one_whose_lease_ended_is_none_and_one_that_is_new_is() -> None:
    new = Peer("b", "b2", "10.0.0.9")
    peers = hubs_of(CLUSTER, B1.key, [B1, new], {A2.key, NodeName("b/b9")})
    assert [peer.name for peer in peers] == [A1.key, C1.key, new.key]
    assert peers[-1].url == f"tcp://10.0.0.9:{HUB_PORT}"


def test_one_that_moved_has_its_new_address() -> None:
    (peer,) = [
        p for p in hubs_of(CLUSTER, B1.key, [Peer("a", "a1", "10.9.9.9")]) if p.name == A1.key
    ]
    assert peer.url == f"tcp://10.9.9.9:{HUB_PORT}"
