"""Dumps as engines leave them, but small; and stores of checkpoints in directories of their own."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from tabane.clock import SYSTEM, Clock
from tabane.images.checkpoint import About, CheckpointStore, Stored
from tabane.images.checkpoint.manifest import WINDOW_BYTES
from tabane.images.checkpoint.vault import PARTS, size_on_disk
from tabane.model import AppName, Class

MARK = b"a secret of the program"


def about(app: str = "default/hello", revision: int = 1, **fields: Any) -> About:
    """Readable by whoever runs the test."""
    made = About(AppName(app), revision, "runc", Class.CONTAINER, id_base=os.getgid())
    return msgspec.structs.replace(made, **fields)


def pages(seed: str, windows: int = 1) -> bytes:
    """Memory that does not compress, the same for the same seed."""
    return random.Random(seed).randbytes(windows * WINDOW_BYTES)


def write_dump(directory: Path, seed: str, windows: int = 3) -> None:
    """Small files, a large one with a hole in it, and one in a directory."""
    for number in range(5):
        (directory / f"core-{number}.img").write_bytes(f"{seed} {number}".encode())
    (directory / "empty.img").touch()
    (directory / "layer").mkdir()
    (directory / "layer" / "delta.tar").write_bytes(MARK * 1000)
    with (directory / "pages-1.img").open("wb") as file:
        for window in range(windows):
            file.write(pages(f"{seed} {window}"))
        file.seek(2 * WINDOW_BYTES, os.SEEK_CUR)
        file.write(b"the end")


def read_tree(directory: Path) -> dict[str, bytes]:
    """All files, and directories as ending with a slash."""
    found: dict[str, bytes] = {}
    for path in directory.rglob("*"):
        name = str(path.relative_to(directory))
        found |= {f"{name}/": b""} if path.is_dir() else {name: path.read_bytes()}
    return found


def make_store(
    directory: Path,
    *,
    quota_bytes: int = 1 << 30,
    memory_bytes: int = 1 << 30,
    wants: Callable[[About], bool] = lambda about: True,
    clock: Clock = SYSTEM,
) -> CheckpointStore:
    """Its files are in `disk`, `memory` and `key` there. It is yet to be loaded."""
    return CheckpointStore(
        directory / "disk",
        directory / "memory",
        directory / "key",
        quota_bytes=quota_bytes,
        memory_bytes=memory_bytes,
        wants=wants,
        clock=clock,
    )


async def keep(
    store: CheckpointStore, seed: str, what: About | None = None, windows: int = 3
) -> Stored:
    """A checkpoint of a dump with that seed."""
    async with store.dump(os.getgid()) as dump:
        write_dump(dump.directory, seed, windows)
        return await dump.keep(what or about())


async def cool(store: CheckpointStore, digest: str) -> None:
    """Have it opened anew the next time."""
    if (directory := store.memory.take_out(digest)) is not None:
        await store.remove_files([directory])


def files_on_disk(directory: Path) -> dict[str, int]:
    """What a store's directory has, but for what is being written: sizes on disk, by name."""
    return {
        f"{part}/{path.name}": size_on_disk(path.stat().st_size)
        for part in PARTS
        if part != "incoming"
        for path in (directory / "disk" / part).iterdir()
    }
