"""Instances of WebAssembly programs for tests, without a node, and requests to those that serve."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from tabane.model import App, Resources
from tabane.network.netlink import LOOPBACK_INDEX, Rtnetlink, run_in_network_of
from tabane.network.netlink import set_up as set_link_up
from tabane.network.sockets import SocketTable
from tabane.runtimes import load
from tabane.runtimes.api import Driver, Handle, Image, InstanceSpec, Link
from tabane.runtimes.unikernel.wasmtime import WasmtimeDriver
from tabane.testing.containers import ID_BASE, find_left, make_instance
from tabane.testing.drivers import Behaviour, until
from tabane.testing.spawner import PlainSpawner
from tabane.testing.wasm import compile_wasm, make_program_image

PORT = 8000
TOO_MUCH = "-Wl,--initial-memory=134217728"
RESOURCES = Resources(memory_bytes=32 << 20, pids=32)


@dataclass(frozen=True)
class Images:
    behaves: Image
    breaks: Image
    cgi: Image


def make_app(*command: str, name: str = "app", **fields: Any) -> App:
    app = App(name=name, image="test", command=command, resources=RESOURCES, id_base=ID_BASE)
    return replace(app, image_kind="wasm", **fields)


def bring_up(link: Link) -> None:
    """The loopback interface, which a link without a node has, is its network."""

    def set_up() -> None:
        with Rtnetlink() as inside:
            inside.perform([set_link_up(LOOPBACK_INDEX)])

    run_in_network_of(link.parked_pid, set_up)


async def listening(link: Link) -> None:
    with SocketTable(link.parked_pid) as sockets:

        async def listens() -> bool:
            return sockets.listens(link.address, PORT)

        await until(listens)


async def ask(link: Link, head: str, body: bytes = b"") -> Reply:
    """One request to what listens in a link's network, and all of its answer."""
    loop = asyncio.get_running_loop()
    sock = run_in_network_of(link.parked_pid, socket.socket)
    sock.setblocking(False)
    with sock:
        await loop.sock_connect(sock, (link.address, PORT))
        await loop.sock_sendall(
            sock, f"{head}\r\nHost: here\r\nConnection: close\r\n\r\n".encode() + body
        )
        answer = b""
        while part := await loop.sock_recv(sock, 65536):
            answer += part
    return Reply.parse(answer)


@dataclass(frozen=True)
class Reply:
    status: int
    head: str
    body: bytes
    whole: bool

    @classmethod
    def parse(cls, answer: bytes) -> Reply:
        head, _, rest = answer.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" not in head.lower():
            return cls(int(head.split()[1]), head.decode(), rest, True)
        body, ended = b"", False
        while rest and not ended:
            line, _, rest = rest.partition(b"\r\n")
            size = int(line, 16)
            body += rest[:size]
            rest, ended = rest[size + 2 :], size == 0
        return cls(int(head.split()[1]), head.decode(), body, ended)


@dataclass
class WasmBench:
    driver: WasmtimeDriver
    spawner: PlainSpawner
    ground: Path
    images: Images

    def restarted(self) -> Driver:
        return load("wasmtime", self.spawner, self.ground / "wasmtime")

    @asynccontextmanager
    async def instance(self, behaviour: Behaviour) -> AsyncIterator[InstanceSpec]:
        image = self.images.breaks if behaviour is Behaviour.BREAKS else self.images.behaves
        port = PORT if behaviour is Behaviour.STAYS else None
        app = make_app(behaviour, name=behaviour, port=port)
        async with make_instance(self.ground, image, app) as spec:
            if behaviour is not Behaviour.STAYS:
                yield spec
                return
            asking = asyncio.ensure_future(self._keep_busy(spec))
            yield spec
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _keep_busy(self, spec: InstanceSpec) -> None:
        """An answer that is not finished is what makes a host deaf to its stop signal."""
        assert spec.link is not None
        bring_up(spec.link)
        await listening(spec.link)
        await ask(spec.link, "GET / HTTP/1.1")

    def left_of(self, spec: InstanceSpec) -> list[str]:
        return find_left(spec)

    @asynccontextmanager
    async def running(self, app: App, image: Image) -> AsyncIterator[Running]:
        async with make_instance(self.ground, image, app) as spec:
            assert spec.link is not None
            bring_up(spec.link)
            handle = await self.driver.prepare(spec)
            try:
                handle = await self.driver.start(spec, handle)
                yield Running(self.driver, spec, handle, spec.link)
            finally:
                await self.driver.destroy(handle)
            assert self.left_of(spec) == []

    @asynccontextmanager
    async def serving(self, *command: str, **fields: Any) -> AsyncIterator[Running]:
        """The CGI program of the tests."""
        app = make_app(*command, port=PORT, **fields)
        async with self.running(app, self.images.cgi) as inside:
            yield inside


@dataclass
class Running:
    driver: WasmtimeDriver
    spec: InstanceSpec
    handle: Handle
    link: Link

    @property
    def pid(self) -> int:
        pid = self.handle.data["pid"]
        assert isinstance(pid, int)
        return pid

    async def get(self, path: str, *, method: str = "GET", fields: str = "") -> Reply:
        return await ask(self.link, f"{method} {path} HTTP/1.1{fields}")


def make_images(ground: Path, sources: Path) -> Images:
    """From the C programs in `sources`; all is made in `ground`."""

    def make(source: str, name: str, *options: str) -> Image:
        program = compile_wasm(sources / source, ground / f"{name}.wasm", *options)
        return make_program_image(program, ground)

    return Images(
        make("behaves.c", "behaves"), make("behaves.c", "breaks", TOO_MUCH), make("cgi.c", "cgi")
    )


@asynccontextmanager
async def open_bench(ground: Path, images: Images) -> AsyncIterator[WasmBench]:
    spawner = PlainSpawner()
    driver = load("wasmtime", spawner, ground / "wasmtime")
    assert isinstance(driver, WasmtimeDriver)
    yield WasmBench(driver, spawner, ground, images)
    await spawner.aclose()
