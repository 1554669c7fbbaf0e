"""Containers on a kernel that has cgroups of version 2 alone, as most machines by now: a guest that
QEMU emulates, with this machine's Python and engines in it."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

import tabane
from tabane.runtimes.machines.kernel import AGENT, CONSOLE, VIRTIO, encode_cpio, find_kernel
from tabane.runtimes.qemu.machine import PROGRAM, Accelerator, kernel_options

pytestmark = pytest.mark.real

BOOT_S = 90
MODULES = (*VIRTIO, "virtio_mmio", "virtio_blk", "overlay")
PROGRAMS = ("busybox", "crun", "nsenter", "runc", "sh", "tini-static", "unshare")
PYTHON = Path(sys.executable).resolve()
STDLIB = Path(sysconfig.get_path("stdlib"))
LEFT_OUT = shutil.ignore_patterns(
    *("test", "tests", "site-packages", "dist-packages", "config-*", "idlelib")
)
CHECKS = (
    *("check_life", "check_out_of_memory", "check_freeze", "check_exec", "check_stats"),
    "check_limit",
)
INIT = """#!/bin/busybox sh
b=/bin/busybox
for name in $($b cat /modules); do $b insmod /lib/$name.ko; done
$b mount -t devtmpfs dev /dev
$b mount -t ext4 /dev/vda /new
$b mount -t proc proc /new/proc
$b mount -t sysfs sys /new/sys
$b mount -t cgroup2 group /new/sys/fs/cgroup
$b mount -t devtmpfs dev /new/dev
$b ip link set lo up
exec $b switch_root /new /bin/busybox sh /run.sh $($b cat /words)
"""
RUN = f"""export PATH=/bin:/usr/bin:/usr/sbin HOME=/root
{PYTHON} /in_guest.py "$@"
busybox poweroff -f
"""


def copy_program(program: Path, tree: Path) -> None:
    """With its libraries, to the same paths."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    for path in (str(program), *re.findall(r"/[^\s:()]+", listed)):
        target = tree / path.lstrip("/")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def make_root(tree: Path) -> None:
    """What the guest has: Python, this package, engines, and what tests of containers need."""
    for name in ("dev", "etc", "proc", "root", "run", "sys", "tmp"):
        (tree / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (tree / "usr" / name).mkdir(parents=True)
        (tree / name).symlink_to(f"usr/{name}")
    shutil.copytree(STDLIB, tree / str(STDLIB).lstrip("/"), ignore=LEFT_OUT, symlinks=True)
    found = [Path(path) for name in PROGRAMS if (path := shutil.which(name))]
    assert {path.name for path in found} == set(PROGRAMS), f"of {PROGRAMS} there are {found}"
    for program in (PYTHON, *found, *(STDLIB / "lib-dynload").glob("*.so")):
        copy_program(program, tree)
    ask = (PYTHON, "-I", "-c", "import site; print(site.getsitepackages()[0])")
    answer = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    libraries = tree / answer.strip().lstrip("/")
    for package in (msgspec, tabane):
        source = Path(str(package.__file__)).parent
        shutil.copytree(source, libraries / source.name, ignore=LEFT_OUT)
        for native in source.glob("*.so"):
            copy_program(native, tree)
    (tree / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    (tree / "etc/group").write_text("root:x:0:\n")
    shutil.copy(Path(__file__).with_name("in_guest.py"), tree)
    (tree / "run.sh").write_text(RUN)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterable[Path]:
    directory = tmp_path_factory.mktemp("guest")
    make_root(directory / "tree")
    made = directory / "disk"
    with made.open("wb") as file:
        file.truncate(512 << 20)
    argv = ("mke2fs", "-q", "-F", "-t", "ext4", "-d", str(directory / "tree"), str(made))
    subprocess.run(argv, check=True, capture_output=True)
    shutil.rmtree(directory / "tree")
    yield made
    made.unlink()


def make_first(directory: Path, words: str) -> Path:
    """The initial file system, which has the guest run its script with these words."""
    kernel = find_kernel()
    files = {"init": INIT.encode(), "words": words.encode(), "modules": " ".join(MODULES).encode()}
    files |= {f"lib/{name}.ko": (kernel.modules / f"{name}.ko").read_bytes() for name in MODULES}
    files["bin/busybox"] = Path("/bin/busybox").read_bytes()
    entries = [(name, stat.S_IFDIR | 0o755, b"", 0) for name in ("bin", "dev", "lib", "new")]
    entries += [(name, stat.S_IFREG | 0o755, data, 0) for name, data in files.items()]
    entries.append(("dev/console", stat.S_IFCHR | 0o600, b"", CONSOLE))
    made = directory / "initramfs"
    made.write_bytes(encode_cpio(entries))
    return made


def run_machine(disk: Path, first: Path) -> str:
    """What it says on its console until its end."""
    ticks = int(subprocess.run([AGENT], capture_output=True, check=True).stdout)
    drive = f"id=root,file={disk},format=raw,if=none,snapshot=on"
    argv = (
        *(PROGRAM, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-M", "microvm,rtc=on,pit=on,pic=on", "-accel", "tcg", "-cpu", "qemu64,+tsc"),
        *("-m", "640", "-kernel", str(find_kernel().vmlinux), "-initrd", str(first)),
        *("-append", kernel_options(Accelerator("tcg", "", ticks), "")),
        *("-drive", drive, "-device", "virtio-blk-device,drive=root", "-serial", "stdio"),
    )
    env = os.environ | {"TMPDIR": str(first.parent)}
    said = first.with_name("said")
    with said.open("wb") as file, suppress(subprocess.TimeoutExpired):
        nothing, both = subprocess.DEVNULL, {"stdout": file, "stderr": file}
        subprocess.run(argv, stdin=nothing, **both, timeout=BOOT_S, check=False, env=env)
    return said.read_text(errors="replace")


@pytest.mark.parametrize("engine", ["crun", "runc"])
def test_containers(engine: str, disk: Path, tmp_path: Path) -> None:
    said = run_machine(disk, make_first(tmp_path, " ".join((engine, *CHECKS))))
    passed = re.findall(r"^passed (\w+)", said, re.MULTILINE)
    assert sorted(passed) == sorted(CHECKS), said
