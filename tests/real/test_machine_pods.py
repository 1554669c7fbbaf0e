"""Several containers in one machine: they keep to the interface, and share what they are to share
and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from tabane.model import Container, ExitStatus, Resources, SecurityPolicy, Volume
from tabane.runtimes.api import Image
from tabane.runtimes.pods import log_of
from tabane.testing import drivers, pods
from tabane.testing.container_bench import SAY
from tabane.testing.containers import make_tree
from tabane.testing.drivers import PATIENCE_S, Behaviour, wait_until_said
from tabane.testing.drivers import Check as DriverCheck
from tabane.testing.machine_bench import (
    COMMANDS,
    KeptBench,
    MachineBench,
    Running,
    make_app,
    make_bench,
)
from tabane.testing.pods import FIRST, POD_CHECKS, SECOND, Check
from tabane.testing.talks import run_inside

pytestmark = pytest.mark.real

ON_ONE = (pods.check_inside, pods.check_frozen)
"""They leave a machine as they find it, so that one is enough: a boot takes seconds here."""
WITH_A_SIDECAR = (
    drivers.check_interrupted_prepare,
    drivers.check_never_started,
    drivers.check_cancelled_start,
    drivers.check_recover,
)
"""What is not made or not begun, and another agent; the rest is said to the same guest."""
WAITS = COMMANDS[Behaviour.WAITS]


@pytest.fixture
async def bench(
    request: pytest.FixtureRequest, ground: Path, image: Image
) -> AsyncIterator[MachineBench]:
    bench = make_bench(getattr(request, "param", "qemu-microvm"), ground, image)
    yield bench
    await bench.aclose()


@pytest.mark.parametrize(
    "check", [c for c in POD_CHECKS if c not in ON_ONE], ids=lambda check: check.__name__
)
async def test_pods(check: Check, bench: MachineBench) -> None:
    await check(bench)


@pytest.mark.parametrize("check", WITH_A_SIDECAR, ids=lambda check: check.__name__)
async def test_conformance_with_a_sidecar(check: DriverCheck, bench: MachineBench) -> None:
    await check(pods.InPods(bench))


@pytest.mark.parametrize("bench", ["qemu-microvm", "qemu"], indirect=True)
async def test_pods_on_one_machine(bench: MachineBench) -> None:
    beside = tuple(Container(name, command=WAITS) for name in (FIRST, SECOND))
    async with bench.running(make_app(WAITS, containers=beside)) as inside:
        pods_of_one = KeptBench(inside)
        await pods.check_inside(pods_of_one)
        await see_frost(inside)


async def see_frost(inside: Running) -> None:
    """They stand still, and go on, as one."""
    await inside.driver.freeze(inside.handle)
    await inside.driver.thaw(inside.handle)
    for name in ("", FIRST, SECOND):
        assert await inside.run("echo x", container=name) == "x\n"


DATA = Volume("data", "/srv/data", 8 << 20)
RESOURCES = Resources(cpu=1.0, memory_bytes=48 << 20, pids=32, disk_bytes=2 << 20)


@pytest.fixture
def other(ground: Path, tmp_path: Path) -> Image:
    """An image of another container."""
    place = ground / "other"
    place.mkdir(exist_ok=True)
    made = make_tree(place)
    (made.tree / "etc/own").write_text("of the other image\n")
    return replace(made, digest="sha256:" + "1" * 64, workdir="/srv", env=("OWN=image",))


async def test_what_they_share(bench: MachineBench, other: Image) -> None:
    """One boot for all that can be seen of one machine with several containers."""
    talker = ("sh", "-c", f"{SAY} >&2; echo heard; exec sleep 1001")
    beside = (
        Container("talker", command=talker, env={"WORD": "always"}, volumes=("data",)),
        Container("keeper", command=("sleep", "1002")),
    )
    app = make_app(
        WAITS,
        name="sharing",
        resources=RESOURCES,
        volumes=(DATA,),
        containers=beside,
        security=SecurityPolicy(capabilities=("CAP_SYS_ADMIN",)),
    )
    async with bench.running(app, beside=other) as inside:
        await see_roots(inside)
        await see_processes(inside)
        await see_devices(inside)
        await see_limits(inside)
        await see_logs(inside)


async def see_roots(inside: Running) -> None:
    """Its image, what it writes, its environment and directory are each one's own; the name, the
    network and the volumes it asks for are not."""
    assert await inside.run("cat /etc/own; pwd; echo $OWN $WORD", container="talker") == (
        "of the other image\n/srv\nimage always\n"
    )
    await inside.run("echo mine > /srv/file; echo both > /srv/data/file", container="talker")
    for name in ("", "keeper"):
        assert "No such file" in await inside.run("cat /srv/file /etc/own", container=name)
        assert await inside.run("pwd; echo $OWN$WORD", container=name) == "/\n\n"
    assert await inside.run("cat /srv/data/file") == "both\n"
    assert "No such file" in await inside.run("ls /srv/data", container="keeper")
    for name in ("", "talker", "keeper"):
        both = await inside.run("hostname; cat /etc/hostname", container=name)
        assert both == f"{inside.spec.id}\n" * 2
    await inside.run("(busybox nc -l -p 9000 -e echo near >/dev/null 2>&1 &)", container="keeper")
    near = "until busybox nc 127.0.0.1 9000 </dev/null; do sleep 0.05; done"
    assert "near" in await asyncio.wait_for(inside.run(f"{near} 2>/dev/null"), PATIENCE_S)


async def see_processes(inside: Running) -> None:
    """Each has namespaces of its own, of which nothing leads out: no process of another, no mount
    of the machine's, and no way up from the root."""
    for name, count in (("", "1000"), ("talker", "1001"), ("keeper", "1002")):
        seen = await inside.run("ps -o args", container=name)
        assert f"sleep {count}" in seen
        assert seen.count("sleep 10") == 1, seen
        mounts = await inside.run("cat /proc/self/mountinfo", container=name)
        assert all(word not in mounts for word in ("/pod ", "/cgroup ", "devtmpfs")), mounts
        assert await inside.run("ls -d /../pod /pod /cgroup 2>&1 | wc -l", container=name) == "3\n"
    kinds = "for kind in pid mnt ipc cgroup net uts; do busybox readlink /proc/self/ns/$kind; done"
    spaces = [
        (await inside.run(kinds, container=name)).split() for name in ("", "talker", "keeper")
    ]
    assert [len({found[n] for found in spaces}) for n in range(6)] == [3, 3, 3, 3, 1, 1]
    assert "No such process" in await inside.run("kill -0 99", container="talker")
    told = await inside.driver.guest_processes(inside.handle)
    programs = {one.command: one.container for one in told if "sleep" in one.command}
    assert programs == {"sleep 1000": "main", "sleep 1001": "talker", "sleep 1002": "keeper"}


async def see_devices(inside: Running) -> None:
    """Who may mount gets at no disk, so at no file of another, and not above its own cgroup."""
    await inside.run("mkdir /tmp/dev /tmp/group; mount -t devtmpfs dev /tmp/dev")
    assert "vda" in await inside.run("ls /tmp/dev")
    for attempt in ("dd if=/tmp/dev/vda of=/dev/null count=1", "mount -t ext4 /tmp/dev/vdb /srv"):
        assert "permi" in await inside.run(attempt)
    await inside.run("mount -t cgroup2 group /tmp/group")
    groups = (await inside.run("cd /tmp/group; ls -d */")).split()
    assert {"init/", "main/"} <= set(groups) and "c0/" not in groups
    assert "No such file" in await inside.run("cat /tmp/group/../pids.max /tmp/group/pids.max")


async def see_limits(inside: Running) -> None:
    """Of all together: processes, and what they write."""
    fork = "for i in $(busybox seq 14); do sleep 100 & done"
    said = [await inside.run(f"{fork}; echo", container=name) for name in ("talker", "keeper")]
    assert said[0] == "\n" and "can't fork" in said[1]
    for name in ("talker", "keeper"):
        killed = ("busybox", "pkill", "-f", "sleep 100$")
        await run_inside(inside.driver, inside.handle, killed, container=name)
    write = "dd if=/dev/zero of=/tmp/file bs=1k count=1500 2>&1"
    assert "No space left" not in await inside.run(write)
    assert "No space left" in await inside.run(write, container="keeper")


async def see_logs(inside: Running) -> None:
    log = log_of(inside.spec.log, "talker")
    await wait_until_said(replace(inside.spec, log=log))
    assert "heard\n" in log.read_text()
    assert "heard" not in inside.spec.log.read_text()


async def test_who_takes_all_memory_is_named(bench: MachineBench) -> None:
    eat = ("sh", "-c", "sleep 0.2; exec dd if=/dev/zero of=/dev/null bs=256M")
    beside = (Container("eater", command=eat), Container("sleeper", command=WAITS))
    async with bench.running(make_app(WAITS, name="hungry", containers=beside)) as inside:
        end = await bench.driver.wait(inside.handle)
        assert end == ExitStatus(signal=9, oom=True, container="eater")
