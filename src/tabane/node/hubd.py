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
    """Serve this node's processes and keep a link to every other node's hub."""
    token = config.token()
    hub = Hub(config.key, listen=sockets.values(), token=token)
    await hub.start()
    for peer in config.cluster.nodes:
        if peer.key != config.key:
            hub.link(peer.key, f"tcp://{peer.address}:{HUB_PORT}", token)
    return hub.aclose


if __name__ == "__main__":
    run_part(serve)
