"""The solo5 driver keeps to the interface and to the tender's command line, with a stand-in for the
tender that wants of its surroundings what the real one wants."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec.structs import replace

from tabane.errors import Unsupported, UsageError
from tabane.model import App, Resources
from tabane.network.netlink import run_in_network_of
from tabane.runtimes import load
from tabane.runtimes.api import Driver, Image, InstanceSpec
from tabane.runtimes.unikernel import solo5
from tabane.runtimes.unikernel.host import INNER_ID
from tabane.runtimes.unikernel.solo5 import Solo5Driver
from tabane.testing.containers import ID_BASE, find_left, make_instance
from tabane.testing.drivers import DRIVER_CHECKS, Behaviour, Check, wait_until_said
from tabane.testing.solo5 import make_unikernel
from tabane.testing.spawner import PlainSpawner

pytestmark = pytest.mark.real

SOURCE = Path(__file__).parent / "solo5/tender.c"
RESOURCES = Resources(memory_bytes=32 << 20, pids=8, disk_bytes=1 << 20)
MACHINE = {"x86_64": 0x3E, "aarch64": 0xB7}[platform.machine()]


@pytest.fixture(scope="module")
def tenders(ground: Path) -> Path:
    """A directory for the PATH."""
    directory = ground / "bin"
    directory.mkdir()
    argv = ("gcc", "-O1", "-o", str(directory / "solo5-spt"), str(SOURCE))
    subprocess.run(argv, check=True, timeout=60)
    return directory


def make_image(ground: Path, name: str, *devices: tuple[str, str], target: int = 2) -> Image:
    tree = ground / f"{name}-tree"
    if not tree.exists():
        tree.mkdir()
        content = make_unikernel(*devices, target=target, machine=MACHINE)
        (tree / "app.spt").write_bytes(content)
    return Image(f"sha256:{name}", tree, kind="solo5", entrypoint=("/app.spt",))


def make_app(*command: str, **fields: object) -> App:
    app = App(name="app", image="test", command=command, resources=RESOURCES, id_base=ID_BASE)
    return replace(app, image_kind="solo5", **fields)


@asynccontextmanager
async def wired(spec: InstanceSpec) -> AsyncIterator[InstanceSpec]:
    """With an `eth0`, as links of a node have."""
    assert spec.link is not None

    def lay() -> None:
        subprocess.run(
            ("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "node"), check=True
        )

    run_in_network_of(spec.link.parked_pid, lay)
    yield spec


@dataclass
class Solo5Bench:
    driver: Solo5Driver
    spawner: PlainSpawner
    ground: Path

    def restarted(self) -> Driver:
        return load("solo5-spt", self.spawner, self.ground / "solo5-spt")

    @asynccontextmanager
    async def instance(self, behaviour: Behaviour) -> AsyncIterator[InstanceSpec]:
        image = make_image(self.ground, "plain")
        async with make_instance(self.ground, image, make_app(behaviour)) as spec:
            yield spec

    def left_of(self, spec: InstanceSpec) -> list[str]:
        return find_left(spec)


@pytest.fixture
async def bench(
    ground: Path, tenders: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Solo5Bench]:
    monkeypatch.setenv("PATH", f"{tenders}:{os.environ['PATH']}")
    spawner = PlainSpawner()
    driver = load("solo5-spt", spawner, ground / "solo5-spt")
    assert isinstance(driver, Solo5Driver)
    yield Solo5Bench(driver, spawner, ground)
    await spawner.aclose()


@pytest.mark.parametrize("check", DRIVER_CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check: Check, bench: Solo5Bench) -> None:
    await check(bench)


async def test_devices(bench: Solo5Bench) -> None:
    """A tap behind the link, which keeps its address, and a file for each block device."""
    image = make_image(bench.ground, "devices", ("service", "net"), ("data", "block"))
    app = make_app("waits", "--ipv4={address}/16", "--gateway={gateway}", port=8000)
    async with make_instance(bench.ground, image, app) as bare, wired(bare) as spec:
        handle = await bench.driver.prepare(spec)
        try:
            handle = await bench.driver.start(spec, handle)
            await wait_until_said(spec, b"argument --gateway")
            lines = spec.log.read_text().splitlines()
            assert lines[0] == "option --mem=16"
            assert lines[1] == "option --net:service=tap0"
            assert lines[2].startswith("option --net-mac:service=")
            assert lines[3] == "option --block:data=/disks/data"
            assert lines[4:] == [
                "argument waits",
                "argument --ipv4=127.0.0.1/16",
                "argument --gateway=127.0.0.1",
            ]
            disk = spec.directory / "disks/data"
            assert disk.read_bytes().startswith(b"written by the tender")
            assert (disk.stat().st_size, disk.stat().st_uid) == (1 << 20, ID_BASE + INNER_ID)
            status = Path(f"/proc/{handle.data['pid']}/status").read_text()
            assert f"Uid:\t{ID_BASE + INNER_ID}\t" in status
            assert "CapBnd:\t0000000000000000\n" in status and "NoNewPrivs:\t1\n" in status
            seen = {path.name for path in Path(f"/proc/{handle.data['pid']}/root").iterdir()}
            assert seen <= {"tender", "unikernel", "disks", "dev", "lib", "lib64", "usr"}
        finally:
            await bench.driver.destroy(handle)
        assert bench.left_of(spec) == []


@pytest.mark.parametrize(
    ("devices", "target", "fields", "problem"),
    [
        ((), 1, {}, "built for solo5's hvt, this is spt"),
        ((("a", "net"), ("b", "net")), 2, {}, "networks a, b: an instance has one"),
        ((), 2, {"port": 80}, "its manifest has no network"),
        ((), 2, {"resources": Resources(memory_bytes=16 << 20)}, "memory must be more than 16"),
        ((), 2, {"workdir": "/"}, "leave out workdir"),
    ],
)
async def test_refusals(
    bench: Solo5Bench,
    devices: tuple[tuple[str, str], ...],
    target: int,
    fields: dict[str, object],
    problem: str,
) -> None:
    name = f"refused-{target}-{len(devices)}"
    image = make_image(bench.ground, name, *devices, target=target)
    async with make_instance(bench.ground, image, make_app(**fields)) as spec:
        with pytest.raises((UsageError, Unsupported), match=problem):
            await bench.driver.prepare(spec)
        assert bench.left_of(spec) == []


async def test_without_a_tender(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    for name in ("solo5-spt", "solo5-hvt"):
        probe = await load(name, PlainSpawner(), ground / "none").probe()
        assert not probe.works
        assert probe.reason == (
            f"{name} is not installed: build solo5 and put its tender on the PATH"
        )


async def test_the_probe_says_what_it_did_not_try(bench: Solo5Bench) -> None:
    probe = await bench.driver.probe()
    assert probe.works
    assert probe.reason == ("solo5-spt tender, version v0.9.0; no unikernel was started to try it")


async def test_hvt_needs_a_kvm_that_can_be_opened(
    ground: Path, tenders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hvt = ground / "hvt"
    hvt.mkdir()
    (hvt / "solo5-hvt").symlink_to(tenders / "solo5-spt")
    monkeypatch.setenv("PATH", f"{hvt}:/usr/bin:/bin")
    monkeypatch.setattr(solo5, "KVM", ground / "kvm")
    driver = load("solo5-hvt", PlainSpawner(), ground / "solo5-hvt")
    assert driver.capabilities.needs_kvm
    probe = await driver.probe()
    assert (probe.works, probe.reason) == (False, f"{ground}/kvm is missing")
