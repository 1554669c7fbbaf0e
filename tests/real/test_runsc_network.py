"""A sandbox's own network stack: at its link's address, and behind the node's firewall."""

from __future__ import annotations

import asyncio
import ctypes
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tabane.images import ImageStore
from tabane.model import new_instance_id
from tabane.network import NetworkPool, links, prepare_node
from tabane.network.addresses import GATEWAY
from tabane.runtimes import load
from tabane.runtimes.api import InstanceSpec
from tabane.runtimes.runsc.driver import RunscDriver
from tabane.testing.container_bench import Running, make_app
from tabane.testing.containers import ID_BASE, SMALL, find_left, open_directory
from tabane.testing.drivers import wait_until_said
from tabane.testing.leaks import name_cgroup
from tabane.testing.spawner import PlainSpawner

pytestmark = pytest.mark.real

CLONE_NEWNET = 0x40000000
PORT = 8000
COUNT = """
import socket
sock = socket.create_server(("", 8000), backlog=4)
print("listens", flush=True)
while True:
    there, peer = sock.accept()
    print("accepted", flush=True)
    there.sendall(b"hello")
    there.close()
"""
ONLY_BOUND = """
import socket, time
sock, other = socket.socket(), socket.create_server(("127.0.0.1", 8001))
sock.bind(("", 8000))
print("bound", flush=True)
time.sleep(1000)
"""
REACH = """
import socket, sys
for target in sys.argv[1:]:
    address, port = target.rsplit(":", 1)
    try:
        socket.create_connection((address, int(port)), 0.5).close()
        print(target, "reached")
    except OSError as error:
        print(target, "not reached")
print("done", flush=True)
"""


class Ground:
    """A node's network, in which sandboxes are started."""

    def __init__(self, directory: Path, spawner: PlainSpawner, pool: NetworkPool) -> None:
        self.directory = directory
        self.pool = pool
        driver = load("runsc", spawner, directory / "runsc")
        assert isinstance(driver, RunscDriver)
        self.driver = driver
        self._images = ImageStore(directory / "images")

    @asynccontextmanager
    async def running(
        self, script: str, *words: str, egress: bool = True
    ) -> AsyncIterator[Running]:
        """A sandbox with a Python program."""
        identity, image = new_instance_id(), await self._images.prepare("host")
        link = await self.pool.claim(ID_BASE, egress=egress)
        place = self.directory / identity
        place.mkdir()
        app = make_app(
            ("/usr/bin/python3", "-c", script, *words),
            name=f"net-{identity}",
            resources=replace(SMALL, memory_bytes=128 << 20),
            port=PORT,
        )
        log, cgroup = self.directory / f"{identity}.log", name_cgroup(identity)
        spec = InstanceSpec(identity, app, image, link, place, log, cgroup)
        handle = await self.driver.prepare(spec)
        try:
            handle = await self.driver.start(spec, handle)
            yield Running(self.driver, spec, handle)
        finally:
            await self.driver.destroy(handle)
            await self.pool.release(link)
        assert find_left(spec) == []


def on_a_node(scenario: Callable[[Ground], Coroutine[Any, Any, None]]) -> None:
    """Run a scenario in a thread with a network namespace of its own, and see that no link is
    left."""
    name = f"test-{uuid.uuid4().hex[:8]}"

    async def run(directory: Path) -> None:
        await prepare_node([IPv4Network("198.51.100.0/24")])
        spawner = PlainSpawner()
        pool = NetworkPool(spawner, name, size=1)
        await pool.recover()
        ground = Ground(directory, spawner, pool)
        try:
            await scenario(ground)
        finally:
            ground.driver.close()
            await pool.destroy()
            await spawner.forget("parked")  # reaps what it has adopted
            await spawner.aclose()
        assert links.find_links() == set()
        assert links.find_parked(name) == set()

    problems: list[BaseException] = []

    def enter_and_run() -> None:
        try:
            assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) == 0
            with open_directory() as directory:
                asyncio.run(run(directory))
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=enter_and_run)
    thread.start()
    thread.join()
    if problems:
        raise problems[0]


async def fetch(address: str) -> bytes:
    reader, writer = await asyncio.open_connection(address, PORT)
    try:
        return await reader.read()
    finally:
        writer.close()


def test_half_a_handshake_is_no_connection_to_the_program() -> None:
    async def scenario(ground: Ground) -> None:
        async with ground.running(COUNT) as inside:
            address = str(inside.handle.data["address"])
            for _ in range(20):
                async with asyncio.timeout(60):
                    await inside.driver.wait_listening(inside.handle, PORT)
            assert await fetch(address) == b"hello"
            await wait_until_said(inside.spec, b"accepted")
            for _ in range(20):
                async with asyncio.timeout(60):
                    await inside.driver.wait_listening(inside.handle, PORT)
            assert await fetch(address) == b"hello"
            await inside.driver.stop(inside.handle, 20)
            assert inside.spec.log.read_text() == "listens\naccepted\naccepted\n"

    on_a_node(scenario)


def test_who_does_not_listen_there_is_not_ready() -> None:
    """Bound is not listening, and neither is loopback; asking in vain can be given up."""

    async def scenario(ground: Ground) -> None:
        async with ground.running(ONLY_BOUND) as inside:
            await wait_until_said(inside.spec, b"bound")
            for port in (PORT, 8001):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await inside.driver.wait_listening(inside.handle, port)

    on_a_node(scenario)


@pytest.mark.parametrize("egress", [True, False])
def test_the_nodes_firewall_holds_for_sandboxes(egress: bool) -> None:
    """It reaches the node's gateway and resolver, and no other service of the node's."""

    async def scenario(ground: Ground) -> None:
        servers = [
            await asyncio.start_server(lambda _, writer: writer.close(), address, port)
            for address, port in ((str(GATEWAY), 80), (str(GATEWAY), 8080), ("127.0.0.1", 81))
        ]
        targets = (f"{GATEWAY}:80", f"{GATEWAY}:8080", "127.0.0.1:81")
        async with ground.running(REACH, *targets, egress=egress) as inside:
            await wait_until_said(inside.spec, b"done")
            answers = ("reached", "not reached", "not reached")
            lines = [f"{target} {said}" for target, said in zip(targets, answers, strict=True)]
            assert inside.spec.log.read_text().splitlines() == [*lines, "done"]
        for server in servers:
            server.close()
            await server.wait_closed()

    on_a_node(scenario)


def test_an_ordinary_user_has_low_ports() -> None:
    """There are no reserved ones in there."""
    script = """
import os, socket, time
os.setgid(34); os.setuid(33)
sock = socket.create_server(("", 25))
print("listens", os.getuid(), flush=True)
time.sleep(1000)
"""

    async def scenario(ground: Ground) -> None:
        async with ground.running(script) as inside:
            await wait_until_said(inside.spec, b"listens 33")
            async with asyncio.timeout(60):
                await inside.driver.wait_listening(inside.handle, 25)

    on_a_node(scenario)
