"""gVisor's runsc keeps to the interface, and sandboxes are confined as the table says."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from tabane.errors import Conflict, EngineError, Unsupported
from tabane.images import ImageStore
from tabane.model import ExitStatus, Resources, SecurityPolicy, Volume
from tabane.runtimes import load
from tabane.runtimes.api import InstanceSpec
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.runsc import driver as runsc
from tabane.runtimes.runsc import engine, formats
from tabane.runtimes.volumes import VolumeFiles
from tabane.testing.checkpoints import CHECKPOINT_CHECKS
from tabane.testing.container_bench import ContainerBench, Running, make_app
from tabane.testing.containers import ID_BASE, SMALL, make_instance
from tabane.testing.drivers import (
    DRIVER_CHECKS,
    Check,
    check_exec,
    check_freeze,
    check_life,
    check_out_of_memory,
    check_terminal,
    refused,
    until,
    wait_until_said,
)
from tabane.testing.spawner import PlainSpawner
from tabane.testing.talks import fetch, read_archive, run_inside

pytestmark = pytest.mark.real


@pytest.fixture
def bench(sandboxes: ContainerBench) -> ContainerBench:
    return sandboxes


@pytest.mark.parametrize(
    "check", DRIVER_CHECKS + CHECKPOINT_CHECKS, ids=lambda check: check.__name__
)
async def test_conformance(check: Check, bench: ContainerBench) -> None:
    await check(bench)


ON_THE_OTHER_PLATFORM = (check_life, check_exec, check_terminal, check_freeze, check_out_of_memory)


@pytest.mark.parametrize("check", ON_THE_OTHER_PLATFORM, ids=lambda check: check.__name__)
async def test_the_other_platform(
    check: Check, bench: ContainerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has to do with how system calls are caught, where systrap does not work."""
    monkeypatch.setattr(bench.driver, "_platform", "ptrace")
    await check(bench)


async def test_the_engine_has_no_right_over_the_machine(bench: ContainerBench) -> None:
    """Every process of it: in the app's ids and a user namespace below, shut in by a filter."""
    async with bench.running(make_app()) as inside:
        commands = set()
        for pid in await inside.driver.processes(inside.handle):
            status = fields_of(Path(f"/proc/{pid}/status").read_text())
            assert status["NoNewPrivs"] == "1"
            assert status["Seccomp"] == "2"
            assert status["Uid"].split() == [str(ID_BASE)] * 4
            assert status["Groups"].strip() in ("", str(ID_BASE))
            for kind in ("user", "mnt"):
                own, theirs = (Path(f"/proc/{p}/ns/{kind}") for p in (os.getpid(), pid))
                assert own.readlink() != theirs.readlink(), kind
            commands.add(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0])
        assert commands >= {b"runsc-sandbox", b"runsc-gofer"}


def fields_of(status: str) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)


async def test_confinement(bench: ContainerBench) -> None:
    async with bench.running(make_app()) as inside:
        assert "Starting gVisor" in await inside.run("dmesg")
        fields = fields_of(await inside.run("cat /proc/self/status"))
        assert fields["CapBnd"] == fields["CapEff"] == "00000000800005fb"
        assert "denied" in await inside.run("mount -t tmpfs none /tmp")
        assert "not permitted" in await inside.run("echo 1 > /proc/sys/kernel/domainname")
        assert "not permitted" in await inside.run("busybox mknod /tmp/vda b 254 0")
        assert "jailed" not in await inside.run("busybox chroot / /bin/echo jailed")
        assert "No such file" in await inside.run("ls /sys/firmware/efi /proc/keys")
        assert await inside.run("cat /proc/1/comm") == "init\n"


async def test_what_is_declared(bench: ContainerBench) -> None:
    security = SecurityPolicy(capabilities=("CAP_SYS_CHROOT",))
    async with bench.running(make_app(security=security, name="jail")) as inside:
        assert await inside.run("busybox chroot / /bin/echo jailed") == "jailed\n"
    for lax in ("CAP_SYS_ADMIN", "CAP_SYS_RESOURCE"):
        app = make_app(security=SecurityPolicy(capabilities=(lax,)), name="lax")
        async with make_instance(bench.ground, bench.image, app) as spec:
            with pytest.raises(Unsupported, match=f"number of processes in a sandbox with {lax}"):
                await bench.driver.prepare(spec)
            assert bench.left_of(spec) == []


async def test_files(bench: ContainerBench) -> None:
    """Writes go to the instance's own layer, up to its quota; the image never changes."""
    async with bench.running(make_app()) as inside:
        before = await inside.run("stat -c '%u:%g %a' / /etc /tmp /bin/busybox /dev/shm")
        assert before.splitlines() == ["0:0 755", "0:0 755", "0:0 1777", "0:0 755", "0:0 1777"]
        await inside.run("echo changed > /etc/passwd; echo new > /new")
        assert await inside.run("cat /etc/passwd /new") == "changed\nnew\n"
        for file in ("/big", "/tmp/big", "/dev/shm/big"):
            write = f"dd if=/dev/zero of={file} bs=1M count=2; rm {file}"
            assert "No space left" in await inside.run(write), file
        assert "root:x" in (bench.image.tree / "etc/passwd").read_text()
        assert not (bench.image.tree / "new").exists()
        assert await inside.run("cat /dev/null; echo x > /dev/null; wc -c < /dev/null") == "0\n"


USE = r"""
import fcntl, mmap, os, socket, sqlite3, sys, threading
os.chdir(sys.argv[1])
there = socket.socket(socket.AF_UNIX)
there.bind("socket")
there.listen()
here = socket.socket(socket.AF_UNIX)
here.connect("socket")
os.mkfifo("fifo")
writer = threading.Thread(target=lambda: open("fifo", "w").write("through the fifo"))
writer.start()
print(open("fifo").read())
writer.join()
with open("mapped", "w+b") as file:
    file.truncate(4096)
    mmap.mmap(file.fileno(), 4096)[:3] = b"abc"
    fcntl.flock(file, fcntl.LOCK_EX)
    fcntl.lockf(file, fcntl.LOCK_EX)
print(open("mapped", "rb").read(3))
database = sqlite3.connect("database")
database.execute("pragma journal_mode = wal")
database.execute("create table t (x)")
database.execute("insert into t values (1)")
database.commit()
print(sqlite3.connect("database").execute("select x from t").fetchall())
os.link("mapped", "linked")
os.rename("linked", "renamed")
os.chown("renamed", 33, 34)
os.unlink("mapped")
print(os.stat("renamed").st_nlink, os.stat("renamed").st_uid)
with open("/dev/stdout", "w") as out:
    out.write("by name\n")
"""


@pytest.mark.parametrize("where", ["/tmp", "/srv"])
async def test_files_are_what_programs_expect(
    bench: ContainerBench, tmp_path: Path, where: str
) -> None:
    """Sockets, pipes, maps, locks, links and databases: all that servers live on."""
    image = await ImageStore(tmp_path / "images").prepare("host")
    resources = replace(SMALL, memory_bytes=128 << 20)
    app = make_app(("/usr/bin/python3", "-uc", USE, where), name="files", resources=resources)
    async with bench.running(app, image) as inside:
        status, log = await inside.end()
        assert log.splitlines() == ["through the fifo", "b'abc'", "[(1,)]", "1 33", "by name"]
        assert status == ExitStatus()


async def test_a_full_disk_is_no_want_of_memory(bench: ContainerBench) -> None:
    """What it writes is in memory, and yet it is told that its disk is full, and goes on."""
    resources = replace(SMALL, disk_bytes=SMALL.memory_bytes)
    async with bench.running(make_app(resources=resources)) as inside:
        assert "No space left" in await inside.run("dd if=/dev/zero of=/big bs=1M count=64")
        assert (await bench.driver.stats(inside.handle)).oom_kills == 0
        assert await inside.run("rm /big; echo goes on") == "goes on\n"


async def test_limits(bench: ContainerBench) -> None:
    """Those of the cgroup leave room for the sandbox itself; the program is told its own."""
    resources = Resources(cpu=0.25, memory_bytes=40 << 20, pids=16, disk_bytes=1 << 20)
    async with bench.running(make_app(resources=resources)) as inside:
        assert "MemTotal:          40960 kB" in await inside.run("cat /proc/meminfo")
        cgroup, driver = Cgroup(inside.spec.cgroup), inside.driver
        assert cgroup.limits() == {"cpu": 0.25, "memory_bytes": 105 << 20, "pids": 256}
        more = replace(resources, cpu=0.5, memory_bytes=64 << 20)
        await driver.limit(inside.handle, more)
        assert cgroup.limits() == {"cpu": 0.5, "memory_bytes": 129 << 20, "pids": 256}
        await refused(driver.limit(inside.handle, replace(more, memory_bytes=4096)), Conflict)
        await refused(driver.limit(inside.handle, replace(more, pids=17)))
        assert cgroup.limits() == {"cpu": 0.5, "memory_bytes": 129 << 20, "pids": 256}


async def test_the_number_of_processes_is_limited(bench: ContainerBench) -> None:
    """For any user: it is refused inside, as it would be by any kernel, and nobody dies of it."""
    fork = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 100 & done; echo all"
    for user in ("", "web"):
        image = replace(bench.image, user=user, digest=f"sha256:{user}")
        app = make_app(("sh", "-c", fork), name="forks", resources=replace(SMALL, pids=8))
        async with bench.running(app, image) as inside:
            status, log = await inside.end()
            assert "can't fork" in log and "all" not in log
            assert status.code and not status.signal


async def test_image_and_app_decide_what_runs(bench: ContainerBench) -> None:
    script = 'echo "$0 $A $B $(id -u):$(id -g):$(id -G) $(pwd)"'
    image = replace(
        bench.image,
        entrypoint=("sh", "-c", script),
        cmd=("cmd",),
        env=("A=image", "B=image"),
        user="web",
        workdir="/srv",
        digest="sha256:" + "1" * 64,
    )
    async with bench.running(make_app(env={"B": "app"}), image) as inside:
        assert await inside.end() == (ExitStatus(), "cmd image app 33:34:34 44 /srv\n")


async def test_stop_signal(bench: ContainerBench) -> None:
    script = "trap 'echo usr1; exit 5' USR1; echo ready; while :; do sleep 0.01; done"
    image = replace(bench.image, stop_signal="SIGUSR1", digest="sha256:" + "2" * 64)
    async with bench.running(make_app(("sh", "-c", script)), image) as inside:
        await wait_until_said(inside.spec, b"ready")
        await inside.driver.stop(inside.handle, 20)
        assert await inside.end() == (ExitStatus(5), "ready\nusr1\n")


async def test_the_host_as_image(bench: ContainerBench, tmp_path: Path) -> None:
    image = await ImageStore(tmp_path / "images").prepare("host")
    script = "import ssl; print(len(ssl.create_default_context().get_ca_certs()) > 0, flush=True)"
    resources = replace(SMALL, memory_bytes=128 << 20)
    command = ("/usr/bin/python3", "-c", f"{script}; import time; time.sleep(1000)")
    async with bench.running(make_app(command, name="host", resources=resources), image) as inside:
        await wait_until_said(inside.spec, b"True\n")
        assert "Read-only" in await inside.run("touch /usr/x")
        assert await inside.run("stat -c %u:%g /usr/bin/env; readlink /bin") == "0:0\nusr/bin\n"
        assert "No such file" in await inside.run("ls /var/lib/dpkg /home/*")


async def test_an_image_without_tmp(bench: ContainerBench, ground: Path) -> None:
    tree = ground / "bare-tree"
    shutil.copytree(bench.image.tree, tree, symlinks=True, ignore=lambda *_: ["tmp"])
    image = replace(bench.image, tree=tree, digest="sha256:" + "5" * 64)
    async with bench.running(make_app(name="bare"), image) as inside:
        assert await inside.run("echo x > /tmp/x; cat /tmp/x") == "x\n"
        with pytest.raises(Unsupported, match="/tmp/x is in the memory of the sandbox's kernel"):
            await fetch(inside.driver, inside.handle, "/tmp/x")
    shutil.rmtree(tree)


@asynccontextmanager
async def started(bench: ContainerBench, spec: InstanceSpec) -> AsyncIterator[Running]:
    handle = await bench.driver.prepare(spec)
    try:
        handle = await bench.driver.start(spec, handle)
        yield Running(bench.driver, spec, handle)
    finally:
        await bench.driver.destroy(handle)


async def test_volumes_are_written_through(bench: ContainerBench, ground: Path) -> None:
    """Their owners are those inside; the next instance has what the last one wrote."""
    files = VolumeFiles(ground / "volumes")
    app = make_app(name="db", volumes=(Volume("data", "/srv/data", 8 << 20),))
    files.ensure(app)
    for count in (1, 2):
        async with make_instance(ground, bench.image, app) as made:
            spec = replace(made, volumes=files.of(app))
            async with started(bench, spec) as inside:
                await inside.run("echo line >> /srv/data/x")
                assert await inside.run("cat /srv/data/x") == "line\n" * count
                assert await inside.run("stat -c %u:%g /srv/data /srv/data/x") == "0:0\n" * 2
                full = "dd if=/dev/zero of=/srv/data/fill bs=1M count=20; rm /srv/data/fill"
                assert "No space left" in await inside.run(full)
                out = await fetch(bench.driver, inside.handle, "/srv/data/x")
                assert read_archive(out.stdout)["x"][0] == b"line\n" * count
            assert bench.left_of(spec) == []


CALL = r"""
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect("/run/tabane/hub.sock")
sock.sendall(b"hi\n")
print(sock.makefile().readline(), end="")
"""


@pytest.mark.parametrize("asks", [True, False])
async def test_it_reaches_the_sockets_that_are_made_for_it(
    bench: ContainerBench, ground: Path, asks: bool
) -> None:
    """And only if its app asks for something: else it can connect to no socket of the node's."""
    heard: list[tuple[bytes, int]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        heard.append((await reader.readline(), struct.unpack("iii", credentials)[1]))
        writer.write(b"hello\n")
        writer.close()

    image = await ImageStore(ground / "images").prepare("host")
    async with make_instance(ground, image, make_app(("sleep", "99"), name=f"asks{asks}")) as made:
        services = made.directory / "services"
        services.mkdir()
        spec = replace(made, services=services) if asks else made
        server = await asyncio.start_unix_server(answer, services / "hub.sock")
        (services / "hub.sock").chmod(0o666)
        async with server, started(bench, spec) as inside:
            said = await run_inside(bench.driver, inside.handle, ("python3", "-c", CALL))
            if asks:
                assert said == (0, b"hello\n", b"")
                assert "Read-only" in await inside.run("echo x > /run/tabane/x")
            else:
                assert said.code == 1 and b"No such file" in said.stderr
        shutil.rmtree(services)
        assert bench.left_of(made) == []
    assert heard == ([(b"hi\n", ID_BASE)] if asks else [])


async def test_an_engine_killed_in_the_middle_of_a_start(bench: ContainerBench) -> None:
    async with make_instance(bench.ground, bench.image, make_app()) as spec:
        handle = await bench.driver.prepare(spec)
        start = asyncio.ensure_future(bench.driver.start(spec, handle))

        async def is_half_way() -> bool:
            return bool(list((spec.directory / runsc.STATE).iterdir()))

        await until(is_half_way)
        assert await bench.spawner.signal(spec.id, signal.SIGKILL)
        with pytest.raises(
            EngineError, match=f"runsc could not start {spec.id}: killed by SIGKILL"
        ):
            await start
        await bench.driver.destroy(handle)
        assert bench.left_of(spec) == []


async def test_a_failed_start_says_why(bench: ContainerBench) -> None:
    app = make_app(("sleep", "1"), workdir="/bin/busybox")
    async with make_instance(bench.ground, bench.image, app) as spec:
        handle = await bench.driver.prepare(spec)
        with pytest.raises(EngineError) as failure:
            await bench.driver.start(spec, handle)
        await bench.driver.destroy(handle)
    assert failure.value.message.startswith(f"runsc could not start {spec.id}: ")
    assert "not a directory" in failure.value.output


async def test_a_long_name_is_refused(bench: ContainerBench, ground: Path) -> None:
    deep = ground / ("deep" * 20)
    deep.mkdir()
    async with make_instance(deep, bench.image, make_app()) as spec:
        with pytest.raises(Unsupported, match="too long a name for a socket"):
            await bench.driver.prepare(spec)
        assert bench.left_of(spec) == []


async def test_the_probe_tries_the_next_platform(
    bench: ContainerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where processes may not be traced, or a processor lacks what systrap needs."""
    monkeypatch.setattr(formats, "PLATFORMS", ("unheard-of", "ptrace"))
    driver = bench.restarted()
    probe = await driver.probe()
    assert probe.works and probe.reason.endswith(", platform ptrace")
    monkeypatch.setattr(formats, "PLATFORMS", ("unheard-of",))
    refusal = await bench.restarted().probe()
    assert not refusal.works and "unheard-of" in refusal.reason


async def test_missing_and_old_engines_say_so(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "OWN", tmp_path / "nowhere")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    probe = await load("runsc", PlainSpawner(), ground / "missing").probe()
    assert (probe.works, probe.reason) == (False, "runsc is not installed")
    old = tmp_path / "runsc"
    old.write_text("#!/bin/sh\necho runsc version 0.0~20221219.0\necho spec: 1.0.2\n")
    old.chmod(0o755)
    probe = await load("runsc", PlainSpawner(), ground / "missing").probe()
    assert not probe.works
    assert (
        "is too old (runsc version 0.0~20221219.0): install a release of 20240729" in probe.reason
    )


async def test_the_newer_engine_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, words in (("own", "release-20250120.0"), ("runsc", "0.0~20240729.0")):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho runsc version {words}\n")
        path.chmod(0o755)
    monkeypatch.setattr(engine, "OWN", tmp_path / "own")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert engine.find_engine().path == str(tmp_path / "own")
    (tmp_path / "own").write_text("#!/bin/sh\nexit 1\n")
    assert engine.find_engine().path == str(tmp_path / "runsc")
