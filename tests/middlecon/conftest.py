"""A hub's decisions without IO, and real hubs on short-lived sockets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tabane.middlecon import Client, Hub, blocking, connect
from tabane.middlecon.directory import Directory
from tabane.middlecon.frames import Decoder, Frame, JoinFlag, Kind
from tabane.middlecon.relay import Relay
from tabane.middlecon.rooms import LinkPort, Port, SessionPort
from tabane.middlecon.session import Limits
from tabane.middlecon.threads import LoopThread

uvloop.new_event_loop().close()
"""The first loop of a process opens descriptors for good: so before any test."""


class Brain:
    """One hub's decisions. What it sends lies in the ports' outboxes until `taken`."""

    def __init__(self, name: str = "h", datacenter: str = "", **limits: Any) -> None:
        self.directory = Directory(name, Limits(**limits), datacenter)
        self.relay = Relay(self.directory)
        self.now = 0.0

    def session(self, name: str) -> SessionPort:
        port = SessionPort(name, lambda: None)
        self.directory.open_session(port)
        return port

    def link(self, peer: str, instance: str = "", datacenter: str = "") -> LinkPort:
        port = LinkPort(peer, lambda: None, instance, datacenter)
        self.directory.open_link(port)
        return port

    def tell(self, port: Port, kind: int, **fields: Any) -> list[Frame]:
        """A frame comes in; what its sender gets back at once."""
        self.relay.receive(port, Frame(kind, **fields), self.now)
        return taken(port)

    def join(self, port: SessionPort, room: str, flags: int | None = None) -> int:
        """Join, drop the snapshot, and return the room's number."""
        flags = JoinFlag.MEMBER | JoinFlag.WATCH if flags is None else flags
        frames = self.tell(port, Kind.JOIN, name=room, flags=flags)
        return next(frame.to for frame in frames if frame.kind == Kind.JOIN)


def taken(port: Port) -> list[Frame]:
    """What is in a port's outbox, which is then empty."""
    frames = Decoder().feed(b"".join(port.urgent + port.out))
    port.urgent, port.out = [], []
    return frames


@pytest.fixture
def brain() -> Brain:
    return Brain()


@pytest.fixture
def make_brain() -> type[Brain]:
    return Brain


@pytest.fixture
def take() -> Callable[[Port], list[Frame]]:
    return taken


class Cluster:
    """Hubs and clients that are closed at the end of the test."""

    def __init__(self, directory: Path, stack: AsyncExitStack) -> None:
        self._directory = directory
        self._stack = stack

    async def hub(self, name: str = "hub", **options: Any) -> Hub:
        options.setdefault("listen", [f"unix://{self._directory}/{name}"])
        return await self._stack.enter_async_context(Hub(name, **options))

    def url(self, hub: str = "hub") -> str:
        return f"unix://{self._directory}/{hub}"

    async def client(self, name: str | None = None, hub: str = "hub", **options: Any) -> Client:
        url = options.pop("url", self.url(hub))
        return await self._stack.enter_async_context(await connect(url, name=name, **options))

    async def pair(self) -> tuple[Hub, Hub]:
        """Two hubs, `a` and `b`, linked."""
        a, b = await self.hub("a"), await self.hub("b")
        a.link("b", self.url("b"))
        await until(lambda: a.peers.get("b") and b.peers.get("a"))
        return a, b


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        yield Cluster(tmp_path, stack)


async def until(is_so: Callable[[], object], *, within_s: float = 10.0) -> None:
    """Let the loop run until something is so."""
    async with asyncio.timeout(within_s):
        while not is_so():  # noqa: ASYNC110 - what tests wait for has no event of its own
            await asyncio.sleep(0.002)


@pytest.fixture
def eventually() -> Callable[..., Awaitable[None]]:
    return until


class ThreadedHub:
    """A hub in a thread of its own, and the clients of a test."""

    def __init__(self, directory: Path) -> None:
        self.url = f"unix://{directory}/hub"
        self.hub: Hub | None = None
        self._clients = ExitStack()
        self._thread = LoopThread("hub", self._stop, list)
        self._thread.start()

    def start(self, **options: Any) -> None:
        async def start() -> None:
            self.hub = Hub("hub", listen=[self.url], **options)
            await self.hub.start()

        self._thread.call(start)

    async def _stop(self) -> None:
        if self.hub is not None:
            await self.hub.aclose()
            self.hub = None

    def stop(self) -> None:
        self._thread.call(self._stop)

    def client(self, name: str | None = None, **options: Any) -> blocking.Client:
        return self._clients.enter_context(blocking.connect(self.url, name=name, **options))

    def close(self) -> None:
        self._clients.close()
        self._thread.stop()


@pytest.fixture
def no_threads_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        with suppress(RuntimeError):
            thread.join(20)
        assert not thread.is_alive(), f"{thread.name} still runs"


@pytest.fixture
def hub(tmp_path: Path, no_threads_left: None) -> Iterator[ThreadedHub]:
    hub = ThreadedHub(tmp_path)
    hub.start()
    yield hub
    hub.close()
