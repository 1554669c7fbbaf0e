"""The disks of a machine, made without mounting anything.

The image is an ext4 file system beside its tree, made once when it is first wanted, and read by all
machines of all apps that run it: the page cache has it once. What an instance writes goes to a
second, sparse file of the size of its app's disk quota, a copy of an empty file system that is made
once for each size. Both are made by mke2fs, which Debian always has. Why it is no other format, and
no shared directory, is in docs/decisions/machine-disks.md.
"""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

from tabane.errors import EngineError, Unsupported

BLOCK_BYTES = 4096
INODE_BYTES = 256
SPARE_INODES = 64
SPARE_BYTES = 4 << 20
LEAST_LAYER_BYTES = 1 << 20
LAYER_RATIO = 8192
"""One inode for so many bytes of a layer."""
TIMEOUT_S = 600.0
FEATURES = "^has_journal,^resize_inode,^huge_file"
"""A layer ends with its instance, an image is never written: neither has to survive a crash."""


def disk_of(tree: Path) -> Path:
    """Where the disk of the image at `tree` is."""
    return tree.with_name(f"{tree.name}.ext4")


async def make_image_disk(tree: Path) -> None:
    """Make the disk of the image at `tree`, unless it is there and whole. Raises `EngineError`."""
    target = disk_of(tree)
    sized = tree.with_name(f"{tree.name}.ext4-size")
    if not is_whole(target, sized):
        fresh = target.with_suffix(f".{os.getpid()}")
        try:
            blocks, inodes = await asyncio.to_thread(measure, tree)
            await make_file_system(fresh, blocks * BLOCK_BYTES, inodes, tree)
            await _run("debugfs", "-w", "-R", "rmdir lost+found", str(fresh))
            sized.write_text(str(fresh.stat().st_size))
            fresh.chmod(0o444)
            fresh.replace(target)
        finally:
            fresh.unlink(missing_ok=True)


def is_whole(disk: Path, sized: Path) -> bool:
    """Whether a disk is there, as large as it was made."""
    try:
        return disk.stat().st_size == int(sized.read_text())
    except (FileNotFoundError, ValueError):
        return False


def measure(tree: Path) -> tuple[int, int]:
    """Blocks and inodes that a file system with this tree needs at the most."""
    blocks, inodes = 0, SPARE_INODES
    for directory, names, files in os.walk(tree):
        inodes += len(names) + len(files)
        blocks += 2 + (len(names) + len(files)) // 8
        for name in files:
            found = os.lstat(f"{directory}/{name}")
            if stat.S_ISREG(found.st_mode):
                pieces = -(-found.st_size // BLOCK_BYTES)
                blocks += pieces + 1 + pieces // 512
    blocks += inodes * INODE_BYTES // BLOCK_BYTES
    return blocks + blocks // 64 + SPARE_BYTES // BLOCK_BYTES, inodes


async def layer_disk(size_bytes: int, templates: Path) -> Path:
    """An empty file system of that size, to be copied with `copy_sparse`."""
    size_bytes = max(size_bytes, LEAST_LAYER_BYTES) // BLOCK_BYTES * BLOCK_BYTES
    target = templates / f"layer-{size_bytes}"
    if not target.exists():
        fresh = target.with_suffix(f".{os.getpid()}")
        inodes = size_bytes // LAYER_RATIO + SPARE_INODES
        try:
            room = inodes * INODE_BYTES + size_bytes // 128 + SPARE_BYTES // 16
            await make_file_system(fresh, size_bytes + room, inodes, None)
            fresh.replace(target)
        finally:
            fresh.unlink(missing_ok=True)
    return target


async def make_file_system(target: Path, size_bytes: int, inodes: int, tree: Path | None) -> None:
    """An ext4 file system in a sparse file, with `tree` in it. Raises `EngineError`."""
    with target.open("wb") as file:
        file.truncate(size_bytes // BLOCK_BYTES * BLOCK_BYTES)
    filled = ("-d", str(tree)) if tree is not None else ()
    lazy = "lazy_itable_init=1,nodiscard,root_owner=0:0"
    options = ["-t", "ext4", "-O", FEATURES, "-m", "0", "-b", str(BLOCK_BYTES), "-N", str(inodes)]
    options += ["-I", str(INODE_BYTES), "-E", lazy]
    await _run("mke2fs", "-q", "-F", *options, *filled, str(target))


async def _run(*argv: str) -> None:
    environment = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin", "LC_ALL": "C"}
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
        )
    except FileNotFoundError:
        raise Unsupported(f"{argv[0]} is not installed: install e2fsprogs") from None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            _, words = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        said = words.decode(errors="replace").strip()
        problem = f"{argv[0]} made no disk of it: {said}"
        raise EngineError(problem, argv=argv, status=process.returncode, output=said)


def copy_sparse(source: Path, target: Path) -> None:
    """A copy with the same holes. Takes microseconds for an empty file system."""
    with source.open("rb") as given, target.open("xb") as made:
        size = given.seek(0, os.SEEK_END)
        made.truncate(size)
        at = 0
        while at < size:
            try:
                at = os.lseek(given.fileno(), at, os.SEEK_DATA)
            except OSError:  # only a hole is left
                return
            end = os.lseek(given.fileno(), at, os.SEEK_HOLE)
            os.lseek(given.fileno(), at, os.SEEK_SET)
            made.seek(at)
            while at < end:
                at += made.write(given.raw.read(min(end - at, 1 << 20)))
