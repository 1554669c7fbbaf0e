from ipaddress import IPv4Network

from tabane.network.rules import host_rules, node_rules, remove_rules, tcp_ports
from tabane.network.uplink import ClusterNetwork, parse_routes

ROUTES = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
wlan0\t00000000\t0102A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0
eth0\t00000000\t010200C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
tun0\t0000140A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
"""


def test_control_networks_are_forbidden_and_overlaps_joined() -> None:
    control = [IPv4Network("10.1.2.0/24"), IPv4Network("10.1.0.0/16")]
    text = node_rules(control)
    assert "{ 10.1.0.0/16, 100.64.0.0/18, 127.0.0.0/8, 169.254.0.0/16 } drop" in text
    assert "10.1.2.0/24" not in text


def test_instances_get_to_the_tcp_ports_of_apps_and_no_others() -> None:
    assert node_rules([], [6380, 25]).endswith(tcp_ports([25, 6380]))
    assert tcp_ports([6380, 25]) == (
        "flush set inet tabane_instances tcp_ports\n"
        "add element inet tabane_instances tcp_ports { 25, 6380 }\n"
    )
    assert tcp_ports([]) == "flush set inet tabane_instances tcp_ports\n"


def test_tables_are_replaced_in_one_transaction() -> None:
    for text in (node_rules([]), host_rules("t", "b", IPv4Network("10.1.2.0/24"), "b*")):
        first, second, third, *_ = text.splitlines()
        assert second == f"delete {first}"
        assert third == f"{first} {{"
    assert remove_rules("t") == "table inet t\ndelete table inet t\n"


def test_routes_are_read_with_the_preferred_one_first() -> None:
    assert parse_routes(ROUTES) == [
        (IPv4Network("10.20.0.0/16"), "tun0"),
        (IPv4Network("0.0.0.0/0"), "eth0"),
        (IPv4Network("0.0.0.0/0"), "wlan0"),
    ]
    assert parse_routes("") == []


def test_names_of_a_cluster_fit_into_interface_names() -> None:
    network = ClusterNetwork("abcdefgh", "10.1.2.0/24")
    assert len(network.bridge) <= 15
    assert len(network.port(253)) <= 15
    assert str(network.host_address) == "10.1.2.1"
    assert str(network.node_address(1)) == "10.1.2.2"
    assert str(network.node_address(253)) == "10.1.2.254"
