"""The hub process of a node: `python -m tabane.node.hubd CONFIG.json`."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable

from tabane.middlecon import Hub
from tabane.node.config import NodeConfig
from tabane.node.leases import hubs_of
from tabane.node.part import run_part
from tabane.supervise import Supervisor


async def serve(
    config: NodeConfig, sockets: dict[str, socket.socket], tasks: Supervisor
) -> Callable[[], Awaitable[None]]:
    """Serve this node's processes, keep links to the hubs of this data center and, if none of an
    earlier one can be reached, have one there."""
    token = config.token()
    hub = Hub(
        config.key,
        listen=sockets.values(),
        token=token,
        datacenter=config.node.datacenter,
        chat=False,
    )
    await hub.start()
    hub.set_peers(hubs_of(config.cluster, config.key))
    return hub.aclose


if __name__ == "__main__":
    run_part(serve)
