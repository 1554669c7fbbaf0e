"""Clones of a machine: what each has of its own, and what goes wrong on the way. One boot does."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from tabane.clock import SYSTEM
from tabane.errors import Closed, EngineError, TabaneError, Unsupported
from tabane.guest.frames import Kind
from tabane.model import ExitStatus, Resources
from tabane.network.addresses import GATEWAY
from tabane.runtimes.api import Handle, Image, InstanceSpec
from tabane.runtimes.machines.saving import SAVING
from tabane.runtimes.qemu.driver import QemuDriver
from tabane.testing.checkpoints import place
from tabane.testing.containers import make_tree, open_directory
from tabane.testing.drivers import PATIENCE_S, until
from tabane.testing.machine_bench import MachineBench, Running, make_app

pytestmark = pytest.mark.real

CLONES = 3
CONNECTIONS = 9099
PROGRAM = f"""
busybox httpd -p 80 -h /srv
(busybox nc {GATEWAY} {CONNECTIONS} </dev/null; echo cut) &
while read name </proc/sys/kernel/hostname; do echo $name; sleep 0.02; done
"""
WHO = """#!/bin/sh
echo; hostname; cat /etc/hostname; cat /run/tabane/epoch || echo none; busybox date +%s
busybox od -An -v -tx1 -N16 /dev/urandom | busybox tr -d ' '; cat /kept; grep -c . /etc/hosts
busybox ip -4 -o addr show eth0
"""
APP = make_app(
    ("sh", "-c", PROGRAM),
    port=80,
    resources=Resources(cpu=1.0, memory_bytes=64 << 20, pids=32, disk_bytes=4 << 20),
)


@pytest.fixture(scope="module")
def ground() -> Iterator[Path]:
    with open_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def image(ground: Path) -> Image:
    image = make_tree(ground)
    (image.tree / "srv/cgi-bin").mkdir()
    (image.tree / "srv/cgi-bin/who").write_text(WHO.replace("grep", "busybox grep"))
    (image.tree / "srv/cgi-bin/who").chmod(0o755)
    return image


@pytest.fixture
def bench(microvms: MachineBench) -> MachineBench:
    return microvms


class Peer:
    """Who machines have a connection to."""

    def __init__(self) -> None:
        self.open = 0
        self._all: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self._all.add(writer)
        await reader.read()

    async def aclose(self) -> None:
        for writer in self._all:
            writer.close()


async def ask(spec: InstanceSpec, late_s: float = 1.0) -> list[str]:
    """Over its own wire: who it is, line by line. Its clock is right, too."""
    assert spec.link is not None
    began = int(SYSTEM.wall())
    reader, writer = await asyncio.open_connection(spec.link.address, 80)
    try:
        writer.write(b"GET /cgi-bin/who HTTP/1.0\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
    finally:
        writer.close()
    head, _, body = answer.decode().replace("\r\n", "\n").partition("\n\n")
    assert " 200 " in head, answer
    told = body.strip().splitlines()
    assert began - late_s <= int(told[3]) <= SYSTEM.wall() + 1
    return told


def said(spec: InstanceSpec) -> list[str]:
    return spec.log.read_text().rpartition("\n")[0].splitlines() if spec.log.exists() else []


async def has_said(spec: InstanceSpec, line: str) -> bool:
    return line in said(spec)


async def goes_on(spec: InstanceSpec) -> None:
    async def more() -> bool:
        return len(said(spec)) > before + 3

    before = len(said(spec))
    await until(more)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


async def test_clones(bench: MachineBench) -> None:
    peer = Peer()
    server = await asyncio.start_server(peer.serve, "0.0.0.0", CONNECTIONS)
    try:
        with place() as images:
            async with bench.running(APP) as origin:
                await begin(origin)
                await save(origin, peer, images)
                await see_clones(bench, origin, images)
                await see_broken(bench, images)
                await see_killed_restore(bench, images)
                origin = await see_lost_agent(bench, origin)
                await see_killed_dump(origin)
    finally:
        server.close()
        await peer.aclose()
        await server.wait_closed()


async def begin(origin: Running) -> None:
    """Its connection is made, and it has ended what it says there (FIN-WAIT-2): a program that is
    still about to connect does so in a clone, too."""
    await origin.driver.wait_listening(origin.handle, 80)
    await origin.run("echo kept > /kept")
    await origin.run("until busybox grep -q ' 05 ' /proc/net/tcp; do sleep 0.05; done")


async def save(origin: Running, peer: Peer, images: Path) -> None:
    """It goes on as if nothing had been, and what it never touched is not saved."""
    with pytest.raises(Unsupported, match="a machine that has a volume cannot be saved"):
        handle = replace(origin.handle, data=origin.handle.data | {"volumes": ["/v"]})
        await origin.driver.checkpoint(handle, images, leave_running=True)
    await origin.driver.checkpoint(origin.handle, images, leave_running=True)
    await goes_on(origin.spec)
    memory = (images / "memory").stat()
    assert memory.st_blocks * 512 < memory.st_size * 3 // 4
    who = await ask(origin.spec, PATIENCE_S)  # its clock was told before it was started
    assert who[:3] == [origin.spec.id, origin.spec.id, "none"]
    assert {*said(origin.spec)} == {origin.spec.id} and peer.open == 1


async def clone(
    stack: AsyncExitStack, bench: MachineBench, images: Path
) -> tuple[InstanceSpec, Handle]:
    spec, handle = await stack.enter_async_context(bench.prepared(APP))
    return spec, await bench.driver.restore(spec, handle, images)


async def see_clones(bench: MachineBench, origin: Running, images: Path) -> None:
    before = digest(images / "memory")
    async with AsyncExitStack() as stack:
        clones = await asyncio.gather(*(clone(stack, bench, images) for _ in range(CLONES)))
        told = [await ask(spec) for spec, _ in clones]
        for (spec, handle), who in zip(clones, told, strict=True):
            assert spec.link is not None
            name, etc, epoch, _, random, kept, hosts, address = who
            assert name == etc == spec.id and len(epoch) == 36 and len(random) == 32
            assert kept == "kept" and int(hosts) == 3
            assert f"inet {spec.link.address}/32" in address
            await until(partial(has_said, spec, "cut"))
            assert {*said(spec)} == {spec.id, "cut"}, "no program ran before it was another"
            running = Running(bench.driver, spec, handle)
            assert await running.run("cat /proc/meminfo; hostname > /kept; ls /run/tabane")
        assert len({who[2] for who in told}) == len({who[4] for who in told}) == CLONES
        for spec, _ in clones:
            assert (await ask(spec))[5] == spec.id, "each has a layer of its own"
        spec, handle = clones[0]
        await bench.driver.freeze(handle)
        await bench.driver.thaw(handle)
        await ask(spec)
        await bench.driver.stop(handle, PATIENCE_S)
        assert await bench.driver.wait(handle) == ExitStatus(signal=signal.SIGTERM)
    assert digest(images / "memory") == before
    await goes_on(origin.spec)
    assert {*said(origin.spec)} == {origin.spec.id}


async def see_broken(bench: MachineBench, images: Path) -> None:
    """What is as long as it was, and is not what it was: of QEMU's own, QEMU says so."""
    with place() as broken:
        shutil.copytree(images, broken, dirs_exist_ok=True, copy_function=os.link)
        state = bytearray((images / "state").read_bytes())
        state[len(state) // 2 :] = bytes(len(state) - len(state) // 2)
        (broken / "state").unlink()
        (broken / "state").write_bytes(state)
        async with bench.prepared(APP) as (spec, handle):
            with pytest.raises(EngineError, match=r"could not start .*: qemu-system"):
                await bench.driver.restore(spec, handle, broken)
        large = replace(APP, resources=replace(APP.resources, memory_bytes=128 << 20))
        async with bench.prepared(large) as (spec, handle):
            with pytest.raises(EngineError, match="bytes of memory, and is to have"):
                await bench.driver.restore(spec, handle, images)


async def see_killed_restore(bench: MachineBench, images: Path) -> None:
    async with bench.prepared(APP) as (spec, handle):
        restoring = asyncio.ensure_future(bench.driver.restore(spec, handle, images))
        pid = await read_pid(bench.driver.pid_file(handle))
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="could not start"):
            await restoring


async def read_pid(path: Path) -> int:
    async def written() -> bool:
        return path.exists() and path.read_text().endswith("\n")

    await until(written)
    return int(path.read_text())


async def see_lost_agent(bench: MachineBench, origin: Running) -> Running:
    """The node's agent is killed when all stands still for a dump: the next one has it go on."""
    guest = await origin.driver.reach(origin.handle)
    await guest.call(Kind.HOLD)
    await origin.driver.control(origin.handle, "stop")
    (origin.spec.directory / SAVING).write_text("")
    again = bench.restarted()
    assert isinstance(again, QemuDriver)
    handle = await again.recover(origin.spec, origin.handle)
    assert handle is not None
    await goes_on(origin.spec)
    assert not (origin.spec.directory / SAVING).exists()
    return Running(again, origin.spec, handle)


async def see_killed_dump(origin: Running) -> None:
    """QEMU dies in the middle: the instance has ended, and what it left is of no use."""

    async def begun() -> bool:
        return (origin.spec.directory / SAVING).exists()

    pid = origin.handle.data["pid"]
    assert isinstance(pid, int)
    with place() as images:
        saving = asyncio.ensure_future(
            origin.driver.checkpoint(origin.handle, images, leave_running=True)
        )
        await until(begun)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises((EngineError, Closed)):
            await saving
    status = await origin.driver.wait(origin.handle)
    assert status.signal == signal.SIGKILL
    with pytest.raises(TabaneError):
        await origin.driver.checkpoint(origin.handle, Path("/nowhere"), leave_running=True)
