"""What QEMU's machines refuse before anything is started, and why they do not work where they do
not."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from tabane.errors import Unsupported, UsageError
from tabane.model import SecurityPolicy
from tabane.runtimes import mounts
from tabane.runtimes.machines import kernel
from tabane.runtimes.qemu import parts as qemu_parts
from tabane.testing.drivers import refused
from tabane.testing.machine_bench import MachineBench, make_app
from tabane.testing.machines import make_machine

pytestmark = pytest.mark.real


@pytest.fixture
def bench(microvms: MachineBench) -> MachineBench:
    return microvms


async def test_refusals(bench: MachineBench) -> None:
    async with make_machine(bench.ground, bench.image, make_app()) as spec:
        for changed in (
            replace(spec, link=None),
            replace(spec, image=replace(spec.image, host_usr=True)),
        ):
            await refused(bench.driver.prepare(changed), Unsupported)
        app = replace(spec.app, command=("no-such",), revision=2)
        await refused(bench.driver.prepare(replace(spec, app=app)), UsageError)
        assert bench.left_of(spec) == []
        assert mounts.targets_below(spec.directory) == []


async def test_a_qemu_that_cannot_be_executed_says_so(
    bench: MachineBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "qemu-system-x86_64"
    monkeypatch.setattr(qemu_parts, "PROGRAM", str(program))
    probe = await bench.driver.probe()
    assert probe.reason == f"{program} is not there: install qemu-system-x86"
    program.write_text("no program")
    program.chmod(0o644)
    probe = await bench.restarted().probe()
    assert not probe.works
    assert probe.reason.startswith(f"{program} is there and cannot be executed: see its mode")


@pytest.mark.parametrize("name", ["CAP_SYS_MODULE", "CAP_MKNOD"])
async def test_a_capability_that_no_program_has_in_a_machine(
    bench: MachineBench, name: str
) -> None:
    """Placement knows it before; a start refuses it, too."""
    assert name in bench.driver.capabilities.refuses
    app = make_app(security=SecurityPolicy(capabilities=(name,)))
    async with make_machine(bench.ground, bench.image, app) as spec:
        with pytest.raises(Unsupported, match=f"qemu-microvm gives no program {name}"):
            await bench.driver.prepare(spec)
        assert bench.left_of(spec) == []


async def test_a_machine_without_a_kernel_says_so(
    bench: MachineBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "PREFIX", tmp_path)
    probe = await bench.driver.probe()
    assert not probe.works
    assert f"there is no guest kernel at {tmp_path}/vmlinux" in probe.reason
