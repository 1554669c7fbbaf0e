"""What a microVM of Firecracker's is made of: as QEMU's, in the place that the jailer goes into."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

from tabane.errors import EngineError, Unsupported
from tabane.model import Class
from tabane.runtimes import mounts
from tabane.runtimes.api import InstanceSpec, Link
from tabane.runtimes.bundle import Program
from tabane.runtimes.cgroups import Cgroup, missing_controllers
from tabane.runtimes.firecracker.machine import (
    DISKS,
    INITRAMFS,
    JAILER,
    LOG,
    METRICS,
    MODULES,
    PROGRAM,
    VMLINUX,
    Plan,
    jail_of,
    jailer_argv,
)
from tabane.runtimes.qemu.disks import disk_of
from tabane.runtimes.qemu.kernel import AGENT, GuestKernel, find_kernel, make_initramfs
from tabane.runtimes.qemu.machine import Machine, memory_for
from tabane.runtimes.qemu.parts import INNER_ID, Parts
from tabane.runtimes.tap import TAP

MACHINE = Machine("firecracker", Class.MICROVM, "", "", MODULES)
END_BYTES = 512
"""Of the disk that the guest writes its end on: one sector."""
KVM = Path("/dev/kvm")
AGENT_WORD = b"tabane.ports"
"""The option of the kernel's command line that has the agent listen on vsock (see machine.py): one
that knows it has it in its text."""


class FirecrackerParts(Parts):
    """`directory` holds what is common to its instances."""

    def __init__(self, directory: Path) -> None:
        super().__init__(MACHINE, directory)

    def check(self) -> None:
        """Raises `Unsupported` with what is missing on this machine."""
        if os.geteuid() != 0:
            raise Unsupported("Firecracker's jailer needs root: run the node as root")
        find_programs()
        if not os.access(KVM, os.R_OK | os.W_OK):
            raise Unsupported(f"there is no {KVM}, and Firecracker does not emulate processors")
        if missing := missing_controllers():
            raise Unsupported(f"no cgroup controller {', '.join(missing)}: mount it")

    def _set_up(self) -> GuestKernel:
        if self._kernel is None:
            self.check()
            kernel = find_kernel()
            if AGENT_WORD not in AGENT.read_bytes():
                raise Unsupported(
                    f"the guest agent {AGENT} speaks over virtio-serial only, "
                    "which Firecracker does not have"
                )
            self._directory.mkdir(mode=0o711, parents=True, exist_ok=True)
            self._initramfs = make_initramfs(kernel, self._machine.modules, self._directory)
            self._kernel = kernel
        return self._kernel

    def set_up(self) -> tuple[GuestKernel, Path]:
        """The guest's kernel and its initial file system. Raises `Unsupported`."""
        return self._set_up(), self._initramfs

    async def version(self) -> str:
        process = await asyncio.create_subprocess_exec(
            *(PROGRAM, "--version"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        words, _ = await process.communicate()
        if process.returncode:
            raise EngineError(f"{PROGRAM} does not run", status=process.returncode)
        return words.decode(errors="replace").partition("\n")[0]

    async def _make_disks(self, spec: InstanceSpec, link: Link, program: Program) -> None:
        await super()._make_disks(spec, link, program)
        await asyncio.to_thread(self._furnish, spec, disk_of(spec.image.tree))

    def _furnish(self, spec: InstanceSpec, image: Path) -> None:
        """Have all in the jail before the jailer makes it the root: it takes mounts along."""
        assert self._kernel is not None
        jail, owner = jail_of(spec.directory, spec.id), spec.app.id_base + INNER_ID
        jail.mkdir(parents=True)
        for name in ("layer", "start"):
            (spec.directory / name).rename(jail / name)
        (jail / "end").write_bytes(bytes(END_BYTES))
        for name in (LOG, METRICS):
            (jail / name).touch(mode=0o600)
        for path in (jail, *jail.iterdir()):
            os.chown(path, owner, owner)
        shown = {VMLINUX: self._kernel.vmlinux, INITRAMFS: self._initramfs, "image": image}
        for name, source in shown.items():
            (jail / name).touch()
            mounts.bind_read_only(source, jail / name)

    def command_line(self, spec: InstanceSpec) -> tuple[str, ...]:
        assert spec.link is not None
        argv = jailer_argv(
            find_programs(),
            spec.id,
            spec.directory,
            user=spec.app.id_base + INNER_ID,
            network=spec.link.network_namespace,
        )
        return Cgroup(spec.cgroup).entering(argv)

    def plan(self, spec: InstanceSpec) -> Plan:
        resources = spec.app.resources
        mac = (spec.directory / "mac").read_text()
        processors = max(1, int(-(-resources.cpu // 1)))
        return Plan(memory_for(resources.memory_bytes), processors, TAP if mac else "", mac)

    def tear_down(self, directory: Path) -> None:
        for root in (directory / "jail").glob(f"{PROGRAM}/*/root"):
            for name in (VMLINUX, INITRAMFS, *DISKS):
                while mounts.unmount(root / name):
                    pass
        shutil.rmtree(directory / "jail", ignore_errors=True)
        super().tear_down(directory)


def find_programs() -> tuple[str, str]:
    """The jailer, and the file of Firecracker, which it copies. Raises `Unsupported`."""
    found = {name: shutil.which(name) for name in (PROGRAM, JAILER)}
    for name, path in found.items():
        if path is None:
            raise Unsupported(f"{name} is not installed")
    return str(found[JAILER]), str(Path(str(found[PROGRAM])).resolve())
