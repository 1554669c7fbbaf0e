"""One microVM, pure: the jailer's command line, and what Firecracker is told before the start.

    jail/firecracker/ID/root/    the jailer's chroot, in the instance's directory
      vmlinux, initramfs         bound, read-only: the guest's kernel, the same for all
      image0, image1, ...        bound, read-only: images as disks, each one for all instances
      layer, start, end          disks of this instance alone: its files, its order, how it ended
      api.sock, vsock.sock       Firecracker's API, and the way to the agent inside
      saved/                     in memory: what a checkpoint is made in, or what it goes on from
      vsock.sock_1024, ...       where the guest says what goes into its sidecars' logs
      firecracker.log, metrics   what Firecracker says of itself
      firecracker.pid            written by the jailer

The guest's console is Firecracker's stdout, so it goes into the instance's log, with the output of
its program. Chosen so that a snapshot can be loaded elsewhere: every path is one in the chroot.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tabane.model import Value
from tabane.runtimes.machines.kernel import VIRTIO
from tabane.runtimes.machines.saved import MEMORY, STATE

PROGRAM, JAILER = "firecracker", "jailer"
API_SOCKET, VSOCK_SOCKET = "api.sock", "vsock.sock"
LOG, METRICS, PID = "firecracker.log", "metrics", "firecracker.pid"
VMLINUX, INITRAMFS = "vmlinux", "initramfs"
SAVED = "saved"
AGENT_PORT = 1
"""Where the agent inside listens on vsock."""
LOGS_PORT = 1024
"""The first of those on the node where it says what its sidecars do: two for each."""
GUEST_CID = 3
"""Of every guest: each has its own socket on the node, so they cannot be taken for each other."""
OPEN_FILES = 1024
MODULES = (
    *VIRTIO,
    *("virtio_mmio", "failover", "net_failover", "virtio_net", "virtio_blk", "overlay"),
    *("vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport"),
)
DISKS = {"image0": True, "layer": False, "start": True, "end": False}
"""May it only be read? In this order, by which the guest knows them, since Firecracker tells no
names. Other images follow."""
BOOT_OPTIONS = (
    *("console=ttyS0", "loglevel=1", "reboot=k", "panic=-1", "pci=off", "nokaslr", "audit=0"),
    *("ipv6.disable=1", "cryptomgr.notests", "rcupdate.rcu_expedited=1", "tsc=reliable"),
    *("i8042.noaux", "i8042.nomux", "i8042.dumbkbd", "tabane.ports=vsock"),
)
"""`reboot=k` ends Firecracker; the keyboard controller is there for that and for Ctrl-Alt-Del."""

Request = tuple[str, str, Any]
"""Method, path, body."""


class Plan(Value, frozen=True):
    """What differs between machines. `mac`: of its network device; empty: it has none."""

    memory_bytes: int
    processors: int
    tap: str = ""
    mac: str = ""
    images: int = 1


def disks(images: int) -> list[tuple[str, bool]]:
    """All of a machine's, as `DISKS`."""
    return [*DISKS.items(), *((f"image{number}", True) for number in range(1, images))]


def log_sockets(number: int) -> tuple[str, str]:
    """For stdout and stderr of a sidecar, counted from 1."""
    first = LOGS_PORT + 2 * (number - 1)
    return f"{VSOCK_SOCKET}_{first}", f"{VSOCK_SOCKET}_{first + 1}"


def jail_of(directory: Path, instance: str) -> Path:
    """The chroot that the jailer makes of `jailer_argv`."""
    return directory / "jail" / PROGRAM / instance / "root"


def jailer_argv(
    programs: tuple[str, str],
    instance: str,
    directory: Path,
    *,
    user: int,
    network: str,
    options: tuple[str, ...] = ("--new-pid-ns",),
) -> tuple[str, ...]:
    """Start Firecracker in a chroot in `directory`, as `user` and the group of that number, in the
    network namespace at `network`. `programs`: the jailer and Firecracker. Its cgroup is that of
    who starts the jailer. With a pid namespace of its own, the jailer leaves it behind and ends."""
    jailer, program = programs
    return (
        *(jailer, "--id", instance, "--exec-file", program),
        *("--uid", str(user), "--gid", str(user)),
        *("--chroot-base-dir", str(directory / "jail"), "--netns", network),
        *("--resource-limit", f"no-file={OPEN_FILES}", *options),
        *("--", "--api-sock", f"/{API_SOCKET}"),
    )


def make_requests(plan: Plan) -> list[Request]:
    """All that is said up to the start, in this order."""
    requests: list[Request] = [
        ("PUT", "/logger", {"log_path": f"/{LOG}", "level": "Warning", "show_level": True}),
        ("PUT", "/metrics", {"metrics_path": f"/{METRICS}"}),
        ("PUT", "/machine-config", _machine_config(plan)),
        ("PUT", "/boot-source", _boot_source()),
        *(("PUT", f"/drives/{name}", _drive(name, only)) for name, only in disks(plan.images)),
    ]
    if plan.mac:
        body = {"iface_id": "eth0", "guest_mac": plan.mac, "host_dev_name": plan.tap}
        requests.append(("PUT", "/network-interfaces/eth0", body))
    vsock = {"guest_cid": GUEST_CID, "uds_path": f"/{VSOCK_SOCKET}"}
    requests.append(("PUT", "/vsock", vsock))
    requests.append(("PUT", "/entropy", {}))
    requests.append(("PUT", "/actions", {"action_type": "InstanceStart"}))
    return requests


def trial_requests(plan: Plan, option: str) -> list[Request]:
    """A machine without devices, for whether one boots here. `option` goes to the agent."""
    boot = _boot_source()
    return [
        ("PUT", "/machine-config", _machine_config(plan)),
        ("PUT", "/boot-source", boot | {"boot_args": f"{boot['boot_args']} {option}"}),
        ("PUT", "/actions", {"action_type": "InstanceStart"}),
    ]


def _machine_config(plan: Plan) -> dict[str, Any]:
    return {
        "vcpu_count": plan.processors,
        "mem_size_mib": plan.memory_bytes >> 20,
        "smt": False,
        "track_dirty_pages": False,
    }


def _boot_source() -> dict[str, Any]:
    return {
        "kernel_image_path": f"/{VMLINUX}",
        "initrd_path": f"/{INITRAMFS}",
        "boot_args": " ".join(BOOT_OPTIONS),
    }


def _drive(name: str, read_only: bool) -> dict[str, Any]:
    return {
        "drive_id": name,
        "path_on_host": f"/{name}",
        "is_root_device": False,
        "is_read_only": read_only,
        "cache_type": "Unsafe",
        "io_engine": "Sync",
    }


def snapshot_request() -> Request:
    """Of a machine that stands still, into two files of its chroot."""
    body = {
        "snapshot_path": f"/{SAVED}/{STATE}",
        "mem_file_path": f"/{SAVED}/{MEMORY}",
        "snapshot_type": "Full",
    }
    return ("PUT", "/snapshot/create", body)


def load_requests(plan: Plan) -> list[Request]:
    """A new Firecracker goes on from a snapshot, with its own tap and sockets: instead of
    `make_requests`, and without a start."""
    first, metrics, *_ = make_requests(plan)
    body: dict[str, Any] = {
        "snapshot_path": f"/{SAVED}/{STATE}",
        "mem_backend": {"backend_type": "File", "backend_path": f"/{SAVED}/{MEMORY}"},
        "resume_vm": True,
        "clock_realtime": True,
        "vsock_override": {"uds_path": f"/{VSOCK_SOCKET}"},
    }
    if plan.mac:
        body["network_overrides"] = [{"iface_id": "eth0", "host_dev_name": plan.tap}]
    return [first, metrics, ("PUT", "/snapshot/load", body)]
