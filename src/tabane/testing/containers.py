"""What tests of container drivers need: a small image, and instances without a node."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from tabane.model import App, Resources, new_instance_id
from tabane.runtimes import mounts
from tabane.runtimes.api import Image, InstanceSpec
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.trial import parked
from tabane.testing.leaks import name_cgroup

BUSYBOX = Path("/bin/busybox")
"""Debian's busybox-static."""
APPLETS = ("cat", "chmod", "dd", "df", "echo", "false", "hostname", "httpd", "id", "kill", "ls")
MORE_APPLETS = ("mkdir", "mount", "ps", "pwd", "sh", "sleep", "stat", "stty", "true")
EVEN_MORE_APPLETS = ("unshare", "wc")
UNIFIED = Path("/sys/fs/cgroup/unified")
ID_BASE = 300_000


@contextmanager
def open_directory() -> Iterator[Path]:
    """A directory that every user may enter, as a node's must be; pytest's own are private."""
    directory = Path(tempfile.mkdtemp(prefix="tabane-test-"))
    directory.chmod(0o711)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@contextmanager
def without_unified() -> Iterator[None]:
    """Without the empty cgroup v2 of a hybrid machine, which crun refuses.

    Call it in a mount namespace of the test's own.
    """
    hybrid = UNIFIED.is_mount() and mounts.unmount(UNIFIED)
    try:
        yield
    finally:
        if hybrid:
            mounts.mount("cgroup2", UNIFIED, "")


def make_tree(directory: Path) -> Image:
    """An image of busybox and two users."""
    tree = directory / "tree"
    for name in ("bin", "etc", "proc", "dev", "sys", "tmp", "srv"):
        (tree / name).mkdir(parents=True)
    tree.chmod(0o755)
    shutil.copy(BUSYBOX.resolve(), tree / "bin/busybox")
    for applet in APPLETS + MORE_APPLETS + EVEN_MORE_APPLETS:
        (tree / "bin" / applet).symlink_to("busybox")
    (tree / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nweb:x:33:34::/srv:/bin/sh\n")
    (tree / "etc/group").write_text("root:x:0:\nweb:x:34:\nlogs:x:44:web\n")
    (tree / "tmp").chmod(0o1777)
    return Image("sha256:" + "0" * 64, tree, cmd=("sleep", "1000"))


SMALL = Resources(cpu=1.0, memory_bytes=48 << 20, pids=32, disk_bytes=1 << 20)


@asynccontextmanager
async def make_instance(directory: Path, image: Image, app: App) -> AsyncIterator[InstanceSpec]:
    """An instance of `app`, to be prepared; what remains of its directory goes with the block."""
    identity = new_instance_id()
    place = directory / identity
    place.mkdir()
    async with parked(app.id_base) as link:
        logs = directory / "logs" / identity
        logs.mkdir(parents=True)
        log = logs / "log"
        yield InstanceSpec(identity, app, image, link, place, log, name_cgroup(identity))
    shutil.rmtree(place)


def find_left(spec: InstanceSpec) -> list[str]:
    """What is there of an instance: processes, mounts, cgroups, files other than its log."""
    cgroup = Cgroup(spec.cgroup)
    found = [str(path) for path in cgroup.directories() if path.exists()]
    found += [str(path) for path in mounts.targets_below(spec.directory)]
    found += [str(path) for path in spec.directory.iterdir()]
    return found
