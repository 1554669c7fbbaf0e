"""The guest's kernel, and the initial file system that the agent starts from.

`scripts/guest-kernel` unpacks Debian's kernel for virtual machines: `vmlinux`, its modules, and
`release`, its version. Of that and the agent an initial file system is made for each machine, with
no more modules than its devices need, and kept under the hash of what is in it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from tabane.errors import Unsupported
from tabane.model import Value

PREFIX = Path("/opt/tabane/guest")
AGENT = Path(__file__).parents[2] / "guest" / "_agent"
"""Compiled when Tabane is installed (hatch_build.py)."""
VIRTIO = ("virtio_ring", "virtio")
"""The modules that those of all virtual devices need."""
CONSOLE = os.makedev(5, 1)
DIRECTORIES = ("cgroup", "dev", "lib", "pod", "proc", "root", "sys")
MOUNT_POINT_MODE = stat.S_IFDIR | 0o755


class GuestKernel(Value, frozen=True):
    """`release` is its version, as `uname -r` says it."""

    vmlinux: Path
    modules: Path
    release: str


def find_kernel(prefix: Path | None = None) -> GuestKernel:
    """The one below `prefix` (default: `PREFIX`). Raises `Unsupported`, saying what is missing."""
    prefix = prefix or PREFIX
    kernel = prefix / "vmlinux"
    if not kernel.exists():
        raise Unsupported(f"there is no guest kernel at {kernel}: run scripts/guest-kernel")
    if not AGENT.exists():
        raise Unsupported(f"the guest agent was not compiled ({AGENT}): install gcc, then Tabane")
    return GuestKernel(kernel, prefix / "modules", (prefix / "release").read_text().strip())


def make_initramfs(kernel: GuestKernel, names: tuple[str, ...], directory: Path) -> Path:
    """An archive with the agent and these modules, in their order, unless it is there already."""
    entries = [("init", stat.S_IFREG | 0o755, AGENT.read_bytes(), 0)]
    entries += [(name, MOUNT_POINT_MODE, b"", 0) for name in DIRECTORIES]
    entries.append(("dev/console", stat.S_IFCHR | 0o600, b"", CONSOLE))
    entries.append(("modules", stat.S_IFREG | 0o644, "\n".join((*names, "")).encode(), 0))
    for name in names:
        path = kernel.modules / f"{name}.ko"
        if not path.exists():
            raise Unsupported(f"the guest kernel has no module {path}: run scripts/guest-kernel")
        entries.append((f"lib/{name}.ko", stat.S_IFREG | 0o644, path.read_bytes(), 0))
    archive = encode_cpio(entries)
    target = directory / f"initramfs-{hashlib.sha256(archive).hexdigest()[:16]}"
    if not target.exists():
        fresh = target.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(archive)
        fresh.chmod(0o444)
        fresh.replace(target)
    return target


def encode_cpio(entries: list[tuple[str, int, bytes, int]]) -> bytes:
    """An archive in the format `newc`, of names, modes, contents and device numbers; all belongs to
    root and has no time, so that the same contents are the same bytes."""
    out = bytearray()
    for number, (name, mode, content, device) in enumerate(
        (*entries, ("TRAILER!!!", 0, b"", 0)), 1
    ):
        fields = (
            *(number, mode, 0, 0, 1, 0, len(content), 0, 0),
            *(os.major(device), os.minor(device), len(name) + 1, 0),
        )
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        out += bytes(-len(out) % 4)
        out += content
        out += bytes(-len(out) % 4)
    return bytes(out)
