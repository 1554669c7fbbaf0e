"""The hub process of a node: `python -m tabane.node.hubd CONFIG.json`."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable

from tabane.middlecon import Hub
from tabane.node.config import HUB_PORT, NodeConfig
from tabane.node.part import run_part
from tabane.supervise import Supervisor


async def serve(
    config: NodeConfig, sockets: dict[str, socket.socket], tasks: Supervisor
) -> Callable[[], Awaitable[None]]:
    """Serve this node's processes, keep links to the hubs of this data center and, if none of an
    earlier one can be reached, have one there."""
    token = config.token()
    here = config.node.datacenter
    order = config.cluster.datacenters()
    hub = Hub(config.key, listen=sockets.values(), token=token, datacenter=here, chat=False)
    await hub.start()
    for peer in config.cluster.nodes:
        if peer.key == config.key:
            continue
        if order.index(peer.datacenter) > order.index(here):
            hub.expect(peer.key)
        else:
            url = f"tcp://{peer.address}:{HUB_PORT}"
            hub.link(peer.key, url, token, datacenter=peer.datacenter)
    return hub.aclose


if __name__ == "__main__":
    run_part(serve)
