import errno
import struct
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.errors import EngineError
from tabane.network import netlink
from tabane.network.netlink import Rtnetlink


def test_requests_are_numbered_padded_and_acknowledged() -> None:
    requests = [netlink.delete_link("ab"), netlink.set_up(7)]
    data = netlink.encode(requests)
    first = struct.unpack_from("=IHHII", data)
    second = struct.unpack_from("=IHHII", data, first[0])
    assert first[1:] == (17, 0x5, 0, 0)
    assert second[1:] == (16, 0x5, 1, 0)
    assert first[0] % 4 == 0
    assert first[0] + second[0] == len(data)


def test_a_message_byte_by_byte() -> None:
    request = netlink.add_address(3, IPv4Address("100.64.32.2"), 32)
    assert request.kind == 20
    assert request.body == bytes.fromhex(
        "02 20 00 00 03000000"  # AF_INET, /32, no flags, scope universe, index 3
        "0800 0200 64402002"  # IFA_LOCAL
        "0800 0100 64402002"  # IFA_ADDRESS
    )


def test_a_route_with_a_router_has_universe_scope_and_one_without_link_scope() -> None:
    everywhere = IPv4Network("0.0.0.0/0")
    assert netlink.add_route(2, everywhere, via=IPv4Address("10.0.0.1")).body[6] == 0
    assert netlink.add_route(2, everywhere).body[6] == 253


@given(st.dictionaries(st.integers(0, 1000), st.integers(0, 200), max_size=10))
def test_answers_are_read_by_number(statuses: dict[int, int]) -> None:
    data = b"".join(
        struct.pack("=IHHIIi", 36, 2, 0, number, 0, -status) + bytes(16)
        for number, status in statuses.items()
    )
    assert netlink.parse_answers(data) == statuses


def test_a_refusal_says_what_was_wanted_and_why() -> None:
    with Rtnetlink() as sock, pytest.raises(EngineError, match="delete nosuch0: No such") as caught:
        sock.perform([netlink.delete_link("nosuch0")])
    assert caught.value.status == errno.ENODEV


def test_an_accepted_refusal_is_none() -> None:
    with Rtnetlink() as sock:
        sock.perform([netlink.delete_link("nosuch0")] * 3, accept=(errno.ENODEV,))
        assert sock.index("lo") == netlink.LOOPBACK_INDEX
        with pytest.raises(EngineError, match="no interface nosuch0"):
            sock.index("nosuch0")
