"""A data center of one node in this process: real gateway, real decisions, a pretended engine.

    async with PretendNode(app) as node:
        await fetch(node.port, "hello.test")

Everything between a request and the engine is what a node runs: `HttpGateway`, `GatewayRouter`,
`Home`, `Executor`. Only the messages between them go by a function call instead of a hub, and the
engine is `tabane.runtimes.fake`. It needs no root and no namespace: the pretended instances listen
on addresses of their own within 127.0.0.0/8, and are asked by HTTP whether they are ready.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import msgspec
from msgspec.structs import replace

from tabane.clock import SYSTEM, Clock
from tabane.errors import Unsupported
from tabane.gateway.activation import (
    AppChanged,
    InstanceAwake,
    InstanceEnded,
    InstanceReady,
    StillStarting,
)
from tabane.gateway.http import HttpGateway
from tabane.gateway.messages import ToGateway, ToHome
from tabane.gateway.router import GatewayRouter
from tabane.model import App, AppName, Class, InstanceId, NodeName, WakeRecord
from tabane.node.home import Home
from tabane.node.instances import Executor
from tabane.node.putting_away import save_as_told
from tabane.node.running import Transition
from tabane.runtimes.api import Image, InstanceSpec, Link
from tabane.runtimes.fake import FakeDriver, Script
from tabane.runtimes.volumes import VolumeFiles
from tabane.scheduler.engines import EngineView
from tabane.scheduler.placement import NodeView
from tabane.supervise import Supervisor
from tabane.testing.saved import PretendCheckpoints

NODE = NodeName("here/here-1")


class PretendLinks:
    """Addresses on loopback, each used again only after its release."""

    def __init__(self) -> None:
        self._numbers = itertools.count(2)
        self.in_use: set[str] = set()

    async def claim(self, id_base: int, *, egress: bool) -> Link:
        number = next(self._numbers)
        address = f"127.96.{number >> 8 & 255}.{number & 255}"
        self.in_use.add(address)
        return Link(number, address, "127.96.0.1", os.getpid(), 0)

    async def release(self, link: Link) -> None:
        self.in_use.remove(link.address)

    async def recover(self, in_use: Iterable[Link]) -> None:
        self.in_use = {link.address for link in in_use}


class PretendImages:
    """All have the host's, which is always there."""

    async def prepare_for(self, app: App) -> Image:
        return Image("host", Path("/"))

    def describe(self, app: App) -> str:
        return "its image is being prepared"


class PretendServices:
    """No app here asks for any."""

    async def open(self, spec: InstanceSpec) -> None:
        raise Unsupported(f"{spec.app.key}: a pretended node has no services")

    async def close(self, spec: InstanceSpec) -> None: ...


class PretendNode:
    """See the module's text. `script` says what the program does; `port` is the gateway's."""

    def __init__(self, *apps: App, script: Script | None = None, clock: Clock = SYSTEM) -> None:
        self.node = NODE
        self.datacenter = "here"
        self.name = f"{NODE}/gateway-0"
        self.token = "pretended"
        self.apps = {app.key: ask_by_http(app) for app in apps}
        self.driver = FakeDriver(script)
        self.links = PretendLinks()
        self.wakes: list[WakeRecord] = []
        self.events: list[Transition] = []
        self.on_change: Callable[[Transition], None] = self.events.append
        self.tasks = Supervisor("pretend")
        self._directory = tempfile.TemporaryDirectory(prefix="tabane-pretend-")
        self.checkpoints = PretendCheckpoints(Path(self._directory.name, "checkpoints"))
        self._clock = clock
        self.router = GatewayRouter(self, clock)
        self.gateway = HttpGateway(self.router, self.tasks)
        self.home = Home(self, clock, app_of=self.apps.get, nodes=lambda: [VIEW])
        self.executor = Executor(
            NODE,
            "one-life",
            Path(self._directory.name, "run"),
            Path(self._directory.name, "logs"),
            "/pretended",
            links=self.links,
            services=PretendServices(),
            volumes=VolumeFiles(Path(self._directory.name, "volumes")),
            images=PretendImages(),
            checkpoints=self.checkpoints,
            driver_for=lambda app: self.driver,
            driver_named=lambda name: self.driver,
            clock=clock,
            tasks=self.tasks,
            notify=self._on_instance,
            on_change=lambda transition: self.on_change(transition),
        )

    async def __aenter__(self) -> Self:
        await self.checkpoints.store.load()
        self.router.set_routes(self.apps.values(), ())
        self.home.on_gateway(self.name, joined=True)
        self.home.hear(self.name, self.router.report(frozenset()))
        sock = socket.create_server(("127.0.0.1", 0))
        self.port: int = sock.getsockname()[1]
        await self.gateway.serve(sock)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.gateway.aclose()
        await self.executor.stop_all()
        self.home.close()
        await self.tasks.aclose()
        for life in self.driver.world.lives.values():
            await life.aclose()  # it was being stopped
        self._directory.cleanup()

    def change(self, app: App) -> None:
        """Deploy a revision."""
        app = ask_by_http(app)
        self.apps[app.key] = app
        self.router.set_routes([app], ())
        self.home.handle(AppChanged(app.key, app))

    def records(self) -> list[Path]:
        """What is remembered of instances on disk."""
        return list(Path(self._directory.name).glob("run/*/record.json"))

    def _on_instance(
        self, event: InstanceReady | InstanceEnded | InstanceAwake | StillStarting
    ) -> None:
        key = event.instance.app if isinstance(event, InstanceReady) else event.app
        self.home.about(key, event)

    # The home's performer

    def start_instance(
        self, node: NodeName, app: App, instance: InstanceId, *, resume: bool = False
    ) -> None:
        self.executor.start(app, instance, self._clock.now(), resume=resume)

    def freeze_instance(
        self, node: NodeName, instance: InstanceId, number: int, reason: str = ""
    ) -> None:
        self.executor.freezer.freeze(instance, number, reason)

    def save_instance(
        self, node: NodeName, instance: InstanceId, number: int, *, ends: bool = False
    ) -> None:
        save_as_told(self.executor, instance, number, ends=ends)

    def thaw_instance(self, node: NodeName, instance: InstanceId) -> None:
        self.executor.freezer.thaw(instance)

    def stop_instance(self, node: NodeName, instance: InstanceId, reason: str) -> None:
        self.executor.stop(instance, reason)

    def release_instance(self, node: NodeName, instance: InstanceId) -> None:
        self.executor.release(instance)

    def tell_gateway(self, gateway: str, message: ToGateway) -> None:
        asyncio.get_running_loop().call_soon(self.router.hear, message)

    # The router's surroundings

    def tell_home(self, app: AppName, message: ToHome) -> None:
        asyncio.get_running_loop().call_soon(self.home.hear, self.name, message)

    def gateway_of(self, node: NodeName) -> tuple[str, int]:
        return "127.0.0.1", self.port

    def live_nodes(self) -> list[NodeName]:
        return [NODE]

    def on_wake(self, record: WakeRecord) -> None:
        self.wakes.append(record)

    def kick(self) -> None:
        self.gateway.kick()


VIEW = NodeView(NODE, (EngineView("fake", Class.CONTAINER),))


def ask_by_http(app: App) -> App:
    """There is no namespace whose socket table could tell."""
    return replace(app, reactive=replace(app.reactive, ready="http:/"))


async def fetch(port: int, host: str) -> tuple[int, bytes]:
    """One GET on a connection of its own: status and the answer's body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    await writer.wait_closed()
    return int(head.split(b" ", 2)[1]), body


def show(app: App) -> dict[str, Any]:
    """A cold wake, for people without root: the answer and the wake record."""

    async def wake() -> dict[str, Any]:
        async with PretendNode(app) as node:
            status, body = await fetch(node.port, app.hosts[0])
            record = msgspec.to_builtins(node.wakes[0])
            return {"status": status, "answer": body.decode(), "wake": record}

    return asyncio.run(wake())
