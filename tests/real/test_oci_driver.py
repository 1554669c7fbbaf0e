"""runc and crun keep to the interface, and containers are confined as the table says."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import stat
from pathlib import Path

import pytest
from msgspec.structs import replace

from tabane.errors import EngineError, NotFound, Unsupported, UsageError
from tabane.images import ImageStore
from tabane.model import ExitStatus, NetworkPolicy, Resources, SecurityPolicy, Volume
from tabane.runtimes import load, rootfs, trial
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.oci import OciDriver
from tabane.runtimes.trial import parked
from tabane.runtimes.volumes import VolumeFiles
from tabane.testing.checkpoints import CHECKPOINT_CHECKS
from tabane.testing.container_bench import SAY, ContainerBench, make_app
from tabane.testing.containers import (
    ID_BASE,
    SMALL,
    find_left,
    make_instance,
)
from tabane.testing.drivers import (
    DRIVER_CHECKS,
    Behaviour,
    Check,
    refused,
    until,
    wait_until_said,
)
from tabane.testing.spawner import PlainSpawner

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("no_hybrid")]


@pytest.fixture
def bench(containers: ContainerBench) -> ContainerBench:
    return containers


@pytest.mark.parametrize(
    "check", DRIVER_CHECKS + CHECKPOINT_CHECKS, ids=lambda check: check.__name__
)
async def test_conformance(check: Check, bench: ContainerBench) -> None:
    await check(bench)


async def test_confinement(bench: ContainerBench) -> None:
    async with bench.running(make_app()) as inside:
        pid = inside.handle.data["pid"]
        for status in (
            Path(f"/proc/{pid}/status").read_text(),
            await inside.run("cat /proc/self/status"),
        ):
            fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            assert fields["NoNewPrivs"] == "1"
            assert fields["Seccomp"] == "2"
            assert fields["CapBnd"] == fields["CapEff"] == "00000000800005fb"
            assert fields["CapAmb"] == "0000000000000000"
        assert Path(f"/proc/{pid}/status").read_text().count(f"Uid:\t{ID_BASE}\t{ID_BASE}") == 1
        for namespace in ("user", "net", "pid", "mnt", "ipc", "uts", "cgroup"):
            own, theirs = (Path(f"/proc/{p}/ns/{namespace}") for p in (os.getpid(), pid))
            assert own.readlink() != theirs.readlink(), namespace
        assert "Function not implemented" in await inside.run("unshare -U true")
        assert "Function not implemented" in await inside.run("mount -t tmpfs none /tmp")
        assert "Read-only" in await inside.run("echo 1 > /proc/sys/kernel/domainname")
        assert "Read-only" in await inside.run("echo 1 > /sys/kernel/mm/ksm/run")
        assert await inside.run("cat /proc/keys /proc/timer_list; ls /sys/firmware") == ""


async def test_files(bench: ContainerBench) -> None:
    """Writes go to the instance's own layer, up to its quota; the image never changes."""
    async with bench.running(make_app()) as inside:
        before = await inside.run("stat -c '%u:%g %a' / /etc /tmp /bin/busybox /dev/shm")
        assert before.splitlines() == ["0:0 755", "0:0 755", "0:0 1777", "0:0 755", "0:0 1777"]
        await inside.run("echo changed > /etc/passwd; echo new > /new")
        assert await inside.run("cat /etc/passwd /new") == "changed\nnew\n"
        assert "No space left" in await inside.run("dd if=/dev/zero of=/big bs=1M count=2")
        assert "No space left" in await inside.run("dd if=/dev/zero of=/dev/shm/big bs=1M count=2")
        assert "root:x" in (bench.image.tree / "etc/passwd").read_text()
        assert not (bench.image.tree / "new").exists()
        assert await inside.run("cat /dev/null; echo x > /dev/null; wc -c < /dev/null") == "0\n"
        assert "not permitted" in await inside.run("busybox mknod /tmp/vda b 254 0 2>&1")


async def test_no_device_of_the_machine_becomes_an_instance_s(bench: ContainerBench) -> None:
    """An engine may give the program's standard input to its user: that must not be /dev/null."""
    own = ID_BASE + 7 * 65536
    async with bench.running(make_app(id_base=own)) as inside:
        assert await inside.run("cat; stat -L -c %u /proc/self/fd/0") != ""
        assert Path("/dev/null").stat().st_uid != own
        assert not stat.S_ISCHR(Path(f"/proc/{inside.handle.data['pid']}/fd/0").stat().st_mode)


async def test_what_a_killed_trial_left_is_removed_by_the_next(bench: ContainerBench) -> None:
    directory = bench.ground / bench.driver.name
    place = directory / "trial"
    place.mkdir(mode=0o711)
    async with parked(trial.ID_BASE) as link:
        spec = trial.make_spec(link, place)
        await bench.driver.start(spec, await bench.driver.prepare(spec))
    assert find_left(spec) != []
    for _ in range(2):
        probe = await trial.try_driver(bench.driver, bench.driver.name, directory)
        assert probe.works, probe.reason
        assert not place.exists()
        assert not any(each.exists() for each in Cgroup(spec.cgroup).directories())
        assert [each.name for each in (directory / "images").glob("trial-*")] == [
            f"trial-tree-{trial.ID_BASE}"
        ]
    await bench.spawner.forget(spec.id)


async def test_a_device_in_an_image_is_no_device(bench: ContainerBench, ground: Path) -> None:
    node = bench.image.tree / "srv/null"
    os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    try:
        async with bench.running(make_app()) as inside:
            assert "Permission denied" in await inside.run("cat /srv/null")
    finally:
        node.unlink()


@pytest.mark.parametrize("path", ["/srv/gone", "/srv/gone/data", "/up/data"])
async def test_a_volume_goes_where_the_image_s_links_lead(
    bench: ContainerBench, ground: Path, path: str
) -> None:
    """Also to what is not there, and never out."""
    tree = bench.image.tree
    (tree / "srv/gone").symlink_to("/nowhere/else")
    (tree / "up").symlink_to("../../../tmp/nowhere")
    app = make_app(name=f"linked{path.replace('/', '-')}", volumes=(Volume("d", path, 16 << 20),))
    files = VolumeFiles(ground / "volumes")
    try:
        await asyncio.to_thread(files.ensure, app)
        async with bench.running(app, volumes=files.of(app)) as inside:
            assert await inside.run(f"echo kept > {path}/file") == ""
        async with bench.running(app, volumes=files.of(app)) as inside:
            assert await inside.run(f"cat {path}/file") == "kept\n"
        assert not Path("/nowhere").exists() and not Path("/tmp/nowhere").exists()
    finally:
        (tree / "srv/gone").unlink()
        (tree / "up").unlink()


async def test_kept_mounts_are_bounded(
    bench: ContainerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is dropped takes nothing from the instances that were made from it."""
    monkeypatch.setattr(rootfs, "MOST_KEPT", 1)
    other = make_app(id_base=ID_BASE + 65536, name="other")
    async with bench.running(make_app()) as one, bench.running(other) as two:
        kept = bench.ground / bench.driver.name / "images"
        assert [path.name for path in kept.iterdir()] == [
            f"{bench.ground.name}-tree-{ID_BASE + 65536}"
        ]
        for inside in (one, two):
            assert await inside.run("cat /etc/passwd") != ""


async def test_an_image_that_came_back(bench: ContainerBench, ground: Path) -> None:
    """Removed and imported again, an image has the same name and is another directory."""
    tree = ground / "coming"
    image = replace(bench.image, tree=tree, digest="sha256:" + "4" * 64)
    for text in ("first", "second"):
        shutil.copytree(bench.image.tree, tree, symlinks=True)
        (tree / "srv/which").write_text(text)
        async with bench.running(make_app(name="coming"), image) as inside:
            assert await inside.run("cat /srv/which") == text
        shutil.rmtree(tree)


async def test_a_full_disk_is_no_want_of_memory(bench: ContainerBench) -> None:
    """What it writes is in memory, and yet it is told that its disk is full, and goes on."""
    resources = replace(SMALL, disk_bytes=SMALL.memory_bytes)
    async with bench.running(make_app(resources=resources)) as inside:
        assert "No space left" in await inside.run("dd if=/dev/zero of=/big bs=1M count=64")
        assert (await bench.driver.stats(inside.handle)).oom_kills == 0
        assert await inside.run("rm /big; echo goes on") == "goes on\n"


async def test_limits(bench: ContainerBench) -> None:
    resources = Resources(cpu=0.25, memory_bytes=32 << 20, pids=16, disk_bytes=1 << 20)
    async with bench.running(make_app(resources=resources)) as inside:
        directories = Cgroup(inside.spec.cgroup).directories()
        files = [d / name for d in directories for name in LIMITS if (d / name).exists()]
        found = {file.name: file.read_text().strip() for file in files}
        assert found == {name: LIMITS[name] for name in found}
        assert found.keys() >= {"pids.max"} and len(found) in (3, 5)


LIMITS = {
    "pids.max": "16",
    "memory.limit_in_bytes": str(33 << 20),
    "memory.memsw.limit_in_bytes": str(33 << 20),
    "cpu.cfs_quota_us": "25000",
    "cpu.cfs_period_us": "100000",
    "memory.max": str(33 << 20),
    "cpu.max": "25000 100000",
}


async def test_the_number_of_processes_is_limited(bench: ContainerBench) -> None:
    fork = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 100 & done; echo all"
    app = make_app(("sh", "-c", fork), resources=replace(SMALL, pids=8))
    async with bench.running(app) as inside:
        status, log = await inside.end()
        assert "can't fork" in log and "all" not in log
        assert status.code


async def test_image_and_app_decide_what_runs(bench: ContainerBench) -> None:
    image = replace(
        bench.image,
        entrypoint=("sh", "-c", 'echo "$0 $A $B $(id -u):$(id -g):$(id -G) $(pwd)"'),
        cmd=("cmd",),
        env=("A=image", "B=image"),
        user="web",
        workdir="/srv",
        digest="sha256:" + "1" * 64,
    )
    async with bench.running(make_app(env={"B": "app"}), image) as inside:
        assert await inside.end() == (ExitStatus(), "cmd image app 33:34:34 44 /srv\n")
    app = make_app(("sh", "-c", "pwd; id -u"), workdir="/new/place", name="other")
    async with bench.running(app, replace(image, user="7:8")) as inside:
        assert await inside.end() == (ExitStatus(), "/new/place\n7\n")


async def test_stop_signal(bench: ContainerBench) -> None:
    script = "trap 'echo usr1; exit 5' USR1; echo ready; while :; do sleep 0.01; done"
    image = replace(bench.image, stop_signal="SIGUSR1", digest="sha256:" + "2" * 64)
    async with bench.running(make_app(("sh", "-c", script)), image) as inside:
        await wait_until_said(inside.spec, b"ready")
        await inside.driver.stop(inside.handle, 20)
        assert await inside.end() == (ExitStatus(5), "ready\nusr1\n")


async def test_network_names(bench: ContainerBench) -> None:
    async with bench.running(make_app()) as inside:
        assert await inside.run("cat /etc/resolv.conf") == "nameserver 127.0.0.1\n"
        assert f"127.0.0.1 {inside.spec.id}\n" in await inside.run("cat /etc/hosts")
        assert await inside.run("hostname; cat /etc/hostname") == f"{inside.spec.id}\n" * 2


async def test_a_low_port_may_be_bound(bench: ContainerBench) -> None:
    image = replace(bench.image, user="web", digest="sha256:" + "3" * 64)
    async with bench.running(make_app(("httpd", "-f", "-p", "80"), port=80), image) as inside:
        assert inside.spec.link is not None
        table = Path(f"/proc/{inside.spec.link.parked_pid}/net/tcp6")

        async def listens() -> bool:
            return ":0050 " in table.read_text()

        await until(listens)


async def test_init_reaps_orphans(bench: ContainerBench) -> None:
    script = f"for i in 1 2 3; do (sleep 0.01 &); done; {SAY}; exec sleep 1000"
    async with bench.running(make_app(("sh", "-c", script))) as inside:
        await wait_until_said(inside.spec)

        pid = inside.handle.data["pid"]
        assert Path(f"/proc/{pid}/comm").read_text() == "init\n"
        children = Path(f"/proc/{pid}/task/{pid}/children")

        async def only_the_program() -> bool:
            return len(children.read_text().split()) == 1

        await until(only_the_program)


async def test_added_capabilities(bench: ContainerBench) -> None:
    security = SecurityPolicy(capabilities=("CAP_SYS_CHROOT",))
    async with bench.running(make_app(security=security, name="jail")) as inside:
        assert await inside.run("busybox chroot / /bin/echo jailed") == "jailed\n"
    async with bench.running(make_app()) as inside:
        assert "jailed" not in await inside.run("busybox chroot / /bin/echo jailed")


async def test_two_apps_share_an_image_and_no_ids(bench: ContainerBench) -> None:
    other = make_app(id_base=ID_BASE + 65536, name="other")
    async with bench.running(make_app()) as one, bench.running(other) as two:
        for inside, base in ((one, ID_BASE), (two, ID_BASE + 65536)):
            assert await inside.run("stat -c %u /bin/busybox") == "0\n"
            assert Path(f"/proc/{inside.handle.data['pid']}").stat().st_uid == base


async def test_the_host_as_image(bench: ContainerBench, tmp_path: Path) -> None:
    image = await ImageStore(tmp_path / "images").prepare("host")
    script = "import ssl, sys; print(len(ssl.create_default_context().get_ca_certs()) > 0)"
    command = ("/usr/bin/python3", "-c", script)
    resources = replace(SMALL, memory_bytes=128 << 20)
    async with bench.running(make_app(command, name="host", resources=resources), image) as inside:
        assert await inside.end() == (ExitStatus(), "True\n")
    async with bench.running(make_app(("sleep", "100"), name="host2"), image) as inside:
        assert "Read-only" in await inside.run("touch /usr/x")
        assert await inside.run("stat -c %u:%g /usr/bin/env; readlink /bin") == "0:0\nusr/bin\n"
        assert "No such file" in await inside.run("ls /var/lib/dpkg /work /home/*")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"command": ("nothing-like-it",)}, "has no program 'nothing-like-it' in /usr/local/sbin"),
        ({"command": ("/etc/passwd",)}, "has no program '/etc/passwd' there"),
        ({"security": SecurityPolicy(capabilities=("CAP_SYS_MODULE",))}, "CAP_SYS_MODULE"),
    ],
)
async def test_refusals(bench: ContainerBench, fields: dict[str, object], problem: str) -> None:
    async with make_instance(bench.ground, bench.image, make_app(**fields)) as spec:
        with pytest.raises(UsageError, match=problem):
            await bench.driver.prepare(spec)
        assert bench.left_of(spec) == []


async def test_a_private_directory_is_refused(bench: ContainerBench, tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    async with make_instance(private, bench.image, make_app()) as spec:
        with pytest.raises(Unsupported, match="lets no other user in"):
            await bench.driver.prepare(spec)
        await refused(bench.driver.prepare(replace(spec, link=None)))


async def test_a_failed_start_says_why(bench: ContainerBench) -> None:
    async with bench.instance(Behaviour.BREAKS) as spec:
        handle = await bench.driver.prepare(spec)
        with pytest.raises(EngineError) as failure:
            await bench.driver.start(spec, handle)
        await bench.driver.destroy(handle)
    assert failure.value.message.startswith(f"{bench.driver.name} could not start {spec.id}: ")
    assert "not a directory" in failure.value.output.lower()
    assert failure.value.argv[0].endswith(bench.driver.name)


def list_children() -> set[str]:
    tasks = Path("/proc/self/task").glob("*/children")
    return {pid for task in tasks for pid in task.read_text().split()}


@pytest.mark.parametrize("moment", ["it has begun", "the container is there"])
async def test_an_engine_killed_in_the_middle_of_a_start(
    bench: ContainerBench, moment: str
) -> None:
    """Nothing is left, nor of a container that it made and cannot tell of any more. An engine that
    was done before is no case: then again."""
    was_killed, before = False, list_children()
    while not was_killed:
        async with make_instance(bench.ground, bench.image, make_app(("sleep", "1000"))) as spec:
            handle = await bench.driver.prepare(spec)
            start = asyncio.ensure_future(bench.driver.start(spec, handle))
            state = bench.ground / bench.driver.name / "state" / spec.id

            async def is_half_way(state: Path = state, cgroup: str = spec.cgroup) -> bool:
                made = state.exists() if moment == "it has begun" else bool(Cgroup(cgroup).pids())
                return made or start.done()  # noqa: B023 - it is asked in this turn only

            await until(is_half_way)
            await bench.spawner.signal(spec.id, signal.SIGKILL)
            try:
                await start
            except EngineError as error:
                was_killed = True
                assert error.message.startswith(f"{bench.driver.name} could not start {spec.id}: ")
                with pytest.raises(NotFound):
                    await bench.driver.stats(handle)
            await bench.driver.destroy(handle)
            assert bench.left_of(spec) == []

        async def is_reaped(key: str = spec.id) -> bool:
            await bench.spawner.forget(key)
            return list_children() <= before

        await until(is_reaped)


async def test_a_frozen_container_stands_still(bench: ContainerBench) -> None:
    script = "while :; do echo tick; done > /dev/null"
    async with bench.running(make_app(("sh", "-c", script))) as inside:
        await inside.driver.freeze(inside.handle)
        first = (await inside.driver.stats(inside.handle)).cpu_us
        await asyncio.sleep(0.05)
        assert (await inside.driver.stats(inside.handle)).cpu_us == first
        await inside.driver.thaw(inside.handle)

        async def moves() -> bool:
            return (await inside.driver.stats(inside.handle)).cpu_us > first

        await until(moves)


async def test_another_process_with_its_pid_is_not_it(bench: ContainerBench) -> None:
    async with bench.running(make_app()) as inside:
        data = inside.handle.data | {"pid": os.getpid()}
        stale = replace(inside.handle, data=data)
        assert await bench.restarted().recover(inside.spec, stale) is None


async def test_killed_from_outside(bench: ContainerBench) -> None:
    async with bench.running(make_app()) as inside:
        pid = inside.handle.data["pid"]
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGKILL)
        assert await inside.driver.wait(inside.handle) == ExitStatus(signal=signal.SIGKILL)


async def test_egress_is_the_links_business(bench: ContainerBench) -> None:
    """The driver joins the link's namespace and adds nothing: no interface but the link's."""
    app = make_app(network=NetworkPolicy(egress=False), name="shut")
    async with bench.running(app) as inside:
        assert (await inside.run("ls /sys/class/net")).split() == ["lo"]


async def test_a_missing_engine_says_so(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    spawner = PlainSpawner()
    for name in ("crun", "runc"):
        probe = await load(name, spawner, ground / "missing").probe()
        assert (probe.works, probe.reason) == (False, f"{name} is not installed")


async def test_an_engine_that_fails_says_why(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As crun does where cgroups are hybrid: known from the probe, not from the first wake."""
    engine = tmp_path / "crun"
    engine.write_text(BROKEN_ENGINE)
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    spawner = PlainSpawner()
    driver = load("crun", spawner, ground / "broken")
    assert isinstance(driver, OciDriver)
    probe = await driver.probe()
    driver.close()
    assert not probe.works
    assert probe.reason.startswith("crun version 0.0: crun could not start ")
    assert probe.reason.endswith(": no cgroups here")


BROKEN_ENGINE = """#!/bin/sh
[ "$1" = --version ] && { echo "crun version 0.0"; echo more; exit 0; }
echo '{"msg": "no cgroups here", "level": "error"}' > "$4"
exit 1
"""
