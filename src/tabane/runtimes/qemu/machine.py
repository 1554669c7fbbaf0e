"""QEMU's command line: pure, from what is asked to the words.

Both machines have the same devices. What differs is how they hang together: `microvm` has no PCI
and next to no firmware, `q35` is a PC. Chosen so that a snapshot is possible, and the move of a
running machine will be: memory in one shared memfd under a name of its own, disks by node name, a
versioned machine type, no host device and no file system of the host's inside.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from tabane.model import Class, Value
from tabane.runtimes.machines.kernel import VIRTIO

TRANSLATED_MIB = 32
"""For emulated code, of what QEMU itself may use."""

PROGRAM = "/usr/bin/qemu-system-x86_64"
FIRMWARE = "/usr/share/qemu"
AGENT_FD, QMP_FD, END_FD, TAP_FD, OUT_FD, ERR_FD = range(10, 16)
VOLUME_FD = 16
"""And those after it: the files of volumes."""
LOG_FD = 32
"""Likewise: what the containers beside the main one say goes into these pipes, two for each."""
SAVED_MEMORY_FD, SAVED_STATE_FD = 60, 61
"""Of a machine that goes on from a checkpoint (the first is in private.c, too)."""
ERR_SET = 2
"""The console's, too."""
INSIDE = "/vm"
"""Where QEMU sees the files of its machine."""
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

DEVICES = ("failover", "net_failover", "virtio_net", "virtio_blk", "virtio_console", "overlay")


class Machine(Value, frozen=True):
    """What differs between the machines."""

    name: str
    isolation: Class
    type: str
    bus: str
    """The ending of its virtio devices' names."""
    modules: tuple[str, ...]
    no_option_rom: str = ""


MICROVM = Machine(
    "qemu-microvm",
    Class.MICROVM,
    "microvm,rtc=on,pit=on,pic=on",
    "device",
    (*VIRTIO, "virtio_mmio", *DEVICES),
)
Q35 = Machine(
    "qemu",
    Class.VM,
    "pc-q35-7.2",
    "pci",
    (*VIRTIO, "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", *DEVICES),
    no_option_rom=",romfile=",
)

DISKS = {"layer": "off", "start": "on"}
"""By node name, which is its serial number, too: may it only be read? After those of images."""


class Accelerator(Value, frozen=True):
    """How the processor is had: `kvm`, or `tcg`, which emulates it. `ticks_khz`: how fast the
    processor's counter goes, which an emulated machine has nothing to measure by."""

    name: str
    reason: str
    ticks_khz: int = 0

    @property
    def emulates(self) -> bool:
        return self.name == "tcg"


class Plan(Value, frozen=True):
    """One machine's sizes, and its network device's hardware address; empty: it has no network."""

    memory_bytes: int
    processors: int
    mac: str = ""
    images: int = 1
    volumes: int = 0
    sidecars: int = 0
    """Containers beside the main one."""
    is_saved: bool = False
    """It goes on from a checkpoint."""


def kernel_options(accelerator: Accelerator, *more: str) -> str:
    """The kernel's command line: it says nothing but its last words, and boots without delay."""
    words = [
        *("console=ttyS0", "loglevel=1", "reboot=t", "panic=-1", "nokaslr", "audit=0"),
        *("ipv6.disable=1", "cryptomgr.notests", "rcupdate.rcu_expedited=1", "tsc=reliable"),
    ]
    if accelerator.emulates:  # nothing to protect from, nothing to measure time with
        khz = accelerator.ticks_khz
        words += ["mitigations=off", "init_on_alloc=0", f"tsc_early_khz={khz}", "lpj=4000000"]
    return " ".join((*words, *more))


def processor_of(accelerator: Accelerator) -> tuple[str, str]:
    """As QEMU's `-accel` and `-cpu` name it."""
    if accelerator.emulates:
        return f"tcg,tb-size={TRANSLATED_MIB}", "qemu64,+tsc"
    return "kvm", "host,migratable=on"


def bare_argv(
    machine: Machine, plan: Plan, accelerator: Accelerator, options: str
) -> tuple[str, ...]:
    """A machine with a processor, memory, a kernel and a console on its stderr; no device."""
    accel, cpu = processor_of(accelerator)
    size = plan.memory_bytes >> 20
    return (
        *(PROGRAM, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-M", f"{machine.type},memory-backend=memory", "-accel", accel, "-cpu", cpu),
        *("-smp", str(plan.processors), "-m", str(size)),
        *("-object", f"{_memory(plan)},id=memory,size={size}M,share=on"),
        *("-kernel", f"{INSIDE}/vmlinux", "-initrd", f"{INSIDE}/initramfs", "-append", options),
        *("-add-fd", f"fd={ERR_FD},set={ERR_SET}"),
        *("-chardev", f"file,id=console,path=/dev/fdset/{ERR_SET},append=on"),
        *("-serial", "chardev:console", "-sandbox", SANDBOX),
    )


def _memory(plan: Plan) -> str:
    """Of a checkpoint it is private (private.c), whatever QEMU is told."""
    if plan.is_saved:
        return f"memory-backend-file,mem-path={INSIDE}/memory"
    return "memory-backend-memfd"


def make_argv(machine: Machine, plan: Plan, accelerator: Accelerator) -> tuple[str, ...]:
    """The whole command line of an instance's machine."""
    words = list(bare_argv(machine, plan, accelerator, kernel_options(accelerator)))
    words += ["-chardev", f"socket,id=qmp,fd={QMP_FD},server=on,wait=off"]
    words += ["-mon", "chardev=qmp,mode=control"]
    if plan.mac:
        words += ["-netdev", f"tap,id=net,fd={TAP_FD}", "-device", _network(machine, plan.mac)]
    for name, read_only in ({f"image{n}": "on" for n in range(plan.images)} | DISKS).items():
        words += _disk(machine, name, f"{INSIDE}/{name}", read_only)
    for number in range(plan.volumes):
        file = VOLUME_FD + number
        words += ["-add-fd", f"fd={file},set={file}"]
        words += _disk(machine, f"volume{number}", f"/dev/fdset/{file}", "off")
    words += ["-device", f"virtio-serial-{machine.bus}"]
    words += _port("agent", f"socket,id=agent,fd={AGENT_FD},server=on,wait=off")
    for name, file in {"out": OUT_FD, "end": END_FD, **_logs(plan)}.items():
        words += ["-add-fd", f"fd={file},set={file}"]
        words += _port(name, f"file,id={name},path=/dev/fdset/{file},append=on")
    words += _port("err", f"file,id=err,path=/dev/fdset/{ERR_SET},append=on")
    if plan.is_saved:
        words += ["-incoming", "defer"]
    return tuple(words)


def _logs(plan: Plan) -> dict[str, int]:
    """Ports of the containers beside the main one, and the descriptors of their pipes."""
    names = [name for n in range(1, plan.sidecars + 1) for name in (f"out{n}", f"err{n}")]
    return {name: LOG_FD + number for number, name in enumerate(names)}


def _port(name: str, backend: str) -> tuple[str, ...]:
    return ("-chardev", backend, "-device", f"virtserialport,chardev={name},name={name}")


def _network(machine: Machine, mac: str) -> str:
    return f"virtio-net-{machine.bus},netdev=net,mac={mac}{machine.no_option_rom}"


def _disk(machine: Machine, name: str, file: str, read_only: str) -> tuple[str, ...]:
    """By way of the node's page cache; what the guest flushes is on the node's disk. It is told of
    what cannot be written, and not stopped until there is room."""
    node = f"driver=raw,node-name={name},read-only={read_only}"
    device = f"virtio-blk-{machine.bus},drive={name},serial={name},werror=report"
    return (
        *("-blockdev", f"{node},file.driver=file,file.filename={file},file.locking=off"),
        *("-device", device),
    )


class Confinement(Value, frozen=True):
    """Where QEMU runs, and what it sees there (see confine.c)."""

    confine: Path
    root: Path
    """An empty directory."""
    user_namespace: str
    network_namespace: str
    inner_id: int
    shows: dict[str, Path]
    """What is where in its root, read-only."""
    writable: dict[str, Path] = msgspec.field(default_factory=dict)
    devices: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    filter: Path | None = None
    """A compiled seccomp filter, under which QEMU installs its own."""

    def around(self, program: tuple[str, ...]) -> tuple[str, ...]:
        """The command line that runs `program` there."""
        words = [str(self.confine), "--user", self.user_namespace, "--net", self.network_namespace]
        words += ["--id", str(self.inner_id), "--root", str(self.root), *self.options]
        words += ["--copy", f"{OUT_FD}=1", "--copy", f"{ERR_FD}=2"]
        for option, files in (("--ro", self.shows), ("--rw", self.writable)):
            for path, source in files.items():
                words += [option, f"{path}={source}"]
        for device in self.devices:
            words += ["--dev", device]
        if self.filter is not None:
            words += ["--filter", str(self.filter)]
        return (*words, "--", *program)
