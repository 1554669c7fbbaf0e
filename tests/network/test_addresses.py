from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.errors import Busy, Unavailable
from tabane.network.addresses import (
    DENIED,
    EGRESS,
    GATEWAY,
    INSTANCES,
    Slots,
    address_of,
    choose_subnet,
    has_egress,
    link_name,
    slot_of_link,
)

FREE = DENIED.num_addresses - 3


@pytest.mark.parametrize("egress", [True, False])
def test_every_address_of_a_half_is_handed_out_once(egress: bool) -> None:
    slots = Slots()
    addresses = [address_of(slots.take(egress)) for _ in range(FREE)]
    assert len(set(addresses)) == FREE
    assert all(address in (EGRESS if egress else DENIED) for address in addresses)
    assert GATEWAY not in addresses
    assert all(has_egress(str(address)) == egress for address in addresses)
    with pytest.raises(Busy, match="egress"):
        slots.take(egress)


def test_what_was_free_the_longest_is_taken_first() -> None:
    slots = Slots()
    taken = [slots.take(True) for _ in range(FREE)]
    for slot in (taken[7], taken[3]):
        slots.give_back(slot)
    assert [slots.take(True), slots.take(True)] == [taken[7], taken[3]]


def test_a_reserved_slot_is_handed_out_only_after_it_was_given_back() -> None:
    slots, other = Slots(), Slots()
    reserved = other.take(True)
    slots.reserve(reserved)
    taken = [slots.take(True) for _ in range(FREE - 1)]
    assert reserved not in taken
    slots.give_back(reserved)
    assert slots.take(True) == reserved


def test_giving_back_what_is_free_changes_nothing() -> None:
    slots = Slots()
    slot = slots.take(False)
    slots.give_back(slot)
    slots.give_back(slot)
    assert [slots.take(False) for _ in range(FREE)].count(slot) == 1


@given(st.integers(0, INSTANCES.num_addresses - 1))
def test_names_follow_from_the_slot(slot: int) -> None:
    assert slot_of_link(link_name(slot)) == slot
    assert len(link_name(slot)) <= 15


@pytest.mark.parametrize("name", ["lo", "inst", "install", "eth0", "xinst1"])
def test_other_interfaces_have_no_slot(name: str) -> None:
    assert slot_of_link(name) is None


networks = st.builds(
    lambda number, prefix: IPv4Network((number & (0xFFFFFFFF << (32 - prefix)), prefix)),
    st.integers(9 << 24, (12 << 24) - 1),
    st.integers(7, 32),
)


@given(st.lists(networks, max_size=20), st.integers(0, 1 << 32))
def test_a_chosen_subnet_overlaps_nothing(taken: list[IPv4Network], start: int) -> None:
    try:
        chosen = choose_subnet(taken, start=start)
    except Unavailable:
        assert IPv4Network("10.0.0.0/8").num_addresses <= sum(n.num_addresses for n in taken)
    else:
        assert chosen.prefixlen == 24
        assert chosen.subnet_of(IPv4Network("10.0.0.0/8"))
        assert not any(chosen.overlaps(network) for network in taken)


def test_the_choice_begins_where_it_is_told() -> None:
    assert choose_subnet([], start=0x0102).network_address == IPv4Address("10.1.2.0")
    taken = [IPv4Network("10.1.2.0/23")]
    assert choose_subnet(taken, start=0x0102).network_address == IPv4Address("10.1.4.0")
    assert choose_subnet([IPv4Network("10.255.255.0/24")], start=0xFFFF) == IPv4Network(
        "10.0.0.0/24"
    )
    with pytest.raises(Unavailable, match="free"):
        choose_subnet([IPv4Network("10.0.0.0/8")])
