"""A hub's decisions without IO, and real hubs on short-lived sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tabane.middlecon import Client, Hub, blocking, connect, native
from tabane.middlecon.directory import Directory
from tabane.middlecon.frames import MAGIC, Decoder, Frame, JoinFlag, Kind, encode_frame
from tabane.middlecon.ports import LinkPort, Port, SessionPort
from tabane.middlecon.receipts import parse_receipt
from tabane.middlecon.relay import Relay
from tabane.middlecon.session import Hello, Limits, encode_hello
from tabane.middlecon.threads import LoopThread
from tabane.middlecon.wire import Wire

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


# Both of a hub's inner loops

LOOPS: dict[str, Any] = {"python": None}
try:
    from tabane.middlecon import _native
except ImportError:  # tests/test_build.py says whether that may be
    pass
else:
    LOOPS["c"] = _native


class Raw:
    """One side of a connection to the hub, which does nothing by itself."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._decoder = Decoder()
        self._magic = len(MAGIC)

    def tell(self, kind: int, **fields: Any) -> None:
        self.sock.sendall(encode_frame(kind, **fields))

    def open(self, name: str, instance: str = "x") -> None:
        self.sock.sendall(encode_hello(Hello(name, instance)))

    def frames(self) -> list[Frame]:
        """What has come, as far as it is whole."""
        return self._decoder.feed(self.read())

    def read(self) -> bytes:
        """All that has come, without the hub's magic."""
        data = b""
        try:
            while chunk := self.sock.recv(1 << 20, socket.MSG_DONTWAIT):
                data += chunk
        except BlockingIOError:
            pass
        skipped, self._magic = data[: self._magic], self._magic - len(data[: self._magic])
        assert skipped in MAGIC
        return data[len(skipped) :]

    def copy(self) -> Frame:
        """The one message that has come."""
        (frame,) = (f for f in self.frames() if f.kind in (Kind.SAY, Kind.ASK, Kind.SEND))
        return frame

    def receipts(self) -> list[Any]:
        return [parse_receipt(f) for f in self.frames() if f.kind == Kind.RECEIPT]

    def is_cut(self) -> bool:
        """Told that it broke the protocol, and closed."""
        kinds = [(f.kind, f.name) for f in self.frames()]
        return (Kind.ERROR, "protocol") in kinds and self.sock.recv(1) == b""


class Yard:
    """A hub and those who are connected to it. The one room there has the number `room`."""

    def __init__(self, hub: Hub, path: str) -> None:
        self.hub = hub
        self._path = path
        self.all: list[Raw] = []
        self.room = 0

    def turn(self) -> None:
        """Let the hub do all that is ready."""
        assert self.hub._reactor is not None
        self.hub._reactor._on_ready()

    def dial(self, address: str | None = None) -> Raw:
        if address is None:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(self._path)
        else:
            host, _, port = address.rpartition(":")
            sock = socket.create_connection((host, int(port)))
        self.all.append(Raw(sock))
        return self.all[-1]

    def join(self, name: str, flags: int = JoinFlag.MEMBER, address: str | None = None) -> Raw:
        raw = self.dial(address)
        raw.open(name)
        raw.tell(Kind.JOIN, flags=flags, id=1, name="room")
        self.turn()
        self.turn()
        self.room = next(f.to for f in raw.frames() if f.kind == Kind.JOIN)
        return raw

    def members(self, count: int) -> list[Raw]:
        return [self.join(f"m{number}") for number in range(count)]

    def say(self, sender: Raw, kind: int = Kind.SAY, **fields: Any) -> None:
        sender.tell(kind, to=self.room, id=9, value=60_000, **fields)
        self.turn()

    def wire(self, name: str) -> Wire:
        return next(wire for port, wire in self.hub._wires.items() if port.name == name)


@pytest.fixture(params=LOOPS)
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    chosen = LOOPS[request.param]
    monkeypatch.setattr(native, "loops", chosen)
    return chosen


@pytest.fixture
async def yard(loops: Any, tmp_path: Path) -> Any:
    listen = [f"unix://{tmp_path}/hub", "tcp://127.0.0.1:0"]
    limits = Limits(hold_bytes=8 << 20)
    async with Hub("hub", listen=listen, limits=limits, heartbeat_s=300.0, chat=False) as hub:
        yard = Yard(hub, f"{tmp_path}/hub")
        yield yard
        for raw in yard.all:
            raw.sock.close()
