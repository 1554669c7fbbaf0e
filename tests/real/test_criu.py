"""Checkpoints of containers: a clone is an instance of its own, and confined as any other; what
cannot be copied is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from tests.real.cloning import bench, clone, ground, host, no_hybrid, said, wait_said

from tabane.clock import SYSTEM
from tabane.errors import Conflict, EngineError, Unsupported
from tabane.model import App, Resources
from tabane.network.netlink import run_in_network_of
from tabane.runtimes.api import Driver, Execution, Handle, InstanceSpec
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.criu.driver import CriuDriver
from tabane.runtimes.pods import log_of, with_pods
from tabane.testing.checkpoints import counted, counting, place, wait_counted
from tabane.testing.container_bench import ContainerBench, make_app
from tabane.testing.containers import make_instance, make_tree
from tabane.testing.drivers import Behaviour
from tabane.testing.pods import FIRST
from tabane.testing.reach import reachable
from tabane.testing.talks import run_inside

__all__ = ["bench", "ground", "host", "no_hybrid"]
pytestmark = pytest.mark.real

RESOURCES = Resources(cpu=1.0, memory_bytes=128 << 20, pids=32, disk_bytes=4 << 20)
PROGRAM = """
import json, mmap, os, random, socket, sys, threading, time
listener = socket.create_server(("0.0.0.0", 8000))
local = socket.socket(socket.AF_UNIX)
local.bind("/tmp/local.sock")
local.listen()
open("/tmp/kept", "w").write("kept")
os.mkdir("/etc/empty")
gone = open("/tmp/gone", "w+")
gone.write("gone")
gone.flush()
os.unlink("/tmp/gone")
os.unlink("/etc/services")
shared = open("/dev/shm/shared", "w+b")
shared.write(b"shared" + bytes(4090))
shared.flush()
memory = mmap.mmap(shared.fileno(), 4096)
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
count = 0
while True:
    count += 1
    try:
        epoch = open("/run/tabane/epoch").read().strip()
    except FileNotFoundError:
        epoch = ""
    gone.seek(0)
    print(json.dumps({
        "count": count, "epoch": epoch, "host": socket.gethostname(), "wall": time.time(),
        "monotonic": time.monotonic(), "boot": time.clock_gettime(time.CLOCK_BOOTTIME),
        "gone": gone.read(), "shared": memory[:6].decode(), "threads": threading.active_count(),
        "services": os.path.exists("/etc/services"),
    }), flush=True)
    time.sleep(0.02)
"""
STATUS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")
IDS = ("Seccomp_filters", "Uid", "Gid", "Groups", "SigIgn", "SigCgt", "Threads")


def program(name: str = "subject", script: str = PROGRAM, **fields: Any) -> App:
    command = ("/usr/bin/python3", "-c", script)
    return make_app(command, name=name, resources=RESOURCES, **fields)


async def test_each_clone_is_an_instance_of_its_own(bench: ContainerBench) -> None:
    """Its name, address, namespaces, epoch and files are its own; its memory goes on, and so do
    the clocks."""
    app = program()
    with place() as images:
        async with bench.running(app) as origin:
            before = (await wait_said(origin.spec, 3))[-1]
            assert before["epoch"] == "" and not before["services"]
            await bench.driver.checkpoint(origin.handle, images, leave_running=False)
            last = said(origin.spec)[-1]
        async with clone(bench, app, images) as one, clone(bench, app, images) as two:
            for spec, handle in (one, two):
                first = (await wait_said(spec, 3))[0]
                assert first["count"] == last["count"] + 1
                assert first["host"] == spec.id
                assert 0 <= first["monotonic"] - last["monotonic"] < 1
                assert 0 <= first["boot"] - last["boot"] < 1
                assert abs(first["wall"] - SYSTEM.wall()) < 60
                for name in ("gone", "shared", "services", "threads"):
                    assert first[name] == last[name], name
                await check_surroundings(bench, spec, handle)
            epochs = [said(spec)[-1]["epoch"] for spec, _ in (one, two)]
            assert len({uuid.UUID(epoch) for epoch in epochs}) == 2
            script = "echo changed >/tmp/kept; cat /tmp/kept"
            await run_inside(bench.driver, one[1], ("sh", "-c", script))
            there = await run_inside(bench.driver, two[1], ("cat", "/tmp/kept"))
            assert there.stdout == b"kept"


async def check_surroundings(bench: ContainerBench, spec: InstanceSpec, handle: Handle) -> None:
    assert spec.link is not None
    for name, path in (("user", spec.link.user_namespace), ("net", spec.link.network_namespace)):
        own = Path(f"/proc/{handle.data['pid']}/ns/{name}").stat()
        assert os.path.samestat(own, Path(path).stat()), name
    assert ":1F40 " in Path(f"/proc/{spec.link.parked_pid}/net/tcp").read_text()
    script = "hostname; cat /etc/hostname; grep -c $(hostname) /etc/hosts; ls /etc/empty"
    shown = await run_inside(bench.driver, handle, ("sh", "-c", script))
    assert shown == (0, f"{spec.id}\n{spec.id}\n1\n".encode(), b"")
    filled = await run_inside(
        bench.driver, handle, ("dd", "if=/dev/zero", "of=/big", "bs=1M", "count=6")
    )
    assert b"No space left" in filled.stderr
    assert (await run_inside(bench.driver, handle, ("rm", "/big"))).code == 0
    pids = await bench.driver.processes(handle)
    assert handle.data["pid"] in pids and len(pids) == 2
    assert (await bench.driver.stats(handle)).pids == 3


async def test_a_clone_is_confined_as_what_it_was_made_of(bench: ContainerBench) -> None:
    app = program()
    with place() as images:
        async with bench.running(app) as origin:
            await wait_said(origin.spec)
            before = describe(await bench.driver.processes(origin.handle), origin.spec)
            await bench.driver.checkpoint(origin.handle, images, leave_running=False)
        async with clone(bench, app, images) as (spec, handle):
            await wait_said(spec)
            assert describe(await bench.driver.processes(handle), spec) == before
            end = await run_inside(bench.driver, handle, ("cat", "/proc/self/status"))
            inside = end.stdout.decode()
            assert "NoNewPrivs:\t1" in inside and "Seccomp:\t2" in inside
            assert "CapBnd:\t00000000800005fb" in inside


def describe(pids: list[int], spec: InstanceSpec) -> dict[str, Any]:
    """What confines the processes of an instance, in words that are the same for each."""
    found: dict[str, Any] = {"limits": Cgroup(spec.cgroup).limits()}
    for number, pid in enumerate(sorted(pids)):
        process = Path(f"/proc/{pid}")
        lines = (process / "status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        own = [line.split(":")[2] for line in (process / "cgroup").read_text().splitlines()]
        found[f"process {number}"] = {
            **{name: status[name] for name in STATUS + IDS},
            "calls": reachable(pid),
            "limits": (process / "limits").read_text(),
            "oom": (process / "oom_score_adj").read_text(),
            "files": sorted(path.name for path in (process / "fd").iterdir()),
            "command": (process / "cmdline").read_bytes(),
            "cgroup": own.count(spec.cgroup) >= len(Cgroup(spec.cgroup).own_directories()),
        }
        for kind in ("user", "net", "pid", "mnt", "ipc", "uts", "cgroup"):
            theirs = (process / "ns" / kind).stat()
            assert not os.path.samestat(theirs, Path("/proc/self/ns", kind).stat()), kind
    found["mounts"] = mounts_of(sorted(pids)[0])
    return found


def mounts_of(pid: int) -> dict[str, tuple[str, ...]]:
    """Mount point -> options, without those that tell nothing of an empty file or directory."""
    found = {}
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        point, options = line.split(" ")[4:6]
        masked = point.startswith(("/proc/", "/sys/")) and " - proc " not in line
        found[point] = () if masked else tuple(sorted(options.split(",")))
    return found


ECHO = """
import json, select, socket
listener = socket.create_server(("0.0.0.0", 8000))
talks = []
print(json.dumps("listens"), flush=True)
while True:
    for ready in select.select([listener, *talks], [], [])[0]:
        if ready is listener:
            talks.append(listener.accept()[0])
            continue
        try:
            data = ready.recv(100)
        except OSError:
            data = b""
        if data:
            ready.sendall(data)
        else:
            talks.remove(ready)
            print(json.dumps("closed"), flush=True)
"""


async def test_connections_go_on_here_and_are_closed_there(bench: ContainerBench) -> None:
    """Of what is saved and left running nobody notices; a copy sees that the other end is gone,
    and takes new connections."""
    app = program("echo", ECHO)
    with place() as images:
        async with bench.running(app) as origin:
            await wait_said(origin.spec)
            with await connect(origin.spec) as talk:
                assert await echo(talk, b"before") == b"before"
                await bench.driver.checkpoint(origin.handle, images, leave_running=True)
                assert await echo(talk, b"after") == b"after"
                assert said(origin.spec) == ["listens"]
        async with clone(bench, app, images) as (spec, _):
            assert await wait_said(spec) == ["closed"]
            with await connect(spec) as talk:
                assert await echo(talk, b"new") == b"new"


async def connect(spec: InstanceSpec) -> socket.socket:
    """From within the link's network namespace."""
    assert spec.link is not None
    enter = ("nsenter", f"--net={spec.link.network_namespace}", "ip", "link", "set", "lo", "up")
    await asyncio.to_thread(subprocess.run, enter, check=True)
    dial = partial(socket.create_connection, ("127.0.0.1", 8000), 10)
    return await asyncio.to_thread(run_in_network_of, spec.link.parked_pid, dial)


async def echo(talk: socket.socket, data: bytes) -> bytes:
    await asyncio.to_thread(talk.sendall, data)
    return await asyncio.to_thread(talk.recv, 100)


WORKERS = """
import json, multiprocessing, os, socket
from multiprocessing import shared_memory
listener = socket.create_server(("0.0.0.0", 8000))
served = multiprocessing.Value("i", 0)
block = shared_memory.SharedMemory(create=True, size=4096)

def serve():
    while True:
        talk, _ = listener.accept()
        with served.get_lock():
            served.value += 1
            block.buf[0] = served.value
        talk.recv(100)
        talk.sendall(json.dumps([served.value, block.buf[0]]).encode())
        talk.close()

workers = [multiprocessing.Process(target=serve) for _ in range(3)]
for worker in workers:
    worker.start()
print(json.dumps("listens"), flush=True)
workers[0].join()
"""


async def test_workers_share_what_they_shared(bench: ContainerBench) -> None:
    """Processes below one another, a semaphore and memory that they have in common: each clone's
    are its own."""
    app = program("workers", WORKERS)
    with place() as images:
        async with bench.running(app) as origin:
            await wait_said(origin.spec)
            with await connect(origin.spec) as talk:
                assert await echo(talk, b"?") == b"[1, 1]"
            await bench.driver.checkpoint(origin.handle, images, leave_running=False)
        async with clone(bench, app, images) as one, clone(bench, app, images) as two:
            for spec, handle in (one, two):
                for expected in (b"[2, 2]", b"[3, 3]"):
                    with await connect(spec) as talk:
                        assert await echo(talk, b"?") == expected
                assert len(await bench.driver.processes(handle)) >= 5


@pytest.mark.parametrize("frozen", [False, True])
async def test_several_containers_are_saved_as_one(bench: ContainerBench, frozen: bool) -> None:
    pods = dataclasses.replace(
        bench, driver=with_pods(bench.driver), image=make_tree(bench.ground / uuid.uuid4().hex)
    )
    driver, kind = pods.driver, (Behaviour.COUNTS, Behaviour.COUNTS)
    with place() as images:
        async with pods.pod(*kind) as spec, running(driver, spec) as handle:
            both = each_of(spec)
            for part in both:
                await wait_counted(part, 5)
            if frozen:
                await driver.freeze(handle)
            await driver.checkpoint(handle, images, leave_running=True)
            if frozen:
                assert Cgroup(spec.cgroup).is_frozen()
                await driver.thaw(handle)
            last = [counted(part)[-1] for part in both]
            for part, number in zip(both, last, strict=True):
                await wait_counted(part, number + 3)
            shutil.rmtree(images)
            images.mkdir(mode=0o700)
            await driver.checkpoint(handle, images, leave_running=False)
            assert await driver.processes(handle) == []
            last = [counted(part)[-1] for part in both]
        async with pods.pod(*kind) as spec:
            prepared = await driver.prepare(spec)
            try:
                handle = await driver.restore(spec, prepared, images)
                for part, number in zip(each_of(spec), last, strict=True):
                    assert (await wait_counted(part, number + 3))[0] == number + 1
                epochs = [
                    await run_inside(driver, handle, ("cat", "/run/tabane/epoch"), container=name)
                    for name in ("", FIRST)
                ]
                assert epochs[0].stdout == epochs[1].stdout != b""
                await driver.stop(handle, 10)
            finally:
                await driver.destroy(prepared)
            assert pods.left_of(spec) == []


def each_of(spec: InstanceSpec) -> list[InstanceSpec]:
    """The main container and the one beside it, by their logs."""
    return [replace(spec, log=log_of(spec.log, name)) for name in ("", FIRST)]


@asynccontextmanager
async def running(driver: Driver, spec: InstanceSpec) -> AsyncIterator[Handle]:
    prepared = await driver.prepare(spec)
    try:
        yield await driver.start(spec, prepared)
    finally:
        await driver.destroy(prepared)


OWN_ADDRESS = """
import socket, time
listener = socket.create_server(("10.9.8.7", 8000))
print("{}", flush=True)
time.sleep(1000)
"""


async def test_a_program_that_listens_at_its_own_address_is_refused(bench: ContainerBench) -> None:
    app = program("own", OWN_ADDRESS)
    with place() as images:
        async with make_instance(bench.ground, bench.image, app) as spec:
            assert spec.link is not None
            enter = ("nsenter", f"--net={spec.link.network_namespace}")
            for words in ("link set lo up", "addr add 10.9.8.7/32 dev lo"):
                await asyncio.to_thread(subprocess.run, (*enter, "ip", *words.split()), check=True)
            handle = await bench.driver.prepare(spec)
            try:
                handle = await bench.driver.start(spec, handle)
                await wait_said(spec)
                with pytest.raises(Unsupported, match=r"socket at 10\.9\.8\.7:8000"):
                    await bench.driver.checkpoint(handle, images, leave_running=False)
                assert not Cgroup(spec.cgroup).is_frozen()
            finally:
                await bench.driver.destroy(handle)
    assert isinstance(bench.driver, CriuDriver)


async def test_nothing_is_saved_while_a_command_runs_inside(bench: ContainerBench) -> None:
    with place() as images:
        async with counting(bench) as (_, handle):
            talk = await bench.driver.exec(handle, Execution(("cat",), stdin=True))
            with pytest.raises(Conflict, match="while commands run inside"):
                await bench.driver.checkpoint(handle, images, leave_running=True)
            await talk.aclose()
            await bench.driver.checkpoint(handle, images, leave_running=True)


OUTSIDE = """
import socket, time
client = socket.socket(socket.AF_UNIX)
client.connect("/run/tabane/hub.sock")
print("{}", flush=True)
count = 0
while True:
    count += 1
    print("{}", flush=True)
    time.sleep(0.02)
"""


async def test_what_criu_cannot_save_goes_on_and_says_why(bench: ContainerBench) -> None:
    """A connection to a service of the node, which has its other end outside."""
    services = bench.ground / f"services-{bench.driver.name}"
    services.mkdir(mode=0o755)
    with place() as images, socket.socket(socket.AF_UNIX) as hub:
        hub.bind(str(services / "hub.sock"))
        (services / "hub.sock").chmod(0o666)
        hub.listen()
        async with make_instance(bench.ground, bench.image, program("outside", OUTSIDE)) as spec:
            spec = replace(spec, services=services)
            handle = await bench.driver.prepare(spec)
            try:
                handle = await bench.driver.start(spec, handle)
                await wait_said(spec)
                with pytest.raises(EngineError, match="could not be checkpointed: ") as failure:
                    await bench.driver.checkpoint(handle, images, leave_running=True)
                assert "unix" in failure.value.output.lower()
                await wait_said(spec, len(said(spec)) + 3)
                assert [path.name for path in spec.directory.glob("dump*")] == []
            finally:
                await bench.driver.destroy(handle)
    shutil.rmtree(services)


async def test_services_are_those_of_the_clone(bench: ContainerBench) -> None:
    app = program("served")
    with place() as images:
        ends = [bench.ground / f"{bench.driver.name}-{name}" for name in ("one", "two")]
        for services in ends:
            services.mkdir(mode=0o755)
            (services / "who").write_text(services.name)
        async with make_instance(bench.ground, bench.image, app) as spec:
            spec = replace(spec, services=ends[0])
            handle = await bench.driver.prepare(spec)
            try:
                handle = await bench.driver.start(spec, handle)
                await wait_said(spec)
                await bench.driver.checkpoint(handle, images, leave_running=False)
            finally:
                await bench.driver.destroy(handle)
        async with make_instance(bench.ground, bench.image, app) as spec:
            spec = replace(spec, services=ends[1])
            handle = await bench.driver.prepare(spec)
            try:
                handle = await bench.driver.restore(spec, handle, images)
                shown = await run_inside(bench.driver, handle, ("cat", "/run/tabane/who"))
                assert shown.stdout.decode() == ends[1].name
                assert (await wait_said(spec))[-1]["epoch"] == (ends[1] / "epoch").read_text()[:-1]
            finally:
                await bench.driver.destroy(handle)
        async with make_instance(bench.ground, bench.image, app) as spec:
            handle = await bench.driver.prepare(spec)
            try:
                with pytest.raises(EngineError, match="has no /run/tabane to restore"):
                    await bench.driver.restore(spec, handle, images)
            finally:
                await bench.driver.destroy(handle)
            assert bench.left_of(spec) == []
        for services in ends:
            shutil.rmtree(services)
