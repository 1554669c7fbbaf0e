"""Where things are: a cluster's directory, a node's directory, its ports.

ROOT/cluster.json                     what the cluster consists of
ROOT/token                            its token, for root only
ROOT/limits.toml                      what users may have on each node, if there is one
ROOT/collector.json                   who collects process events for the nodes of one machine,
ROOT/process-events.sock              and where it tells them
ROOT/nodes/DATACENTER/NODE/
    config.json                       this node, for its own processes
    collect.toml                      what k2i collects here, if there is one
    api.sock hub.sock holder.sock     control ports (unix)
    listeners.sock                    where gateways get the sockets of apps' TCP ports
    store.db                          the store (control node only)
    replica.db                        a copy of it, on every other node
    images/                           blobs and unpacked trees
    checkpoints/ checkpoint.key       sealed dumps of instances, and what with
    run/checkpoints/                  those that are open, in memory
    run/ID/                           record and bundle of each instance, in memory
    logs/ID/                          output of each instance
    events.log wakes.log audit.log    journals
    log/                              output of Tabane's own processes
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from tabane.errors import NotFound
from tabane.model import NodeName, Value
from tabane.network.uplink import ClusterNetwork

HTTP_PORT = 80
API_PORT = 7070
HUB_PORT = 7071
FORWARD_PORT = 7072
FORWARD_TCP_PORT = 7073
INSIDE_ADDRESS = "100.64.0.1"
"""The node's address in its instance network (RFC 6598 space; it never leaves the node)."""


class Peer(Value, frozen=True):
    """A node, as the others need to know it."""

    datacenter: str
    name: str
    address: str

    @property
    def key(self) -> NodeName:
        return NodeName(f"{self.datacenter}/{self.name}")


class KeptNode(Value, frozen=True):
    """A node as it is stored, for as long as its lease lasts."""

    peer: Peer
    incarnation: str


class ClusterConfig(Value, frozen=True):
    """`control` is the node that holds the store. `network` records what the host lent."""

    id: str
    nodes: tuple[Peer, ...]
    control: NodeName
    network: ClusterNetwork

    @property
    def keys(self) -> tuple[NodeName, ...]:
        """The nodes' names, in the cluster's order."""
        return tuple(peer.key for peer in self.nodes)

    def node(self, key: str) -> Peer:
        for peer in self.nodes:
            if peer.key == key:
                return peer
        known = ", ".join(self.keys)
        raise NotFound(f"there is no node {key} in this cluster (its nodes: {known})")

    def datacenters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(peer.datacenter for peer in self.nodes))


class NodeConfig(Value, frozen=True):
    cluster: ClusterConfig
    node: Peer
    root: str
    """The cluster's directory."""
    directory: str
    """The node's own, as its processes see it: every user can be let into it."""
    incarnation: str
    cgroup: str
    gateways: int = 1
    pool: int = 8
    driver: str = ""
    """Preferred driver of class container; the first that works when empty."""
    allow_emulation: bool = False
    """Every app may run on an engine that emulates a processor, for want of /dev/kvm."""
    image_quota_bytes: int = 0
    """What images may take, packed and unpacked; 0: a share of the disk they are on."""
    checkpoint_quota_bytes: int = 0
    """What checkpoints may take; 0: a share of the disk they are on."""
    checkpoint_memory_bytes: int = 0
    """What opened ones may take of the memory; 0: a share of it."""
    memory_bytes: int = 0
    """What the node's instances may use of the machine's memory in all; 0: all of it."""

    @property
    def paths(self) -> NodePaths:
        return NodePaths(Path(self.directory))

    @property
    def key(self) -> NodeName:
        return self.node.key

    @property
    def quotas(self) -> tuple[int, int, int, int]:
        """Of images, of checkpoints, of opened checkpoints; of memory."""
        checkpoints = self.checkpoint_quota_bytes, self.checkpoint_memory_bytes
        return self.image_quota_bytes, *checkpoints, self.memory_bytes

    @property
    def is_control(self) -> bool:
        return self.node.key == self.cluster.control

    def token(self) -> str:
        return (Path(self.root) / "token").read_text().strip()


class NodePaths:
    """Names of a node's files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "config.json"
        self.collect = directory / "collect.toml"
        self.holder_config = directory / "holder.json"
        self.api = directory / "api.sock"
        self.hub = directory / "hub.sock"
        self.holder = directory / "holder.sock"
        self.listeners = directory / "listeners.sock"
        self.store = directory / "store.db"
        self.replica = directory / "replica.db"
        self.images = directory / "images"
        self.checkpoints = directory / "checkpoints"
        self.checkpoint_key = directory / "checkpoint.key"
        self.volumes = directory / "volumes"
        self.run = directory / "run"
        self.instance_logs = directory / "logs"
        self.drivers = directory / "run" / "drivers"
        self.logs = directory / "log"
        self.events = directory / "events.log"
        self.wakes = directory / "wakes.log"
        self.audit = directory / "audit.log"


def agent_of(node: str) -> str:
    """The member name of a node's agent on the hubs."""
    return f"{node}/agent"


def node_of(member: str) -> NodeName:
    """The node of an agent or a gateway."""
    return NodeName(member.rpartition("/")[0])


def event_socket(root: Path) -> Path:
    """Where a local cluster's nodes are told process events."""
    return root / "process-events.sock"


def node_directory(root: Path, key: str) -> Path:
    return root / "nodes" / key


def load_cluster(root: Path) -> ClusterConfig:
    """Raises `NotFound` when there is no cluster below `root`."""
    try:
        return msgspec.json.decode((root / "cluster.json").read_bytes(), type=ClusterConfig)
    except FileNotFoundError:
        problem = f"no cluster below {root}: start one with `tabane up`, or name its --root"
        raise NotFound(problem) from None


def load_node(path: Path) -> NodeConfig:
    return msgspec.json.decode(path.read_bytes(), type=NodeConfig)


def save(path: Path, value: msgspec.Struct, *, mode: int = 0o644) -> None:
    """Write a value as JSON, whole or not at all."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_bytes(msgspec.json.encode(value))
    scratch.chmod(mode)
    scratch.replace(path)
