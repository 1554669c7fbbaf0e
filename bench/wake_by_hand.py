"""The engine by hand, as the first process of a node of its own: no Tabane on the way.

It prepares the very bundle the driver makes (not timed), then runs `ENGINE run` on it and asks the
port for its first byte again and again. An engine that the driver wraps (`BARE`) is run as its
manual has it, with its own defaults. On a unix socket it takes the name of an app file of its
directory, without `.toml`, a line, and answers with milliseconds.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from msgspec.structs import replace

from tabane import spec
from tabane.images import ImageStore, Packed, pack
from tabane.model import App, new_instance_id
from tabane.network import NetworkPool, prepare_node
from tabane.node.local import HERE
from tabane.runtimes import half_open, registry
from tabane.runtimes.api import Command, Driver, Handle, Image, InstanceSpec, Link
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.machines.disks import disk_of
from tabane.runtimes.machines.kernel import find_kernel
from tabane.runtimes.oci import OciDriver
from tabane.runtimes.qemu.machine import AGENT_FD, END_FD, ERR_SET, INSIDE, OUT_FD, QMP_FD, TAP_FD
from tabane.runtimes.runsc.engine import find_engine
from tabane.runtimes.tap import TAP
from tabane.testing.spawner import PlainSpawner

ID_BASE = 1 << 24
POLL_S = 0.0005
TIMEOUT_S = 60.0
CONNECT_S = 0.05
REQUEST = b"GET / HTTP/1.0\r\n\r\n"


@dataclass
class Made:
    """An instance by hand."""

    spec: InstanceSpec
    driver: Driver
    handle: Handle

    @property
    def is_bare(self) -> bool:
        return self.driver.name in BARE

    @property
    def link(self) -> Link:
        assert self.spec.link is not None
        return self.spec.link

    @property
    def port(self) -> int:
        assert self.spec.app.port is not None
        return self.spec.app.port


class ByHand:
    def __init__(self, directory: Path, cgroup: str) -> None:
        self.directory = directory
        self.cgroup = cgroup
        self.spawner = PlainSpawner()
        self.pool = NetworkPool(self.spawner, "by-hand", size=2)
        self.drivers: dict[str, Driver] = {}
        self.images = ImageStore(directory / "images")
        self.apps: dict[str, App] = {}

    async def start(self) -> None:
        await prepare_node([])
        await self.pool.recover()

    async def measure(self, name: str) -> float:
        """Milliseconds from starting the engine to the program's first byte."""
        app = await self.app(name)
        image = await self.images.prepare(app.image)
        if is_module(image):
            return await self.first_output(bare_module(image))
        made = await self.make(app, image)
        took_ms = await self.begin(made, self.started(made))
        await self.end(made)
        return took_ms

    async def make(self, app: App, image: Image) -> Made:
        """An instance that its engine has only to start."""
        link = await self.pool.claim(ID_BASE, egress=True)
        instance = new_instance_id()
        place = Path(tempfile.mkdtemp(dir=HERE / "run"))
        place.chmod(0o711)
        spec = InstanceSpec(
            id=instance,
            app=app,
            image=image,
            link=link,
            directory=place,
            log=place / "log",
            cgroup=f"{self.cgroup}/{instance}",
        )
        driver = await self.driver(app.driver)
        return Made(spec, driver, await driver.prepare(spec))

    def started(self, made: Made) -> Awaitable[Handle | None]:
        """Has its engine start it."""
        if made.is_bare:
            return self.run_bare(BARE[made.driver.name](made.driver, made.spec))
        return made.driver.start(made.spec, made.handle)

    async def begin(self, made: Made, run: Awaitable[Handle | None]) -> float:
        """Milliseconds that `run` takes until the program's first byte."""
        began = time.perf_counter()
        starting = asyncio.ensure_future(run)
        if made.driver.capabilities.own_stack:
            await half_open.wait_listening(made.link.address, made.port)
        await first_byte(made.link.address, made.port)
        took_ms = (time.perf_counter() - began) * 1000
        made.handle = await starting or made.handle
        return took_ms

    async def first_output(self, argv: tuple[str, ...]) -> float:
        """Milliseconds from starting a program to its first byte, in a cgroup and namespaces as an
        instance's: by the programs that there are for that, without a list of system calls."""
        link = await self.pool.claim(ID_BASE, egress=True)
        cgroup = Cgroup(f"{self.cgroup}/{new_instance_id()}")
        cgroup.make({"cpu": 1.0, "memory_bytes": 128 << 20, "pids": 64})
        began = time.perf_counter()
        process = await asyncio.create_subprocess_exec(
            *cgroup.entering(apart(link, argv)), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        assert await process.stdout.read(1)
        took_ms = (time.perf_counter() - began) * 1000
        await process.communicate()
        await cgroup.remove()
        await self.pool.release(link)
        return took_ms

    async def run_bare(self, argv: tuple[str, ...]) -> None:
        await self.spawner.spawn(Command("bare", argv))

    async def end(self, made: Made) -> None:
        if made.is_bare:
            await self.spawner.signal("bare", signal.SIGTERM)
            await self.spawner.exited("bare")
            await self.spawner.forget("bare")
        else:
            await made.driver.stop(made.handle, 2.0)
        await self.clear(made)

    async def clear(self, made: Made) -> None:
        """Remove what is left of one that has ended."""
        await made.driver.destroy(made.handle)
        await self.pool.release(made.link)
        shutil.rmtree(made.spec.directory)

    async def app(self, name: str) -> App:
        if name not in self.apps:
            app = spec.load_app(self.directory / f"{name}.toml")
            digest = app.image
            if digest != "host":
                packed = await asyncio.to_thread(pack, app.image, self.directory)
                with packed:
                    digest = await self.images.import_layout(_in_chunks(packed))
            self.apps[name] = replace(app, image=digest, id_base=ID_BASE)
        return self.apps[name]

    async def driver(self, engine: str) -> Driver:
        """As a node has it: what it finds out once is in its bundles."""
        if engine not in self.drivers:
            place = HERE / "run" / "drivers" / engine
            self.drivers[engine] = registry.load(engine, self.spawner, place)
            probe = await self.drivers[engine].probe()
            assert probe.works, probe.reason
            if isinstance(self.drivers[engine], OciDriver):
                self.drivers[engine]._path = shutil.which(engine)  # where anybody finds it
        return self.drivers[engine]


async def first_byte(address: str, port: int) -> float:
    """Milliseconds until the program's first byte, from now on. Tries take little time, so that
    they take none from the engine; some programs (Apache) listen twice, and what came to the first
    socket is reset."""
    began = time.perf_counter()
    async with asyncio.timeout(TIMEOUT_S):
        while not await is_answered(address, port):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(POLL_S)
    return (time.perf_counter() - began) * 1000


async def is_answered(address: str, port: int) -> bool:
    with socket.socket() as sock:
        sock.settimeout(CONNECT_S)
        if sock.connect_ex((address, port)) != 0:
            return False
        try:
            sock.sendall(REQUEST)
            sock.setblocking(False)
            return bool(await asyncio.get_running_loop().sock_recv(sock, 1))
        except ConnectionError:
            return False


async def _in_chunks(packed: Packed) -> AsyncIterator[bytes]:
    for chunk in packed.chunks():
        yield chunk


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


def bare_qemu(driver: Driver, spec: InstanceSpec) -> tuple[str, ...]:
    """As root, with the same kernel, disks and devices, by the names of files instead of open
    descriptors."""
    words = driver._parts.command_line(spec)  # type: ignore[attr-defined]
    words = words[words.index("--") + 1 :]
    here, parts = spec.directory, driver._parts  # type: ignore[attr-defined]
    kernel = find_kernel()
    names = {
        f"{INSIDE}/vmlinux": kernel.vmlinux,
        f"{INSIDE}/initramfs": parts._initramfs,
        f"{INSIDE}/image0": disk_of(spec.image.tree),
        f"{INSIDE}/start": here / "start",
        f"{INSIDE}/layer": here / "layer",
        f"/dev/fdset/{OUT_FD}": here / "out",
        f"/dev/fdset/{ERR_SET}": here / "err",
        f"/dev/fdset/{END_FD}": here / "end",
        f"fd={QMP_FD},server": f"path={here}/qmp.sock,server",
        f"fd={AGENT_FD},server": f"path={here}/agent.sock,server",
        f"tap,id=net,fd={TAP_FD}": f"tap,id=net,ifname={TAP},script=no,downscript=no",
    }
    found: list[str] = []
    for word in words:
        if word == "-add-fd":
            continue
        if word.startswith("fd=") and ",set=" in word:
            continue
        for name, real in names.items():
            word = word.replace(name, str(real))
        found.append(word)
    assert spec.link is not None
    run = ("nsenter", f"--net={spec.link.network_namespace}", "--", *found)
    return Cgroup(spec.cgroup).entering(run)


def bare_component(driver: Driver, spec: InstanceSpec) -> tuple[str, ...]:
    """`wasmtime serve` with code that was compiled ahead, as root."""
    code = compiled(spec.image)
    assert spec.link is not None
    address = f"--addr={spec.link.address}:{spec.app.port}"
    run = (*wasmtime(), "serve", "--allow-precompiled", address, "-S", "cli", str(code))
    return ("nsenter", f"--net={spec.link.network_namespace}", "--", *run)


def is_module(image: Image) -> bool:
    """Of WebAssembly, and no component."""
    if image.kind != "wasm":
        return False
    return source_of(image).read_bytes()[4:8] == b"\1\0\0\0"


def source_of(image: Image) -> Path:
    return image.tree / image.entrypoint[0].lstrip("/")


def apart(link: Link, argv: tuple[str, ...]) -> tuple[str, ...]:
    """In the link's namespaces and others of its own, without capabilities."""
    joined = (f"--user={link.user_namespace}", f"--net={link.network_namespace}")
    own = ("--mount", "--ipc", "--uts", "--pid", "--fork", "--kill-child")
    rights = ("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all")
    return ("nsenter", *joined, "--", "unshare", *own, "setpriv", *rights, *argv)


def bare_module(image: Image) -> tuple[str, ...]:
    """`wasmtime run`, likewise: one request of a CGI program, whose answer is its output."""
    environment = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "GATEWAY_INTERFACE": "CGI/1.1"}
    told = (f"--env={name}={value}" for name, value in environment.items())
    options = ("-C", "cache=n", "--allow-precompiled")
    return (*wasmtime(), "run", *options, *told, str(compiled(image)))


def wasmtime() -> tuple[str, ...]:
    """The program of the wheel; pip does not make what it unpacks executable."""
    found = find_spec("wasmtime_cli")
    assert found is not None and found.origin is not None
    return ("/lib64/ld-linux-x86-64.so.2", str(Path(found.origin).parent / "wasmtime"))


def compiled(image: Image) -> Path:
    """Code of an image's module or component, made once by the same program."""
    target = HERE / "run" / f"{image.digest.removeprefix('sha256:')[:16]}.cwasm"
    if not target.exists():
        argv = (*wasmtime(), "compile", "-o", str(target), str(source_of(image)))
        subprocess.run(argv, check=True, capture_output=True)
    return target


BARE = {
    "runsc": lambda driver, spec: bare_runsc(spec),
    "qemu-microvm": bare_qemu,
    "qemu": bare_qemu,
    "wasmtime": bare_component,
}


async def serve(directory: Path, answer: Callable[[str], Awaitable[float]]) -> None:
    """Answer each line at the socket in `directory`, for ever; with words when that fails."""

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            try:
                writer.write(b"%f\n" % await answer(line.decode().strip()))
            except Exception as error:
                traceback.print_exc()
                writer.write(f"{type(error).__name__}: {error}".replace("\n", " ").encode() + b"\n")

    server = await asyncio.start_unix_server(take, directory / "hand.sock")
    await server.serve_forever()


async def main() -> None:
    directory = Path(sys.argv[1])
    hand = ByHand(directory, sys.argv[2])
    await hand.start()
    await serve(directory, hand.measure)


if __name__ == "__main__":
    asyncio.run(main())
