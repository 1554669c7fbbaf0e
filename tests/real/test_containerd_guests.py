"""The drivers of machines that containerd keeps. Such machines need KVM, so here runc's shim stands
in for Kata's under its name: all that the driver says to containerd is really said, and what the
shim says is understood. What only a machine has is tested on the specification that it gets.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from tabane.errors import Unsupported
from tabane.model import Container, ExitStatus, Resources
from tabane.runtimes.api import Image
from tabane.runtimes.containerd import guests
from tabane.runtimes.containerd.messages import make
from tabane.runtimes.containerd.shims import find_shims
from tabane.testing.container_bench import make_app
from tabane.testing.containerd import ContainerdBench, make_bench, make_driver
from tabane.testing.containers import make_instance
from tabane.testing.drivers import DRIVER_CHECKS, Behaviour, Check, check_out_of_memory, started
from tabane.testing.machines import make_machine
from tabane.testing.pods import POD_CHECKS
from tabane.testing.pods import Check as PodCheck
from tabane.testing.spawner import PlainSpawner

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("no_hybrid")]


@pytest.fixture
def shims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """runc's shim under the names of others: copies, as a shim starts itself by its true path."""
    for name in ("kata-v2", "aws-firecracker"):
        source = shutil.which("containerd-shim-runc-v2")
        assert source is not None
        shutil.copy(source, tmp_path / f"containerd-shim-{name}")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(guests, "KVM", Path("/dev/null"))


@pytest.fixture
async def bench(ground: Path, image: Image, shims: None) -> AsyncIterator[ContainerdBench]:
    made = make_bench(ground, image, "kata")
    yield made
    await made.aclose()


@pytest.fixture
async def pods(ground: Path, image: Image, shims: None) -> AsyncIterator[ContainerdBench]:
    made = make_bench(ground, image, "kata", pods=True)
    yield made
    await made.aclose()


@pytest.mark.parametrize("check", DRIVER_CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check: Check, bench: ContainerdBench) -> None:
    if check is not check_out_of_memory:
        await check(bench)
        return
    async with started(bench, Behaviour.EATS) as (_, handle):
        assert await bench.driver.wait(handle) == ExitStatus(signal=signal.SIGKILL)


@pytest.mark.parametrize("check", POD_CHECKS, ids=lambda check: check.__name__)
async def test_pods(check: PodCheck, pods: ContainerdBench) -> None:
    await check(pods)


async def test_what_the_guest_gets(bench: ContainerdBench) -> None:
    """Nothing of the node's but the network namespace; the image as it is, below a layer."""
    async with bench.running(make_app()) as (_, spec, handle):
        assert spec.link is not None
        bundle = bench.ground / "kata/daemon/state/io.containerd.runtime.v2.task/tabane" / spec.id
        config = msgspec.json.decode((bundle / "config.json").read_bytes())
        kinds = {space["type"]: space.get("path") for space in config["linux"]["namespaces"]}
        assert kinds.pop("network") == spec.link.network_namespace
        assert kinds == dict.fromkeys(("pid", "mount", "ipc", "uts"))
        assert not config["linux"].keys() & {"uidMappings", "gidMappings"}
        memory = config["linux"]["resources"]["memory"]["limit"]
        assert memory == spec.app.resources.memory_bytes, "what it writes is outside"
        assert {mount["type"] for mount in config["mounts"]} == {"proc", "tmpfs", "devpts", "sysfs"}
        assert (bundle / "rootfs/etc/hostname").read_text() == f"{spec.id}\n"
        assert (bundle / "rootfs/bin/busybox").stat().st_uid == 0
        assert handle.data["pid"] == bench.pid_of("containerd-shim-kata-v2", spec.id)


async def test_limits_go_through_the_shim(bench: ContainerdBench) -> None:
    async with bench.running(make_app()) as (_, spec, handle):
        await bench.driver.limit(handle, Resources(cpu=0.5, memory_bytes=96 << 20, pids=7))
        (limit,) = Path("/sys/fs/cgroup").glob(f"*{spec.cgroup}/pids.max")
        assert limit.read_text() == "7\n"


SLEEPER = Container("sleeper", command=("sleep", "1000"))


async def test_a_pod_is_one_machine(pods: ContainerdBench) -> None:
    """Its containers are told apart as CRI does, have the shim of the first, and share its limits
    and what they may write."""
    resources = Resources(cpu=0.5, memory_bytes=96 << 20, pids=16, disk_bytes=1 << 20)
    app = make_app(name="pod", resources=resources, containers=(SLEEPER,))
    async with pods.running(app) as (_, spec, handle):
        leader = f"s1-{spec.id}"
        state = pods.ground / "kata/daemon/state/io.containerd.runtime.v2.task/tabane"
        for name, kind in ((leader, "sandbox"), (spec.id, "container")):
            config = msgspec.json.decode((state / name / "config.json").read_bytes())
            assert config["annotations"] == {
                "io.kubernetes.cri.container-type": kind,
                "io.kubernetes.cri.sandbox-id": leader,
            }
            limits = config["linux"]["resources"]
            assert limits["memory"]["limit"] == 48 << 20
            assert (limits["pids"]["limit"], limits["cpu"]["quota"]) == (8, 25_000)
        (shim,) = find_shims("containerd-shim-kata-v2", leader)
        assert handle.data["pid"] == shim and not list(
            find_shims("containerd-shim-kata-v2", spec.id)
        )
        await pods.driver.limit(handle, replace(resources, pids=20))
        files = Path("/sys/fs/cgroup").glob(f"*{spec.cgroup}/*/pids.max")
        assert [file.read_text() for file in files] == ["10\n", "10\n"]
        stats = await pods.driver.stats(handle)
        assert stats.pids == 4 and stats.memory_bytes > 0


async def test_the_end_of_a_shared_shim_is_the_pod_s(pods: ContainerdBench) -> None:
    async with pods.running(make_app(name="pod", containers=(SLEEPER,))) as (_, _, handle):
        pid = handle.data["pid"]
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGKILL)
        assert (await pods.driver.wait(handle)).signal == signal.SIGKILL


async def test_it_is_ready_once_it_answers_on_the_wire(bench: ContainerdBench) -> None:
    """Found out by half a handshake: no socket table has a machine's sockets."""
    serve = ("sh", "-c", "read -r _ < /go; exec httpd -f -p 8000")
    async with make_machine(bench.ground, bench.image, make_app(serve, port=8000)) as spec:
        handle = await bench.driver.prepare(spec)
        os.mkfifo(spec.directory / "rootfs/go")
        try:
            listening = asyncio.ensure_future(bench.driver.wait_listening(handle, 8000))
            handle = await bench.driver.start(spec, handle)
            assert not listening.done()
            await asyncio.to_thread((spec.directory / "rootfs/go").write_text, "go\n")
            async with asyncio.timeout(60):
                await listening
        finally:
            await bench.driver.destroy(handle)
        assert bench.left_of(spec) == []


async def test_firecracker_containerd_has_no_network(
    bench: ContainerdBench, ground: Path, image: Image
) -> None:
    other = make_driver(bench.spawner, ground, "containerd-firecracker")
    assert not other.capabilities.network
    async with make_instance(ground, image, make_app(port=80)) as spec:
        with pytest.raises(Unsupported, match="listens on a port, and containerd-firecracker"):
            await other.prepare(spec)
        assert list(spec.directory.iterdir()) == []
    await other.aclose()


@pytest.mark.parametrize("name", ["kata", "containerd-firecracker"])
async def test_what_is_missing_is_said(
    name: str, ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node without the shim or without KVM lists the driver, and starts no containerd for it."""
    driver = make_driver(PlainSpawner(), ground / "missing", name)
    probe = await driver.probe()
    shim = {"kata": "kata-v2"}.get(name, "aws-firecracker")
    assert (probe.works, probe.reason) == (False, f"containerd-shim-{shim} is not installed")
    (tmp_path / f"containerd-shim-{shim}").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(guests, "KVM", tmp_path / "kvm")
    probe = await make_driver(PlainSpawner(), ground / "missing", name).probe()
    assert not probe.works and probe.reason.startswith(f"there is no {tmp_path}/kvm: ")
    assert not (ground / "missing").exists()


def test_figures_of_both_versions() -> None:
    v1 = make(
        "MetricsV1",
        pids=make("PidsStat", current=3),
        cpu=make("CpuStatV1", usage=make("CpuUsage", total=5_000_000)),
        memory=make("MemoryStatV1", total_inactive_file=100, usage=make("MemoryEntry", usage=900)),
    )
    v2 = make(
        "MetricsV2",
        pids=make("PidsStat", current=3),
        cpu=make("CpuStatV2", usage_usec=5000),
        memory=make("MemoryStatV2", inactive_file=100, usage=900),
    )
    for version, metrics in (("v1", v1), ("v2", v2)):
        url = f"types.containerd.io/io.containerd.cgroups.{version}.Metrics"
        found = guests.parse_metrics(make("Any", type_url=url, value=metrics.SerializeToString()))
        assert (found.cpu_us, found.memory_bytes, found.pids) == (5000, 800, 3)
    with pytest.raises(Unsupported, match=r"kind some\.Metrics"):
        guests.parse_metrics(make("Any", type_url="some.Metrics"))
