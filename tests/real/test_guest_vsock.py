"""The guest's agent where there are no ports and no names, as in Firecracker's machines. Those need
KVM; here QEMU emulates one with the same few devices, and what the host says over vsock, a program
says inside."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest

from tabane.guest.orders import ContainerOrder, StartOrder, encode_start
from tabane.runtimes.api import User
from tabane.runtimes.firecracker.machine import DISKS
from tabane.runtimes.machines.disks import copy_sparse, disk_of, layer_disk, make_image_disk
from tabane.runtimes.machines.kernel import AGENT, VIRTIO, find_kernel, make_initramfs
from tabane.runtimes.qemu.machine import PROGRAM, Accelerator, kernel_options

pytestmark = pytest.mark.real

SOURCE = Path(__file__).parent / "guest_vsock.c"
MODULES = (
    *(*VIRTIO, "virtio_mmio", "failover", "net_failover", "virtio_net", "virtio_blk", "overlay"),
    *("vsock", "vmw_vsock_virtio_transport_common", "vsock_loopback"),
)
ORDER = StartOrder(
    containers=(ContainerOrder("main", 0, ("/greet",), ("PATH=/",), "/", User(0, 0), 0, 15),),
    hostname="guest",
    address="10.0.0.2",
    mac="",
    gateway="10.0.0.1",
    gateway_mac="02:00:00:00:00:01",
    files={"hostname": "guest\n"},
    memory_bytes=32 << 20,
    pids=16,
    seed=bytes(64),
    clock_ns=1_700_000_000_000_000_000,
    stop_timeout_s=1.0,
)


async def make_disks(directory: Path) -> None:
    tree = directory / "tree"
    for name in ("etc", "proc", "dev", "sys", "tmp"):
        (tree / name).mkdir(parents=True)
    subprocess.run(  # noqa: ASYNC221 - it takes a moment
        ["gcc", "-static", "-Os", "-Wall", "-Werror", "-o", str(tree / "greet"), str(SOURCE)],
        check=True,
    )
    await make_image_disk(tree)
    shutil.copy(disk_of(tree), directory / "image0")
    copy_sparse(await layer_disk(1 << 20, directory), directory / "layer")
    (directory / "start").write_bytes(encode_start(ORDER))
    (directory / "end").write_bytes(bytes(512))


async def run_machine(directory: Path) -> bytes:
    """What it says on its console until its end."""
    kernel = find_kernel()
    ticks = int(subprocess.run([AGENT], capture_output=True, check=True).stdout)  # noqa: ASYNC221
    options = kernel_options(Accelerator("tcg", "", ticks), "tabane.ports=vsock")
    disks = []
    for name, read_only in DISKS.items():
        drive = f"id={name},file={directory / name},format=raw,if=none"
        disks += ["-drive", f"{drive},readonly={'on' if read_only else 'off'}"]
        disks += ["-device", f"virtio-blk-device,drive={name}"]
    process = await asyncio.create_subprocess_exec(
        *(PROGRAM, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-M", "microvm,rtc=on,pit=on,pic=on", "-accel", "tcg", "-cpu", "qemu64,+tsc"),
        *("-m", "144", "-kernel", str(kernel.vmlinux), "-append", options),
        *("-initrd", str(make_initramfs(kernel, MODULES, directory)), "-serial", "stdio", *disks),
        *("-netdev", "hubport,id=net,hubid=0", "-device", "virtio-net-device,netdev=net"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(60):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    return said


async def test_a_machine_without_ports(tmp_path: Path) -> None:
    """Disks in their order, output on the console, the end on a disk; over vsock whoever connected
    last is the host."""
    await make_disks(tmp_path)
    said = await run_machine(tmp_path)
    assert b"welcome twice, and the first has gone\r\n" in said, said.decode(errors="replace")
    assert (tmp_path / "end").read_bytes().rstrip(b"\0") == b"exit 7\n"
