"""A gateway's process as a node has it, but for its node: `python -m peers.gateway PORT APP-PORT`.

Its router keeps its books as ever. The app's home is asked once, and grants slots enough for all.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys

import uvloop

from tabane.clock import SYSTEM
from tabane.gateway.http import HttpGateway
from tabane.gateway.messages import Demand, Grant, ToHome
from tabane.gateway.router import GatewayRouter
from tabane.model import App, AppName, Generation, InstanceId, NodeName, Reactive, WakeRecord
from tabane.supervise import Supervisor

SLOTS = 100_000


class Home:
    """The surroundings of the router, with one instance that is ready."""

    node = NodeName("here/node")
    datacenter = "here"
    name = "here/node/gateway-0"
    token = "token"

    def __init__(self, app_port: int) -> None:
        reactive = Reactive(concurrency=SLOTS)
        self.app = App("app", "host", hosts=("127.0.0.1",), port=app_port, reactive=reactive)
        self.router = GatewayRouter(self, SYSTEM)
        self.router.set_routes([self.app], ())

    def tell_home(self, app: AppName, message: ToHome) -> None:
        if isinstance(message, Demand) and message.waiting:
            asyncio.get_running_loop().call_soon(self._grant, message)

    def _grant(self, demand: Demand) -> None:
        generation = Generation("incarnation", InstanceId("instance"), 1)
        port, epoch = self.app.port, demand.epoch
        assert port is not None
        grant = Grant(
            *(demand.app, 0, generation, self.node, "127.0.0.1", port),
            *(SLOTS, epoch, demand.waiting),
        )
        self.router.hear(grant)

    def gateway_of(self, node: NodeName) -> tuple[str, int]:
        raise AssertionError("there is one node")

    def live_nodes(self) -> list[NodeName]:
        return [self.node]

    def on_wake(self, record: WakeRecord) -> None: ...

    def kick(self) -> None: ...


async def serve(port: int, app_port: int) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    async with Supervisor("gateway") as tasks:
        gateway = HttpGateway(Home(app_port).router, tasks)
        await gateway.serve(socket.create_server(("127.0.0.1", port), backlog=4096))
        await ended.wait()
        await gateway.aclose()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))
