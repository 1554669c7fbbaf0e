"""The agent process of a node: `python -m tabane.node.agentd CONFIG.json`."""

from __future__ import annotations

import socket

from tabane.clock import SYSTEM
from tabane.node.agent import Agent
from tabane.node.config import NodeConfig
from tabane.node.part import Close, run_part
from tabane.supervise import Supervisor


async def serve(config: NodeConfig, sockets: dict[str, socket.socket], tasks: Supervisor) -> Close:
    """Recover, join, and only then answer on the API."""
    agent = Agent(config, SYSTEM, tasks)
    await agent.start()
    from tabane.api.app import build_app
    from tabane.api.contained import ContainedK2i
    from tabane.api.server import ApiServer

    server = ApiServer(build_app(agent), tasks)
    server.serve(list(sockets.values()))
    await agent.services.k2i.attach(ContainedK2i(agent).serve)
    await agent.services.lease.attach(agent.activity.serve)

    async def close() -> None:
        await server.aclose()
        await agent.services.k2i.aclose()
        await agent.services.lease.aclose()
        await agent.aclose()

    return close


if __name__ == "__main__":
    run_part(serve)
