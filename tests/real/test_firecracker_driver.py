"""The driver for Firecracker, over a stand-in that answers by the contract: there is no KVM here.
The jail, its mounts, the tap, cgroups and processes are real."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from msgspec.structs import replace

from tabane.errors import EngineError, Unsupported
from tabane.guest.frames import Kind, encode_frame
from tabane.guest.orders import parse_fields
from tabane.model import App, Container, ExitStatus
from tabane.runtimes import load
from tabane.runtimes.api import Handle, Image, InstanceSpec
from tabane.runtimes.firecracker import client, parts
from tabane.runtimes.firecracker.client import Api
from tabane.runtimes.firecracker.driver import FirecrackerDriver
from tabane.runtimes.firecracker.machine import (
    API_SOCKET,
    SAVED,
    Plan,
    jail_of,
    make_requests,
    snapshot_request,
)
from tabane.runtimes.machines import parts as common
from tabane.runtimes.machines.disks import disk_of
from tabane.runtimes.machines.kernel import GuestKernel
from tabane.testing import drivers, pods
from tabane.testing.checkpoints import place
from tabane.testing.containers import ID_BASE, SMALL, find_left, make_tree, open_directory
from tabane.testing.drivers import SAID, Behaviour, Check, wait_until_said
from tabane.testing.firecracker import install
from tabane.testing.machine_bench import workdir_for
from tabane.testing.machines import make_machine
from tabane.testing.pods import FIRST, SECOND, with_sidecars
from tabane.testing.spawner import PlainSpawner

pytestmark = pytest.mark.real

SAY = f"echo {SAID.decode()}"
COMMANDS = {
    Behaviour.WAITS: ("sleep", "1000"),
    Behaviour.SAYS: ("sh", "-c", SAY),
    Behaviour.EXITS: ("sh", "-c", "exit 3"),
    Behaviour.STAYS: ("sh", "-c", f"trap '' TERM; {SAY}; while :; do sleep 0.1; done"),
    Behaviour.BREAKS: ("true",),
}
OF_THE_AGENT = (
    drivers.check_exec,
    drivers.check_left,
    drivers.check_left_holding,
    drivers.check_terminal,
    drivers.check_copy,
    drivers.check_guest_processes,
    drivers.check_out_of_memory,
)
"""What the agent inside does, which is the one that QEMU's machines have; it needs a real guest."""
CASES = [check for check in drivers.DRIVER_CHECKS if check not in OF_THE_AGENT]
POD_CASES = (pods.check_first_end, pods.check_stop, pods.check_logs, pods.check_broken_sidecar)
"""The others are the agent's affair, too."""


@dataclass
class FirecrackerBench:
    driver: FirecrackerDriver
    spawner: PlainSpawner
    ground: Path
    image: Image
    programs: Path
    again: list[FirecrackerDriver] = field(default_factory=list)

    def restarted(self) -> FirecrackerDriver:
        self.driver.abort()
        driver = load("firecracker", self.spawner, self.ground / "firecracker")
        assert isinstance(driver, FirecrackerDriver)
        self.again.append(driver)
        return driver

    @asynccontextmanager
    async def instance(self, behaviour: Behaviour) -> AsyncIterator[InstanceSpec]:
        app = make_app(COMMANDS[behaviour], name=behaviour, workdir=workdir_for(behaviour))
        async with make_machine(self.ground, self.image, app) as spec:
            yield spec

    @asynccontextmanager
    async def pod(self, main: Behaviour, *sidecars: Behaviour) -> AsyncIterator[InstanceSpec]:
        async with self.instance(main) as spec:
            containers = [
                Container(name, command=COMMANDS[each], workdir=workdir_for(each))
                for name, each in zip((FIRST, SECOND), sidecars, strict=False)
            ]
            spec = replace(spec, app=replace(spec.app, name="-".join((main, *sidecars))))
            yield with_sidecars(spec, *containers)

    def left_of(self, spec: InstanceSpec) -> list[str]:
        return find_left(spec)

    def fail(self, **faults: str) -> None:
        (self.programs / "faults.json").write_text(json.dumps(faults))

    @asynccontextmanager
    async def running(self, app: App) -> AsyncIterator[tuple[InstanceSpec, Handle]]:
        async with make_machine(self.ground, self.image, app) as spec:
            handle = await self.driver.prepare(spec)
            try:
                yield spec, await self.driver.start(spec, handle)
            finally:
                await self.driver.destroy(handle)
            assert find_left(spec) == []

    @asynccontextmanager
    async def restored(self, images: Path) -> AsyncIterator[tuple[InstanceSpec, Handle]]:
        app = make_app(("sleep", "1000"))
        async with make_machine(self.ground, self.image, app) as spec:
            handle = await self.driver.prepare(spec)
            try:
                yield spec, await self.driver.restore(spec, handle, images)
            finally:
                await self.driver.destroy(handle)
            assert find_left(spec) == []


def make_app(command: tuple[str, ...] = (), *, name: str = "app", **fields: object) -> App:
    app = App(name=name, image="test", command=command, resources=SMALL, id_base=ID_BASE)
    return replace(app, **fields)


@pytest.fixture(scope="module")
def ground() -> Iterator[Path]:
    with open_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def image(ground: Path) -> Image:
    return make_tree(ground)


@pytest.fixture
def programs(ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for Firecracker and its jailer, and for the guest's kernel and KVM."""
    install(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    kernel = tmp_path / "vmlinux"
    kernel.touch()
    initramfs = tmp_path / "initramfs"
    initramfs.touch()
    agent = tmp_path / "agent"
    agent.write_bytes(parts.AGENT_WORD)
    guest = GuestKernel(kernel, tmp_path, "1.0")
    monkeypatch.setattr(parts, "AGENT", agent)
    monkeypatch.setattr(parts, "KVM", Path("/dev/null"))
    monkeypatch.setattr(common, "find_kernel", lambda: guest)
    monkeypatch.setattr(common, "make_initramfs", lambda *_: initramfs)
    return tmp_path


@pytest.fixture
async def bench(ground: Path, image: Image, programs: Path) -> AsyncIterator[FirecrackerBench]:
    spawner = PlainSpawner()
    driver = load("firecracker", spawner, ground / "firecracker")
    assert isinstance(driver, FirecrackerDriver)
    made = FirecrackerBench(driver, spawner, ground, image, programs)
    yield made
    for one in (driver, *made.again):
        await one.aclose()
    await spawner.aclose()


@pytest.mark.parametrize("check", CASES, ids=lambda check: check.__name__)
async def test_conformance(check: Check, bench: FirecrackerBench) -> None:
    await check(bench)


@pytest.mark.parametrize("check", POD_CASES, ids=lambda check: check.__name__)
async def test_pods(check: pods.Check, bench: FirecrackerBench) -> None:
    await check(bench)


async def test_each_image_is_a_disk(bench: FirecrackerBench, ground: Path) -> None:
    """One that two containers have is there once; they follow those that every machine has."""
    place = ground / "other"
    place.mkdir()
    other = replace(make_tree(place), digest="sha256:" + "1" * 64)
    async with bench.pod(Behaviour.WAITS, Behaviour.WAITS, Behaviour.WAITS) as spec:
        first, second = spec.sidecars
        spec = replace(spec, sidecars=(replace(first, image=other), second))
        handle = await bench.driver.prepare(spec)
        try:
            handle = await bench.driver.start(spec, handle)
            jail = jail_of(spec.directory, spec.id)
            sizes = {path.name: path.stat().st_size for path in jail.glob("image*")}
            disks = [disk_of(image.tree).stat().st_size for image in (spec.image, other)]
            assert sizes == {f"image{number}": size for number, size in enumerate(disks)}
        finally:
            await bench.driver.destroy(handle)
        assert find_left(spec) == []
    drives = [path for _, path, _ in make_requests(Plan(1 << 28, 1, images=2)) if "drive" in path]
    assert [Path(drive).name for drive in drives] == ["image0", "layer", "start", "end", "image1"]


async def fail_to_start(bench: FirecrackerBench) -> EngineError:
    """Why an instance did not start; nothing is left of it."""
    async with make_machine(bench.ground, bench.image, make_app()) as spec:
        handle = await bench.driver.prepare(spec)
        with pytest.raises(EngineError) as failure:
            await bench.driver.start(spec, handle)
        await bench.driver.destroy(handle)
        assert find_left(spec) == []
    return failure.value


async def test_a_refused_call(bench: FirecrackerBench) -> None:
    bench.fail(refuses="PUT /entropy")
    error = await fail_to_start(bench)
    assert error.message == "Firecracker refused PUT /entropy: told to refuse PUT /entropy"
    assert (error.status, error.output) == (400, "told to refuse PUT /entropy")


async def test_it_dies_while_it_is_told(bench: FirecrackerBench) -> None:
    bench.fail(dies="PUT /boot-source")
    assert "[anonymous] killed at PUT /boot-source" in (await fail_to_start(bench)).message


async def test_its_socket_never_comes(
    bench: FirecrackerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SOCKET_S", 0.2)
    bench.fail(mute="api")
    assert "Firecracker did not listen within" in (await fail_to_start(bench)).message


async def test_a_kernel_that_panics(bench: FirecrackerBench) -> None:
    bench.fail(panics="yes")
    assert "Kernel panic - not syncing" in (await fail_to_start(bench)).message


@pytest.mark.parametrize("killed", [True, False])
async def test_a_guest_that_never_answers(bench: FirecrackerBench, killed: bool) -> None:
    """The start waits until it is given up, as the executor does after `start_timeout`, or until
    the machine's end."""
    bench.fail(mute="guest")
    async with make_machine(bench.ground, bench.image, make_app()) as spec:
        handle = await bench.driver.prepare(spec)
        starting = asyncio.ensure_future(bench.driver.start(spec, handle))
        api = jail_of(spec.directory, spec.id) / API_SOCKET
        await client.wait_for_api(api)

        async def runs() -> bool:
            return (await Api(api).call("GET", "/"))["state"] == "Running"

        await drivers.until(runs)
        assert not starting.done()
        if killed:
            os.kill(int((api.parent / "firecracker.pid").read_text()), signal.SIGKILL)
        else:
            starting.cancel()
        await asyncio.wait([starting])
        assert starting.cancelled() or isinstance(starting.exception(), EngineError)
        await bench.driver.destroy(handle)
        assert find_left(spec) == []


FLOOD = encode_frame(Kind.OUTPUT, 7, b"x" * 1000) * 16


async def test_a_guest_that_floods_is_ended(bench: FirecrackerBench) -> None:
    """Frames that nobody asked for, without end: its machine is ended at once, and the reason
    says why, also to the next agent."""
    bench.fail(floods=FLOOD.hex())
    async with bench.running(make_app(("sleep", "1000"))) as (_, handle):
        await bench.driver.stats(handle)
        end = await asyncio.wait_for(bench.driver.wait(handle), drivers.PATIENCE_S)
        said = "the guest says something in a conversation that there is not"
        assert end == ExitStatus(signal=9, reason=f"its machine was ended: {said}")
        assert await bench.restarted().wait(handle) == end


async def test_killed_from_outside(bench: FirecrackerBench) -> None:
    async with bench.running(make_app(("sleep", "1000"))) as (_, handle):
        pid = handle.data["pid"]
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGKILL)
        assert await bench.driver.wait(handle) == ExitStatus(signal=signal.SIGKILL)


async def test_killed_while_it_is_stopped(bench: FirecrackerBench) -> None:
    app = make_app(COMMANDS[Behaviour.STAYS])
    async with bench.running(app) as (spec, handle):
        await wait_until_said(spec)
        stopping = asyncio.ensure_future(bench.driver.stop(handle, 20))
        pid = handle.data["pid"]
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGKILL)
        await stopping
        assert await bench.driver.wait(handle) == ExitStatus(signal=signal.SIGKILL)


async def test_a_frozen_machine_is_paused(bench: FirecrackerBench) -> None:
    async with bench.running(make_app(("sleep", "1000"))) as (spec, handle):
        api = Api(jail_of(spec.directory, spec.id) / API_SOCKET)
        with pytest.raises(EngineError, match="has to be paused"):
            await api.call(*snapshot_request())
        await bench.driver.freeze(handle)
        assert (await api.call("GET", "/"))["state"] == "Paused"
        await bench.driver.thaw(handle)
        assert (await api.call("GET", "/"))["state"] == "Running"


async def test_a_copy(bench: FirecrackerBench) -> None:
    """By the contract: saved while it is paused, and loaded with a tap and sockets of its own; the
    agent inside is told who it is before anything else is."""
    with place() as images:
        async with bench.running(make_app(("sleep", "1000"))) as (origin, handle):
            await bench.driver.checkpoint(handle, images, leave_running=True)
            jail = jail_of(origin.directory, origin.id)
            api = Api(jail / API_SOCKET)
            assert (await api.call("GET", "/"))["state"] == "Running"
            assert [*(jail / SAVED).iterdir()] == [], "nothing of it stays there"
            assert (jail / "released").read_bytes() == b"", "it is who it was"
            async with bench.restored(images) as (spec, copy):
                jail = jail_of(spec.directory, spec.id)
                assert (await Api(jail / API_SOCKET).call("GET", "/"))["state"] == "Running"
                told = dict(parse_fields((jail / "released").read_bytes()))
                assert told[b"h"] == spec.id.encode() != origin.id.encode()
                with pytest.raises(OSError, match="Read-only"):
                    (jail / SAVED / "memory").open("r+b")
                assert copy.data["pid"] != handle.data["pid"]
            with_others = replace(handle, data=handle.data | {"containers": ["beside"]})
            with pytest.raises(Unsupported, match="with several containers cannot be saved"):
                await bench.driver.checkpoint(with_others, images, leave_running=True)
        (images / "state").write_bytes(b"x" * (images / "state").stat().st_size)
        with pytest.raises(EngineError, match="Load snapshot error"):
            async with bench.restored(images):
                pass


async def test_a_dump_that_is_refused(bench: FirecrackerBench) -> None:
    """It goes on."""
    bench.fail(refuses="PUT /snapshot/create")
    with place() as images:
        async with bench.running(make_app(("sleep", "1000"))) as (spec, handle):
            with pytest.raises(EngineError, match="told to refuse"):
                await bench.driver.checkpoint(handle, images, leave_running=True)
            api = Api(jail_of(spec.directory, spec.id) / API_SOCKET)
            assert (await api.call("GET", "/"))["state"] == "Running"


async def test_what_it_runs_in(bench: FirecrackerBench) -> None:
    """In the instance's cgroup, in the link's network behind a tap; what all share is read-only."""
    async with bench.running(make_app(("sleep", "1000"))) as (spec, handle):
        jail = jail_of(spec.directory, spec.id)
        assert handle.data["pid"] in await bench.driver.processes(handle)
        assert spec.link is not None
        config = await Api(jail / API_SOCKET).call("GET", "/machine-config")
        assert config["vcpu_count"] == 1 and config["mem_size_mib"] >= 48
        for name in ("vmlinux", "image0"):
            with pytest.raises(OSError, match="Read-only"):
                (jail / name).open("r+b")
        owner = ID_BASE + common.INNER_ID
        assert {(jail / name).stat().st_uid for name in ("layer", "start", "end")} == {owner}


async def test_probe(bench: FirecrackerBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thing that may be missing is said."""
    probe = await bench.driver.probe()
    assert (probe.works, probe.reason) == (True, "Firecracker v1.17.0, a stand-in")
    bench.fail(panics="yes")
    probe = await bench.restarted().probe()
    assert not probe.works and probe.reason.endswith("Kernel panic - not syncing: told to")
    parts.AGENT.write_bytes(b"another")
    probe = await bench.restarted().probe()
    assert not probe.works and "speaks over virtio-serial only" in probe.reason
    monkeypatch.setattr(parts, "KVM", Path("/nonexistent/kvm"))
    probe = await bench.restarted().probe()
    assert not probe.works and probe.reason.startswith("there is no /nonexistent/kvm")
    monkeypatch.setenv("PATH", "/nonexistent")
    probe = await bench.restarted().probe()
    assert (probe.works, probe.reason) == (False, "firecracker is not installed")
    assert not (bench.ground / "firecracker/trial").exists()
