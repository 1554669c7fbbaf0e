"""Which nodes there are: each keeps a lease in the store, and its key is gone with that.

A node's agent asks the control node to keep it, three times a term. What the store says is copied
to all nodes as everything else is, and each agent tells its hub: the members of a node whose lease
has ended, and to which there is no link, have left. Nodes that the configuration names are taken to
be there until then.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import TYPE_CHECKING

import msgspec

from tabane import middlecon
from tabane.clock import Clock, sleep_until
from tabane.errors import Closed, NotFound, TabaneError, Unavailable
from tabane.model import NodeName
from tabane.node import messages as say
from tabane.node.config import HUB_PORT, ClusterConfig, KeptNode, Peer, agent_of
from tabane.store.api import Change, Put, Store

if TYPE_CHECKING:
    from tabane.node.agent import Agent

log = logging.getLogger(__name__)

NODES = "nodes/"
TERM_S = 15.0
"""Of a node's lease: a hub that is restarted, or a link that is made anew, takes a few seconds."""


def parse_node(value: bytes) -> KeptNode:
    return msgspec.json.decode(value, type=KeptNode)


class NodeLeases:
    """On the control node."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def keep(self, node: KeptNode) -> None:
        """Begin its term, again or for the first time. Raises what the store does."""
        key, value = NODES + node.peer.key, msgspec.json.encode(node)
        entry = await self._store.get(key)
        if entry is not None and entry.value == value:
            try:
                return await self._store.renew_lease(entry.lease)
            except NotFound:
                pass  # it ended this moment
        lease = await self._store.grant_lease(TERM_S)
        await self._store.commit([Put(key, value, lease)])
        if entry is not None:
            await self._store.revoke_lease(entry.lease)
        return None


async def keep_lease(clock: Clock, keep: Callable[[], Awaitable[object]]) -> None:
    """Have a node kept, for ever. What fails is tried again a third of a term later."""
    while True:
        try:
            await keep()
        except TabaneError as error:
            log.info("this node's lease was not renewed now: %s", error)
        await sleep_until(clock, clock.now() + TERM_S / 3)


class Nodes:
    """On every node: which there are, by what is stored, and telling that to the hub."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._ended: set[NodeName] = set()
        """Nodes whose lease ended while this agent looked on."""

    def on_changes(self, changes: Iterable[Change]) -> None:
        """The replica has changed."""
        news = [change for change in changes if change.key.startswith(NODES)]
        for change in news:
            node = NodeName(change.key.removeprefix(NODES))
            if change.value is None:
                self._ended.add(node)
            else:
                self._ended.discard(node)
        if news:
            self._agent.later.call("hubs", 0.0, self._start_telling)

    async def tell(self) -> None:
        """Tell the hub. When it is away, it is told when it is back."""
        agent = self._agent
        kept = [parse_node(entry.value).peer for entry in agent.replica.range(NODES)]
        peers = hubs_of(agent.config.cluster, agent.config.key, kept, self._ended)
        try:
            await agent.me.set_hubs(peers)
        except (Closed, Unavailable) as error:
            log.info("the hub is told of the nodes when it is back: %s", error)

    async def keep(self) -> None:
        """Have this node's lease renewed."""
        agent = self._agent
        node = KeptNode(agent.config.node, agent.config.incarnation)
        if agent.leases is not None:
            await agent.leases.keep(node)
        else:
            control = agent_of(agent.config.cluster.control)
            await agent.me.send(control, say.encode(say.KeepNode(node)), timeout_s=TERM_S / 3)

    def _start_telling(self) -> None:
        if hasattr(self._agent, "me"):
            self._agent.tasks.start("hubs", self.tell())


def hubs_of(
    cluster: ClusterConfig,
    own: NodeName,
    kept: Iterable[Peer] = (),
    ended: Collection[NodeName] = (),
) -> list[middlecon.Peer]:
    """The other nodes' hubs: those of the configuration and those kept, without those whose lease
    has ended. Those of this data center and of earlier ones are dialed, the later ones dial."""
    nodes = {node.key: node for node in (*cluster.nodes, *kept) if node.key not in ended}
    nodes.pop(own, None)
    order = cluster.datacenters()
    here = order.index(own.partition("/")[0])
    peers = []
    for key, node in nodes.items():
        dialed = node.datacenter in order[: here + 1]
        url = f"tcp://{node.address}:{HUB_PORT}" if dialed else ""
        peers.append(middlecon.Peer(key, url, node.datacenter))
    return peers
