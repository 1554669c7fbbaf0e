"""Nodes that have nothing but images and checkpoints: stores, what fills them, and the API about
them, for real.

    async with ImageNodes(directory, ("tokyo/tokyo-1", "tokyo/tokyo-2", "osaka/osaka-1")) as nodes:
        await nodes["tokyo/tokyo-1"].images.pull(Wanted(source="docker://..."), print)

Each listens on an address of its own within 127.0.0.0/8. What agents ask each other through hubs is
a function call here.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self

from fastapi import APIRouter, FastAPI

from tabane.api.app import handle_errors
from tabane.api.checkpoints import add_checkpoints
from tabane.api.guard import Guard
from tabane.api.images import add_images
from tabane.api.server import ApiServer
from tabane.clock import SYSTEM, Clock
from tabane.errors import Unreachable
from tabane.model import App, AppName, Class, NodeName
from tabane.network.uplink import ClusterNetwork
from tabane.node import messages as say
from tabane.node.answering import Answering, Answers
from tabane.node.checkpoints import NodeCheckpoints
from tabane.node.config import API_PORT, ClusterConfig, NodeConfig, Peer, node_of
from tabane.node.images import NodeImages
from tabane.node.membership import Membership
from tabane.runtimes.api import Capabilities, Probe
from tabane.supervise import Supervisor

TOKEN = "pretended"


class ImageNode:
    """An agent of which only the part about images and checkpoints is there. `apps` are those that
    it knows, `running` what its instances run from; checkpoints are to be loaded first."""

    def __init__(self, nodes: ImageNodes, config: NodeConfig, hubs: dict[str, bool]) -> None:
        self.config = config
        self.clock = nodes.clock
        self.tasks = nodes.tasks
        self.token = TOKEN
        self.apps: list[App] = []
        self.running: dict[str, set[str]] = {}
        self.asked: list[str] = []
        """Requests to its API."""
        self.nodes = Membership(config, hubs)
        self.replica = SimpleNamespace(revision=1)
        self.executor = SimpleNamespace(images=lambda: self.running)
        self.audit = SimpleNamespace(add=self._note)
        self.session = SimpleNamespace(wait=self._wait)
        self.me = SimpleNamespace(call=self._call)
        self.audited: list[str] = []
        self.answers = Answering(self)  # type: ignore[arg-type]
        self.images = NodeImages(self)  # type: ignore[arg-type]
        saved = Capabilities(restore=True, saves_kernel_state=True, saves_processor_state=True)
        engines = {
            "runc": SimpleNamespace(capabilities=saved, isolation=Class.CONTAINER),
            "qemu": SimpleNamespace(capabilities=Capabilities(), isolation=Class.MICROVM),
        }
        versions = {"runc": "1.1.5", "criu": "4.2.1"}
        probes = {"runc": Probe(True, "", versions=versions), "qemu": Probe(True, "")}
        self.engines = SimpleNamespace(drivers=engines, probes=probes)
        self.checkpoints = NodeCheckpoints(self, _make_directory)  # type: ignore[arg-type]
        self._all = nodes

    def app(self, key: AppName) -> App | None:
        return next((app for app in self.apps if app.key == key), None)

    def all_apps(self) -> list[App]:
        return self.apps

    def build_app(self) -> Any:
        """Its API, behind its guard."""
        router, app = APIRouter(), FastAPI()
        add_images(router, self)  # type: ignore[arg-type]
        add_checkpoints(router, self)  # type: ignore[arg-type]
        app.include_router(router, prefix="/api/v1")
        handle_errors(app)
        guarded = Guard(app, TOKEN, frozenset({self.config.node.address}))

        async def note(scope: Any, receive: Any, send: Any) -> None:
            self.asked.append(f"{scope['method']} {scope['path']}")
            await guarded(scope, receive, send)

        return note

    async def ask_all(self, request: say.Message, timeout_s: float) -> Answers:
        """Of the nodes that are there."""
        there = [node for node in self._all.values() if self._all.is_there(node.config.key)]
        told = {n.config.key: await n.answers.answer("", request) or b"" for n in there}
        silent = (key for key in self.config.cluster.keys if key not in told)
        return Answers(told, tuple(silent))

    async def _call(self, member: str, data: bytes, *, timeout_s: float) -> bytes:
        node = node_of(member)
        if not self._all.is_there(node):
            raise Unreachable(f"{node} is not there")
        return await self._all[node].answers.answer("", say.parse(data)) or b""

    async def _wait(self, timeout_s: float) -> None: ...

    def _note(self, line: Any) -> None:
        self.audited.append(f"{line.action} {line.target}")


def _make_directory(directory: Path, size_bytes: int) -> None:
    """In place of a file system in memory."""
    directory.mkdir(parents=True, exist_ok=True)


class ImageNodes(dict[str, ImageNode]):
    """See the module's text. The nodes by their names."""

    def __init__(
        self,
        directory: Path,
        keys: Sequence[str],
        *,
        quota_bytes: int = 0,
        clock: Clock = SYSTEM,
    ) -> None:
        super().__init__()
        self.clock = clock
        self.tasks = Supervisor("image nodes")
        self._directory = directory
        self._quota_bytes = quota_bytes
        self._hubs = dict.fromkeys(keys, True)
        place = f"127.77.{os.getpid() % 250}"
        peers = [
            Peer(key.partition("/")[0], key.partition("/")[2], f"{place}.{number}")
            for number, key in enumerate(keys, 1)
        ]
        network = ClusterNetwork("images", "127.0.0.0/8")
        self._cluster = ClusterConfig("images", tuple(peers), NodeName(keys[0]), network)
        self._servers: dict[str, tuple[ApiServer, socket.socket]] = {}

    async def __aenter__(self) -> Self:
        for peer in self._cluster.nodes:
            directory = self._directory / peer.key
            directory.mkdir(parents=True)
            config = NodeConfig(
                cluster=self._cluster,
                node=peer,
                root=str(self._directory),
                directory=str(directory),
                incarnation="one-life",
                cgroup="/pretended",
                image_quota_bytes=self._quota_bytes,
            )
            node = self[peer.key] = ImageNode(self, config, self._hubs)
            listener = socket.create_server((peer.address, API_PORT))
            server = ApiServer(node.build_app(), self.tasks)
            server.serve([listener])
            self._servers[peer.key] = (server, listener)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for key in tuple(self._servers):
            await self.end(key)
        await self.tasks.aclose()

    def is_there(self, key: str) -> bool:
        return key in self._servers

    async def end(self, key: str) -> None:
        """A node goes away, and the others see it."""
        self._hubs[key] = False
        server, listener = self._servers.pop(key)
        await server.aclose()
        listener.close()
