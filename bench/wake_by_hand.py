"""The engine by hand, as the first process of a node of its own: no Tabane on the way.

It prepares the very bundle the driver makes (not timed), then runs `ENGINE run` on it and asks the
port for its first byte again and again. An engine that the driver wraps (`BARE`) is run as its
manual has it, with its own defaults. On a unix socket it takes an engine's name a line and answers
with milliseconds.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

from msgspec.structs import replace

from tabane import spec
from tabane.images import ImageStore
from tabane.model import new_instance_id
from tabane.network import NetworkPool, prepare_node
from tabane.node.local import HERE
from tabane.runtimes import half_open, registry
from tabane.runtimes.api import Command, Driver, Handle, InstanceSpec
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.runsc.engine import find_engine
from tabane.testing.spawner import PlainSpawner

ID_BASE = 1 << 24
POLL_S = 0.0005
TIMEOUT_S = 10.0
CONNECT_S = 0.05
REQUEST = b"GET / HTTP/1.0\r\n\r\n"


class ByHand:
    def __init__(self, directory: Path, cgroup: str) -> None:
        self.directory = directory
        self.cgroup = cgroup
        self.spawner = PlainSpawner()
        self.pool = NetworkPool(self.spawner, "by-hand", size=2)
        self.drivers: dict[str, Driver] = {}
        self.images = ImageStore(directory / "images")
        app = spec.parse_app((directory / "app.toml").read_text())
        self.app = replace(app, id_base=ID_BASE)

    async def start(self) -> None:
        await prepare_node([])
        await self.pool.recover()

    async def measure(self, engine: str) -> float:
        """Milliseconds from starting the engine to the program's first byte."""
        driver = await self.driver(engine)
        link = await self.pool.claim(ID_BASE, egress=True)
        instance = new_instance_id()
        place = Path(tempfile.mkdtemp(dir=HERE / "run"))
        place.chmod(0o711)
        image = await self.images.prepare("host")
        made = InstanceSpec(
            id=instance,
            app=self.app,
            image=image,
            link=link,
            directory=place,
            log=place / "log",
            cgroup=f"{self.cgroup}/{instance}",
        )
        handle = await driver.prepare(made)
        run = self.run_bare(BARE[engine](made)) if engine in BARE else driver.start(made, handle)
        began = time.perf_counter()
        starting = asyncio.ensure_future(run)
        if driver.capabilities.own_stack:
            await half_open.wait_listening(link.address, self.app.port)
        await self.first_byte(link.address)
        took_ms = (time.perf_counter() - began) * 1000
        await self.end(engine, driver, await starting or handle)
        await self.pool.release(link)
        shutil.rmtree(place)
        return took_ms

    async def run_bare(self, argv: tuple[str, ...]) -> None:
        await self.spawner.spawn(Command("bare", argv))

    async def end(self, engine: str, driver: Driver, handle: Handle) -> None:
        if engine in BARE:
            await self.spawner.signal("bare", signal.SIGTERM)
            await self.spawner.exited("bare")
            await self.spawner.forget("bare")
        else:
            await driver.stop(handle, 2.0)
        await driver.destroy(handle)

    async def driver(self, engine: str) -> Driver:
        """As a node has it: what it finds out once is in its bundles."""
        if engine not in self.drivers:
            place = HERE / "run" / "drivers" / engine
            self.drivers[engine] = registry.load(engine, self.spawner, place)
            probe = await self.drivers[engine].probe()
            assert probe.works, probe.reason
        return self.drivers[engine]

    async def first_byte(self, address: str) -> None:
        """Tries take little time, so that they take none from the engine."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                with socket.socket() as sock:
                    sock.settimeout(CONNECT_S)
                    if sock.connect_ex((address, self.app.port)) == 0:
                        sock.sendall(REQUEST)
                        sock.setblocking(False)
                        assert await loop.sock_recv(sock, 1)
                        return
                await asyncio.sleep(POLL_S)


def bare_runsc(spec: InstanceSpec) -> tuple[str, ...]:
    """As root, with the one cover without which it refuses to take the link over, and in the
    cgroup with the limits, which it would make itself where it finds all controllers."""
    cover = 'mount -t tmpfs none /proc/sys/net && exec "$0" "$@"'
    own = ("unshare", "--mount", "--propagation", "slave", "sh", "-c", cover)
    path, state = find_engine().path, spec.directory / "bare"
    state.mkdir()
    engine = (path, "--root", str(state), "--network=sandbox", "--ignore-cgroups")
    run = (*own, *engine, "run", "-bundle", str(spec.directory), spec.id)
    return Cgroup(spec.cgroup).entering(run)


BARE = {"runsc": bare_runsc}


async def main() -> None:
    directory = Path(sys.argv[1])
    hand = ByHand(directory, sys.argv[2])
    await hand.start()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(b"%f\n" % await hand.measure(line.decode().strip()))

    server = await asyncio.start_unix_server(serve, directory / "hand.sock")
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
