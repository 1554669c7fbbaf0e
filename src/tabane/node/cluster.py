"""A local cluster on one machine: make its directory, start its nodes, stop them, leave nothing.

Each node has namespaces of its own (`tabane.node.local`), so three of them are three machines to
each other. What runs is written to `cluster.json` and `nodes/.../process.json` before and after
each step, so that `bring_down` cleans up from the files alone, whatever became of the cluster.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tabane.clock import SYSTEM
from tabane.errors import Conflict, Denied, UsageError
from tabane.model import NodeName
from tabane.network.uplink import set_up_network, tear_down_network
from tabane.node import config as places
from tabane.node.config import ClusterConfig, NodeConfig, NodePaths, Peer
from tabane.node.local import (
    HERE,
    NodeProcess,
    NodeSpec,
    ask_to_end,
    start_node,
    stop_node,
)
from tabane.node.outside import start_collector, stop_collector
from tabane.runtimes import registry
from tabane.security.identity import new_token

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
MAX_NODES = 250
START_BROKEN_OFF_S = 1.0
"""What nodes that were only just started get to end by themselves."""


def bring_up(
    root: Path,
    datacenters: Sequence[str],
    nodes: int,
    *,
    gateways: int = 1,
    driver: str = "",
    allow_emulation: bool = False,
    image_quota_bytes: int = 0,
    checkpoint_quota_bytes: int = 0,
    checkpoint_memory_bytes: int = 0,
    memory_bytes: int = 0,
) -> ClusterConfig:
    """Start a cluster below `root` with `nodes` nodes in each data center.

    What a stopped cluster there has stored stays. Raises `Conflict` when one runs there, and
    `UsageError` for bad names; when a node cannot start, all is taken down again.
    """
    check_names(datacenters, nodes)
    check_free(root)
    keys = [(dc, f"{dc}-{n}") for dc in datacenters for n in range(1, nodes + 1)]
    control = choose_control(root, [NodeName(f"{dc}/{name}") for dc, name in keys])
    root.mkdir(parents=True, exist_ok=True, mode=0o755)
    bring_down(root)
    cluster_id = read_id(root) or secrets.token_hex(3)
    network = set_up_network(cluster_id)
    peers = tuple(
        Peer(dc, name, str(network.node_address(number)))
        for number, (dc, name) in enumerate(keys, 1)
    )
    cluster = ClusterConfig(cluster_id, peers, control, network)
    make_token(root)
    places.save(root / "cluster.json", cluster)
    try:
        start_collector(root)
        for number, peer in enumerate(peers, 1):
            checkpoints = checkpoint_quota_bytes, checkpoint_memory_bytes
            quotas = image_quota_bytes, *checkpoints, memory_bytes
            start(root, cluster, number, peer, gateways, driver, allow_emulation, *quotas)
    except BaseException:
        bring_down(root, timeout_s=START_BROKEN_OFF_S)
        raise
    return cluster


def restart_dead(root: Path) -> list[Peer]:
    """Start those nodes of a running cluster again whose first process has ended, each as a new
    incarnation; returns which. Nothing when none of the cluster runs."""
    known = processes(root)
    if not any(process.runs for _, process in known):
        return []
    cluster = places.load_cluster(root)
    start_collector(root)
    dead = [(peer, process) for peer, process in known if not process.runs]
    for peer, process in dead:
        stop_node(cluster.network, process, timeout_s=0)
        before = places.load_node(NodePaths(places.node_directory(root, peer.key)).config)
        shape = before.gateways, before.driver, before.allow_emulation
        start(root, cluster, process.number, peer, *shape, *before.quotas)
    return [peer for peer, _ in dead]


def check_free(root: Path) -> None:
    """Raises `Conflict` when a cluster runs below `root`."""
    if any(process.runs for _, process in processes(root)):
        raise Conflict(f"a cluster runs below {root} already: `tabane down` stops it")


def choose_control(root: Path, nodes: Sequence[NodeName]) -> NodeName:
    """The node that holds the store: the one that held it before, else the first.

    Raises `Conflict` when the one that holds what is stored below `root` is not among them.
    """
    if not (root / "cluster.json").exists():
        return nodes[0]
    before = places.load_cluster(root)
    if before.control in nodes:
        return before.control
    if not NodePaths(places.node_directory(root, before.control)).store.exists():
        return nodes[0]
    held = f"the apps of the cluster below {root} are stored on {before.control}"
    raise Conflict(
        f"{held}, which is not among these nodes: start it with --datacenters "
        f"{','.join(before.datacenters())}, take another --root, or remove what is stored there "
        f"with `tabane down --purge`"
    )


class Shape(NamedTuple):
    """What `bring_up` makes a cluster of."""

    datacenters: list[str]
    nodes: int
    gateways: int
    driver: str
    allow_emulation: bool = False
    image_quota_bytes: int = 0
    checkpoint_quota_bytes: int = 0
    checkpoint_memory_bytes: int = 0
    memory_bytes: int = 0


def former_shape(root: Path) -> Shape | None:
    """Of the cluster that was below `root` before; None when there was none."""
    if not (root / "cluster.json").exists():
        return None
    cluster = places.load_cluster(root)
    datacenters = list(cluster.datacenters())
    nodes = max(sum(peer.datacenter == dc for peer in cluster.nodes) for dc in datacenters)
    config = NodePaths(places.node_directory(root, cluster.control)).config
    if not config.exists():
        return Shape(datacenters, nodes, 1, "")
    control = places.load_node(config)
    return Shape(
        datacenters,
        nodes,
        control.gateways,
        control.driver,
        control.allow_emulation,
        *control.quotas,
    )


def check_owner(root: Path) -> None:
    """Raises `Denied` when the cluster below `root`, if there is one, is another user's."""
    try:
        owner = (root / "cluster.json").stat().st_uid
    except (FileNotFoundError, NotADirectoryError):
        return
    if os.geteuid() not in (0, owner):
        who = "root" if owner == 0 else f"the user with uid {owner}"
        raise Denied(f"the cluster below {root} belongs to {who}: use sudo")


def check_driver(driver: str) -> None:
    known = registry.names()
    if driver and driver not in known:
        raise UsageError(f"driver: there is none named {driver!r}, only {', '.join(known)}")


def check_names(datacenters: Sequence[str], nodes: int) -> None:
    for name in datacenters:
        if not NAME.fullmatch(name):
            problem = f"datacenters: {name!r} is not a name: want a-z, 0-9 and -, at most 32"
            raise UsageError(problem)
    if len(set(datacenters)) != len(datacenters):
        raise UsageError("datacenters: each name once")
    if not datacenters or nodes < 1 or len(datacenters) * nodes > MAX_NODES:
        raise UsageError(f"nodes: want 1 to {MAX_NODES} in all")


def make_token(root: Path) -> None:
    path = root / "token"
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(new_token())


def read_id(root: Path) -> str | None:
    """The id of the cluster that was here before: a stopped cluster keeps it."""
    path = root / "cluster.json"
    return places.load_cluster(root).id if path.exists() else None


def start(
    root: Path,
    cluster: ClusterConfig,
    number: int,
    peer: Peer,
    gateways: int,
    driver: str,
    allow_emulation: bool,
    image_quota_bytes: int,
    checkpoint_quota_bytes: int,
    checkpoint_memory_bytes: int,
    memory_bytes: int,
) -> None:
    """Write a node's files and start its holder."""
    paths = NodePaths(places.node_directory(root, peer.key))
    paths.directory.mkdir(parents=True, exist_ok=True)
    for directory in (paths.logs, paths.instance_logs, paths.run, paths.images):
        directory.mkdir(exist_ok=True)
    node = NodeConfig(
        cluster=cluster,
        node=peer,
        root=str(root),
        directory=str(HERE),
        incarnation=str(uuid.uuid4()),
        cgroup=f"/tabane/{cluster.id}/{peer.name}",
        gateways=gateways,
        driver=driver,
        allow_emulation=allow_emulation,
        image_quota_bytes=image_quota_bytes,
        checkpoint_quota_bytes=checkpoint_quota_bytes,
        checkpoint_memory_bytes=checkpoint_memory_bytes,
        memory_bytes=memory_bytes,
    )
    places.save(paths.config, node, mode=0o600)
    paths.holder_config.write_bytes(msgspec.json.encode(holder_config(node)))
    argv = (sys.executable, "-m", "tabane.node.holder", str(paths.holder_config))
    spec = NodeSpec(
        peer.name,
        number,
        argv,
        paths.logs / "node.log",
        node.cgroup,
        directory=paths.directory,
    )
    start_node(cluster.network, spec, remember=lambda p: places.save(process_file(root, peer), p))


def process_file(root: Path, peer: Peer) -> Path:
    return places.node_directory(root, peer.key) / "process.json"


def holder_config(node: NodeConfig) -> dict[str, Any]:
    """The node's sockets and parts, for its holder."""
    paths = NodePaths(places.node_directory(Path(node.root), node.key))
    address, inside = node.node.address, places.INSIDE_ADDRESS

    def tcp(name: str, host: str, port: int, *, each: bool = False) -> dict[str, Any]:
        address = f"{host}:{port}"
        return {"name": name, "kind": "tcp", "address": address, "freebind": True, "each": each}

    sockets = [
        {"name": "api", "kind": "unix", "address": str(paths.api), "mode": 0o666},
        {"name": "hub", "kind": "unix", "address": str(paths.hub)},
        tcp("api-tcp", address, places.API_PORT),
        tcp("hub-tcp", address, places.HUB_PORT),
        tcp("http", address, places.HTTP_PORT, each=True),
        tcp("forward", address, places.FORWARD_PORT, each=True),
        tcp("forward-tcp", address, places.FORWARD_TCP_PORT, each=True),
        tcp("inside", inside, places.HTTP_PORT, each=True),
        {"name": "dns", "kind": "udp", "address": f"{inside}:53", "freebind": True},
        tcp("dns-tcp", inside, 53),
    ]

    def part(name: str, module: str, *names: str) -> dict[str, Any]:
        argv = [sys.executable, "-m", f"tabane.node.{module}", str(paths.config)]
        return {"name": name, "argv": argv, "sockets": list(names)}

    gateway = ("http", "inside", "forward", "forward-tcp", "dns", "dns-tcp")
    parts = [part("hub", "hubd", "hub", "hub-tcp"), part("agent", "agentd", "api", "api-tcp")]
    parts += [part(f"gateway-{n}", "gatewayd", *gateway) for n in range(node.gateways)]
    return {
        "control": str(paths.holder),
        "listeners": str(paths.listeners),
        "sockets": sockets,
        "parts": parts,
        "environment": {"PATH": os.environ.get("PATH", os.defpath)},
    }


def processes(root: Path) -> list[tuple[Peer, NodeProcess]]:
    """The nodes that were started, running or not."""
    if not (root / "cluster.json").exists():
        return []
    found = []
    for peer in places.load_cluster(root).nodes:
        path = process_file(root, peer)
        if path.exists():
            found.append((peer, msgspec.json.decode(path.read_bytes(), type=NodeProcess)))
    return found


def bring_down(root: Path, *, timeout_s: float = 20.0) -> None:
    """End every node and remove what it leaves on the machine; what is stored stays. Idempotent.
    They have `timeout_s` in all to end by themselves. Ctrl-C has to wait until it is done."""
    found = processes(root)
    if not (root / "cluster.json").exists():
        return
    cluster = places.load_cluster(root)
    deadline = SYSTEM.now() + timeout_s
    with _uninterrupted():
        for _, process in found:
            ask_to_end(process)
        for peer, process in found:
            left_s = max(0.0, deadline - SYSTEM.now())
            stop_node(cluster.network, process, timeout_s=left_s)
            process_file(root, peer).unlink()
        stop_collector(root)
        tear_down_network(cluster.network)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def forget(root: Path) -> None:
    """Remove all that a stopped cluster has stored below `root`."""
    for name in ("nodes", "cluster.json", "token", "collector.log"):
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if not any(root.iterdir()):
        root.rmdir()
