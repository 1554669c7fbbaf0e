"""A gateway that cannot reach the homes of what it holds slots of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tabane.gateway.messages import Grant, Returned
from tabane.model import AppName, Generation, InstanceId, NodeName
from tabane.network.uplink import ClusterNetwork
from tabane.node import messages as say
from tabane.node.config import ClusterConfig, NodeConfig, Peer, agent_of
from tabane.node.gatewayd import GatewayProcess
from tabane.node.membership import Membership
from tabane.supervise import Supervisor

APP = AppName("default/hello")
PEERS = (Peer("tokyo", "tokyo-1", "10.0.0.2"), Peer("tokyo", "tokyo-2", "10.0.0.3"))
OWN, OTHER = PEERS[0].key, PEERS[1].key


class Rig:
    """A gateway of `OWN` with a hub session that does what the test says."""

    def __init__(self, root: Path) -> None:
        (root / "token").write_text("secret")
        network = ClusterNetwork("c", "10.0.0.0/24")
        cluster = ClusterConfig("c", PEERS, OWN, network)
        config = NodeConfig(cluster, PEERS[0], str(root), str(root), "incarnation", "tabane/c")
        self.told: list[tuple[str, say.Message]] = []
        self.process = GatewayProcess(config, "gateway-0", Supervisor("test"))
        self.hub = SimpleNamespace(
            connected=True,
            hubs={OTHER: True},
            send_nowait=self._hear,
        )
        self.process.me = self.hub  # type: ignore[assignment]
        self.process.nodes = Membership(config, self.hub.hubs)

    def _hear(self, member: str, data: bytes, *, urgent: bool) -> None:
        assert urgent
        self.told.append((member, say.parse(data)))

    def granted_by(self, node: NodeName) -> InstanceId:
        instance = InstanceId(f"from-{node}")
        generation = Generation("incarnation", instance, 1)
        epoch = self.process.router._grants.demand(APP, 0.0).epoch
        grant = Grant(APP, 1, generation, OWN, "10.1.0.1", 80, 1, epoch, 0)
        self.process.router.hear(grant, agent_of(node))
        return instance

    def given_up(self) -> list[InstanceId]:
        """What is told after nothing was heard of some for `CUT_OFF_S`."""
        self.told.clear()
        self.process._give_up()
        return [one.instance for _, one in self.told if isinstance(one, Returned)]


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_nothing_is_given_up_while_its_home_is_seen(rig: Rig) -> None:
    rig.granted_by(OTHER)
    assert rig.given_up() == []


def test_what_a_lost_node_granted_is_given_up(rig: Rig) -> None:
    instance = rig.granted_by(OTHER)
    rig.hub.hubs[OTHER] = False
    assert rig.given_up() == [instance]


def test_what_its_own_node_granted_is_kept_without_a_hub(rig: Rig) -> None:
    rig.granted_by(OWN)
    rig.hub.connected = False
    assert rig.given_up() == []


def test_what_others_granted_is_given_up_without_a_hub(rig: Rig) -> None:
    instance = rig.granted_by(OTHER)
    rig.hub.connected = False
    assert rig.given_up() == [instance]


def test_what_ended_with_its_network_stack_is_broken_off(rig: Rig) -> None:
    told: list[tuple[frozenset[str], bool]] = []
    part = SimpleNamespace(break_off=lambda dead, *, complete: told.append((dead, complete)))
    rig.process.gateways = [part, part]  # type: ignore[list-item]
    dead = Generation("incarnation", InstanceId("a"), 1)
    for complete in (False, True):
        message = say.LocalInstances((), complete=complete, dead=(dead,))
        data = say.encode(message)
        rig.process._on_message(SimpleNamespace(data=data, sender=agent_of(OWN)))  # type: ignore[arg-type]
    assert told == [(frozenset({str(dead)}), False)] * 2 + [(frozenset({str(dead)}), True)] * 2
