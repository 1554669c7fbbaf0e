"""Instance networks: addresses, links made ahead, packet filters, and a local cluster's bridge."""

from tabane.network.pool import NetworkPool
from tabane.network.rules import prepare_node
from tabane.network.uplink import ClusterNetwork, set_up_network, tear_down_network

__all__ = [
    "ClusterNetwork",
    "NetworkPool",
    "prepare_node",
    "set_up_network",
    "tear_down_network",
]
