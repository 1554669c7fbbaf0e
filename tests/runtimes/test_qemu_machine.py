"""QEMU's command line, and what its machines say at their end: without QEMU."""

from __future__ import annotations

import itertools
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.images.test_checkpoint_preflight import check

from tabane.errors import Unsupported
from tabane.model import ExitStatus
from tabane.runtimes.machines import kernel
from tabane.runtimes.machines.ends import explain, parse_end, read_end, tells_of_program
from tabane.runtimes.machines.kernel import encode_cpio, find_kernel, make_initramfs
from tabane.runtimes.machines.sizes import ALIGNMENT, KERNEL_BYTES, memory_for
from tabane.runtimes.qemu.driver import versions_of
from tabane.runtimes.qemu.enforced import ENFORCEMENTS
from tabane.runtimes.qemu.machine import (
    MICROVM,
    Q35,
    Accelerator,
    Confinement,
    Machine,
    Plan,
    make_argv,
)

KVM = Accelerator("kvm", "with KVM")
TCG = Accelerator("tcg", "emulated", 2_600_000)
PLAN = Plan(memory_for(48 << 20), 2, "02:7a:b0:01:00:02")
MACHINES = pytest.mark.parametrize("machine", [MICROVM, Q35], ids=lambda machine: machine.name)


def options(argv: tuple[str, ...], name: str) -> list[str]:
    """The values of an option that may come more than once."""
    return [value for option, value in itertools.pairwise(argv) if option == name]


@pytest.mark.parametrize(
    ("here", "refusal"),
    [
        (("7.2.22", Q35, TCG), ""),
        (("8.2.2", Q35, TCG), "qemu 7.2.22 made it, and here is 8.2.2"),
        (
            ("7.2.22", replace(Q35, type="pc-q35-8.2"), TCG),
            "machine pc-q35-7.2 made it, and here is pc-q35-8.2",
        ),
        (
            ("7.2.22", Q35, KVM),
            "accelerator tcg made it, and here is kvm\n"
            "processor qemu64,+tsc made it, and here is host,migratable=on",
        ),
    ],
)
def test_a_snapshot_is_of_its_qemu_machine_and_processor(
    here: tuple[str, Machine, Accelerator], refusal: str
) -> None:
    versions = versions_of("7.2.22", Q35, TCG)
    assert check({"versions": versions}, {"versions": versions_of(*here)}) == refusal


@MACHINES
def test_a_machine_has_three_disks_and_four_ports(machine: Machine) -> None:
    argv = make_argv(machine, PLAN, KVM)
    disks = options(argv, "-blockdev")
    assert ["read-only=on" in disk for disk in disks] == [True, False, True]
    assert all("locking=off" in disk for disk in disks)
    devices = options(argv, "-device")
    drives = [device for device in devices if device.startswith("virtio-blk-")]
    serials = [drive.split(",")[2] for drive in drives]
    assert serials == ["serial=image0", "serial=layer", "serial=start"]
    ports = [device for device in devices if device.startswith("virtserialport")]
    assert [port.partition("name=")[2] for port in ports] == ["agent", "out", "end", "err"]
    assert all(device.split(",")[0].endswith((machine.bus, "port")) for device in devices)


@MACHINES
def test_a_volume_is_a_disk_whose_file_qemu_is_handed(machine: Machine) -> None:
    plan = Plan(PLAN.memory_bytes, 1, volumes=2)
    argv = make_argv(machine, plan, KVM)
    volumes = options(argv, "-blockdev")[3:]
    for number, disk in enumerate(volumes):
        file = 16 + number
        assert f"node-name=volume{number},read-only=off" in disk
        assert f"file.filename=/dev/fdset/{file}," in disk
        assert f"fd={file},set={file}" in options(argv, "-add-fd")
    drives = [device for device in options(argv, "-device") if "virtio-blk" in device]
    assert [drive.split(",")[2] for drive in drives[3:]] == ["serial=volume0", "serial=volume1"]


@MACHINES
def test_containers_beside_the_main_one_have_disks_and_logs(machine: Machine) -> None:
    argv = make_argv(machine, replace(PLAN, images=2, sidecars=2), KVM)
    disks = [words.split(",")[1] for words in options(argv, "-blockdev")]
    assert disks[:2] == ["node-name=image0", "node-name=image1"]
    ports = [word for word in options(argv, "-device") if word.startswith("virtserialport")]
    names = [port.partition("name=")[2] for port in ports]
    assert names == ["agent", "out", "end", "out1", "err1", "out2", "err2", "err"]
    files = [word for word in options(argv, "-chardev") if word.startswith("file,id=out2")]
    assert files == ["file,id=out2,path=/dev/fdset/34,append=on"]
    assert "fd=34,set=34" in options(argv, "-add-fd")


@MACHINES
def test_a_guest_is_told_that_the_nodes_disk_is_full(machine: Machine) -> None:
    argv = make_argv(machine, PLAN, KVM)
    drives = [device for device in options(argv, "-device") if "virtio-blk" in device]
    assert all(drive.endswith("werror=report") for drive in drives)


@MACHINES
@pytest.mark.parametrize("accelerator", [KVM, TCG], ids=lambda accelerator: accelerator.name)
def test_nothing_of_the_host_is_in_it_and_it_could_be_moved(
    machine: Machine, accelerator: Accelerator
) -> None:
    argv = make_argv(machine, PLAN, accelerator)
    assert "-nodefaults" in argv and "-no-user-config" in argv
    assert options(argv, "-sandbox") == [
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    ]
    assert options(argv, "-object") == ["memory-backend-memfd,id=memory,size=144M,share=on"]
    assert options(argv, "-M")[0].endswith(",memory-backend=memory")
    assert not any(word in " ".join(argv) for word in ("fsdev", "vhost", "vfio", "usb", "9p"))
    assert (options(argv, "-m"), options(argv, "-smp")) == (["144"], ["2"])
    (net,) = options(argv, "-netdev")
    assert net == "tap,id=net,fd=13"


def test_only_an_emulated_machine_is_told_how_fast_its_counter_goes() -> None:
    told = {a.name: options(make_argv(MICROVM, PLAN, a), "-append")[0] for a in (KVM, TCG)}
    assert "tsc_early_khz=2600000" in told["tcg"] and "lpj=" in told["tcg"]
    assert "tsc_early_khz" not in told["kvm"] and "mitigations=off" not in told["kvm"]
    assert options(make_argv(MICROVM, PLAN, KVM), "-accel") == ["kvm"]


def test_without_a_network_there_is_no_device_for_it() -> None:
    assert "-netdev" not in make_argv(MICROVM, Plan(PLAN.memory_bytes, 1), KVM)


@given(st.integers(1, 1 << 40))
def test_a_machine_has_what_its_app_may_use_and_its_kernel_needs(app_bytes: int) -> None:
    size = memory_for(app_bytes)
    assert 0 <= size - app_bytes - KERNEL_BYTES < ALIGNMENT
    assert size % ALIGNMENT == 0


def test_what_confines_it_is_told_all_that_it_shows() -> None:
    shows = {"/usr": Path("/usr"), "/vm/start": Path("/i/start")}
    place = Confinement(
        *(Path("/c"), Path("/i/root"), "/proc/7/ns/user", "/proc/7/ns/net", 65533, shows),
        writable={"/vm/layer": Path("/i/layer")},
        devices=("/dev/kvm",),
        filter=Path("/calls.bpf"),
    )
    argv = place.around(("qemu", "-x"))
    assert argv[:5] == ("/c", "--user", "/proc/7/ns/user", "--net", "/proc/7/ns/net")
    assert options(argv, "--ro") == ["/usr=/usr", "/vm/start=/i/start"]
    assert options(argv, "--rw") == ["/vm/layer=/i/layer"]
    assert options(argv, "--dev") == ["/dev/kvm"]
    assert options(argv, "--filter") == ["/calls.bpf"]
    assert argv[-3:] == ("--", "qemu", "-x")


@pytest.mark.parametrize(
    ("line", "machine", "status"),
    [
        ("exit 3", ExitStatus(), ExitStatus(3)),
        ("exit 255", ExitStatus(), ExitStatus(255)),
        ("exit 256", ExitStatus(), ExitStatus(255)),
        ("signal 15", ExitStatus(), ExitStatus(signal=15)),
        ("oom 9", ExitStatus(), ExitStatus(signal=9, oom=True)),
        ("signal 1000", ExitStatus(), ExitStatus(255)),
        ("failed cannot mount", ExitStatus(), ExitStatus(255)),
        ("", ExitStatus(), ExitStatus(255)),
        ("", ExitStatus(137), ExitStatus(signal=9)),
        ("", ExitStatus(signal=9), ExitStatus(signal=9)),
        ("", ExitStatus(125), ExitStatus(125)),
        ("exit 0", ExitStatus(137), ExitStatus()),
        ("exit 3 cache", ExitStatus(137), ExitStatus(3, container="cache")),
        ("oom 9 cache", ExitStatus(), ExitStatus(signal=9, oom=True, container="cache")),
    ],
)
def test_how_a_machine_ended(line: str, machine: ExitStatus, status: ExitStatus) -> None:
    assert parse_end(line, machine) == status


@given(st.text(max_size=600))
def test_whatever_a_guest_says_last_is_a_status(line: str) -> None:
    status = parse_end(line, ExitStatus())
    assert 0 <= status.code <= 255 and 0 <= status.signal <= 64
    assert isinstance(tells_of_program(line), bool)


PANIC_LOG = """\
2026-01-01T00:00:00Z stdout F serving
2026-01-01T00:00:01Z stderr F [    4.2] Kernel panic - not syncing: sysrq triggered crash
2026-01-01T00:00:01Z stderr F [    4.2] ---[ end Kernel panic - not syncing: sysrq ]---
"""


def test_why_a_machine_ended(tmp_path: Path) -> None:
    """That of its program needs no reason."""
    log = tmp_path / "log"
    assert explain(ExitStatus(3), tmp_path, "exit 3", log) == ExitStatus(3)
    assert explain(ExitStatus(255), tmp_path, "exit 255", log) == ExitStatus(255)
    down = "its machine went down: "
    assert explain(ExitStatus(255), tmp_path, "", log).reason == f"{down}it did not say why"
    log.write_text(PANIC_LOG)
    panic = "Kernel panic - not syncing: sysrq triggered crash"
    assert explain(ExitStatus(255), tmp_path, "", log).reason == down + panic
    (tmp_path / "cut").write_text("the guest answers what nobody asked")
    cut = explain(ExitStatus(signal=9), tmp_path, "", log)
    assert cut.reason == "its machine was ended: the guest answers what nobody asked"


def test_of_a_last_word_one_line_is_read(tmp_path: Path) -> None:
    assert read_end(tmp_path) == ""
    (tmp_path / "end").write_bytes(b"exit 4\n" + b"x" * 10_000)
    assert read_end(tmp_path) == "exit 4"
    (tmp_path / "end").write_bytes(b"\xff" * 10_000)
    assert len(read_end(tmp_path)) == 512


def test_the_initial_file_system_is_an_archive_of_the_agent_and_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "AGENT", tmp_path / "agent")
    (tmp_path / "agent").write_bytes(b"an agent")
    (tmp_path / "modules").mkdir()
    for name in ("one", "two"):
        (tmp_path / "modules" / f"{name}.ko").write_bytes(name.encode() * 3)
    with pytest.raises(Unsupported, match=f"no guest kernel at {tmp_path}/vmlinux"):
        find_kernel(tmp_path)
    (tmp_path / "vmlinux").touch()
    (tmp_path / "release").write_text("6.1\n")
    found = find_kernel(tmp_path)
    assert found.release == "6.1"
    path = make_initramfs(found, ("two", "one"), tmp_path)
    entries = parse_cpio(path.read_bytes())
    assert entries["init"] == (stat.S_IFREG | 0o755, b"an agent")
    assert entries["modules"][1] == b"two\none\n"
    assert entries["lib/two.ko"][1] == b"twotwotwo"
    assert stat.S_ISCHR(entries["dev/console"][0])
    assert make_initramfs(found, ("two", "one"), tmp_path) == path
    assert make_initramfs(found, ("one", "two"), tmp_path) != path
    with pytest.raises(Unsupported, match=r"no module .*three\.ko"):
        make_initramfs(found, ("three",), tmp_path)
    (tmp_path / "agent").unlink()
    with pytest.raises(Unsupported, match="agent was not compiled"):
        find_kernel(tmp_path)


def parse_cpio(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Modes and contents by name, as the kernel reads them (initramfs/buffer-format.rst)."""
    found, at = {}, 0
    while True:
        assert archive[at : at + 6] == b"070701" and at % 4 == 0
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, length = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + length - 1].decode()
        start = (at + 110 + length + 3) & ~3
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, archive[start : start + size])
        at = (start + size + 3) & ~3


def test_the_same_contents_are_the_same_archive() -> None:
    entries = [("a", stat.S_IFREG | 0o644, b"text", 0)]
    assert encode_cpio(entries) == encode_cpio(list(entries))


def test_every_default_has_a_row() -> None:
    assert {row.default for row in ENFORCEMENTS} >= {
        *("no_new_privileges", "capabilities", "seccomp", "user_namespace", "low_ports"),
        *("read_only_image", "disk_quota", "pids", "memory", "cpu", "egress", "node_services"),
    }
