"""What a microVM of Firecracker's is made of beside what all machines are: the place that the
jailer goes into."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tabane.errors import Unsupported
from tabane.runtimes import mounts
from tabane.runtimes.api import InstanceSpec
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.firecracker.machine import (
    INITRAMFS,
    JAILER,
    LOG,
    METRICS,
    MODULES,
    PROGRAM,
    SAVED,
    VMLINUX,
    Plan,
    jail_of,
    jailer_argv,
    log_sockets,
)
from tabane.runtimes.machines.kernel import AGENT, GuestKernel
from tabane.runtimes.machines.parts import MachineParts, disks_of, owner_of, processors_of
from tabane.runtimes.machines.relays import Places
from tabane.runtimes.machines.saved import MEMORY, STATE
from tabane.runtimes.machines.sizes import memory_for
from tabane.runtimes.tap import TAP

END_BYTES = 512
"""Of the disk that the guest writes its end on: one sector."""
STATE_BYTES = 16 << 20
"""More than processors and devices take."""
KVM = Path("/dev/kvm")
AGENT_WORD = b"tabane.ports"
"""The option of the kernel's command line that has the agent listen on vsock (see machine.py): one
that knows it has it in its text."""


class FirecrackerParts(MachineParts):
    """`directory` holds what is common to its instances."""

    def __init__(self, directory: Path) -> None:
        super().__init__(MODULES, directory)

    def check(self) -> None:
        if os.geteuid() != 0:
            raise Unsupported("Firecracker's jailer needs root: run the node as root")
        find_programs()
        if not os.access(KVM, os.R_OK | os.W_OK):
            raise Unsupported(f"there is no {KVM}, and Firecracker does not emulate processors")
        super().check()

    def set_up(self) -> tuple[GuestKernel, Path]:
        found = super().set_up()
        if AGENT_WORD not in AGENT.read_bytes():
            raise Unsupported(
                f"the guest agent {AGENT} speaks over virtio-serial only, "
                "which Firecracker does not have"
            )
        return found

    def furnish(self, spec: InstanceSpec) -> None:
        """Have all in the jail before the jailer makes it the root: it takes mounts along."""
        kernel, initramfs = self.set_up()
        jail, owner = jail_of(spec.directory, spec.id), owner_of(spec)
        jail.mkdir(parents=True)
        for name in ("layer", "start"):
            (spec.directory / name).rename(jail / name)
        (jail / "end").write_bytes(bytes(END_BYTES))
        for name in (LOG, METRICS):
            (jail / name).touch(mode=0o600)
        for path in (jail, *jail.iterdir()):
            os.chown(path, owner, owner)
        images = {f"image{number}": disk for number, disk in enumerate(disks_of(spec))}
        for name, source in ({VMLINUX: kernel.vmlinux, INITRAMFS: initramfs} | images).items():
            (jail / name).touch()
            mounts.bind_read_only(source, jail / name)
        self._furnish_saved(spec, jail / SAVED)

    def _furnish_saved(self, spec: InstanceSpec, place: Path) -> None:
        """A checkpoint is made in memory: nothing of one may be plain on a disk."""
        place.mkdir()
        size = memory_for(spec.app.resources.memory_bytes) + STATE_BYTES
        flags = mounts.MS_NOSUID | mounts.MS_NODEV
        mounts.mount("tmpfs", place, f"mode=0700,size={size}", flags)
        os.chown(place, owner_of(spec), owner_of(spec))

    def show_saved(self, spec: InstanceSpec, directory: Path) -> None:
        """Have a checkpoint in the jail, of which this instance's alone is the way to it."""
        place = jail_of(spec.directory, spec.id) / SAVED
        for name in (MEMORY, STATE):
            (directory / name).chmod(0o644)  # its directory is not open to others
            (place / name).touch()
            mounts.bind_read_only(directory / name, place / name)

    def log_places(self, spec: InstanceSpec, number: int) -> Places:
        jail = jail_of(spec.directory, spec.id)
        out, err = log_sockets(number)
        return jail / out, jail / err

    def command_line(self, spec: InstanceSpec) -> tuple[str, ...]:
        assert spec.link is not None
        argv = jailer_argv(
            find_programs(),
            spec.id,
            spec.directory,
            user=owner_of(spec),
            network=spec.link.network_namespace,
        )
        return Cgroup(spec.cgroup).entering(argv)

    def plan(self, spec: InstanceSpec) -> Plan:
        mac = (spec.directory / "mac").read_text()
        memory, processors = memory_for(spec.app.resources.memory_bytes), processors_of(spec.app)
        return Plan(memory, processors, TAP if mac else "", mac, len(disks_of(spec)))

    def tear_down(self, directory: Path) -> None:
        for root in (directory / "jail").glob(f"{PROGRAM}/*/root"):
            for path in mounts.targets_below(root):
                mounts.unmount(path)
        shutil.rmtree(directory / "jail", ignore_errors=True)
        super().tear_down(directory)


def find_programs() -> tuple[str, str]:
    """The jailer, and the file of Firecracker, which it copies. Raises `Unsupported`."""
    found = {name: shutil.which(name) for name in (PROGRAM, JAILER)}
    for name, path in found.items():
        if path is None:
            raise Unsupported(f"{name} is not installed")
    return str(found[JAILER]), str(Path(str(found[PROGRAM])).resolve())
