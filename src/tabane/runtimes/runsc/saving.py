"""Checkpoints of a sandbox, by gVisor: its kernel writes down all that it has, and that of another
reads it.

What is saved is the sandbox's own kernel: its processes, memory, timers and sockets. What is
written to the layer is on the node, so it is packed (as a container's, see `criu.saved`) while
the programs stand still, and unpacked before the sandbox of a copy opens it. The programs are
paused within the sandbox for that, since the sandbox's kernel must run to save itself; a file in
the instance's directory says so, for who comes after an agent that was killed meanwhile.

The sandbox itself writes its image, into a file system in memory, so the image counts as memory of
its cgroup, which would be killed for it. So the limit is raised meanwhile, by as much as is in
use; then the image is copied, from its end on and cut off behind, so that it is never there twice,
and belongs to who copies it.

    checkpoint.img, ...   the engine's
    layer.tar             what was written to the instance's own layer
    restore.json          `Saved`
"""

from __future__ import annotations

import asyncio
import os
import signal
import stat
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from tabane.errors import EngineError, NotFound, Unsupported
from tabane.runtimes import rootfs
from tabane.runtimes.api import EPOCH, SERVICES, Handle, InstanceSpec
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.contents import Contents, sizes_of, write_contents
from tabane.runtimes.criu import saved
from tabane.runtimes.spawned import cgroup_of, directory_of
from tabane.runtimes.threads import to_thread
from tabane.runtimes.volumes import MOUNTED

TIMEOUT_S = 60.0
"""All of an instance's memory is written, which stands still meanwhile."""
POLL_S = 0.002
SPARE = 16 << 20
STEP = 4 << 20
PAUSED = "paused"
"""File in the instance's directory, while its programs stand still within the sandbox."""

Ask = Callable[..., Awaitable[str]]
"""Has the engine do something with an instance: `ask(handle, *words)`."""


class Saved(Contents, frozen=True, kw_only=True):
    """`platform`: by which the programs' system calls are caught."""

    platform: str


class Pause:
    """Programs of an instance that stand still within their sandbox, while its kernel runs."""

    def __init__(self, ask: Ask, handle: Handle) -> None:
        self._ask = ask
        self._handle = handle
        self._mark = directory_of(handle) / PAUSED

    @property
    def is_on(self) -> bool:
        return self._mark.exists()

    async def begin(self) -> None:
        """Idempotent."""
        if not self.is_on:
            self._mark.touch()
            await self._ask(self._handle, "pause", self._handle.id)

    async def end(self) -> None:
        """Idempotent, also when it had not begun yet."""
        if self.is_on:
            with suppress(EngineError, NotFound):  # it was not, or is not any more
                await self._ask(self._handle, "resume", self._handle.id)
            self._mark.unlink(missing_ok=True)


async def save(
    ask: Ask, pause: Pause, handle: Handle, layer: Path, directory: Path, platform: str
) -> None:
    """Into a directory that is root's. Its programs stand still afterwards. Raises `EngineError`,
    `Conflict`."""
    cgroup, owner = cgroup_of(handle), directory.stat().st_uid
    cgroup.thaw()
    await pause.begin()
    limits = {"memory_bytes": cgroup.limits()["memory_bytes"]}
    cgroup.limit({"memory_bytes": limits["memory_bytes"] + cgroup.stats().memory_bytes + SPARE})
    os.chown(directory, directory_of(handle).stat().st_uid, -1)
    try:
        words = ("checkpoint", "-leave-running", "-compression=none", "-image-path", str(directory))
        async with asyncio.timeout(TIMEOUT_S):
            await ask(handle, *words, handle.id, for_ever=True)
        os.chown(directory, owner, -1)
        await to_thread(take_over, directory)
        await to_thread(saved.pack, layer, directory)
    except BaseException as error:
        await to_thread(empty, directory)
        if isinstance(error, TimeoutError):
            problem = f"{handle.id} could not be checkpointed within {TIMEOUT_S:g} s"
            raise EngineError(problem) from None
        raise
    finally:
        os.chown(directory, owner, -1)
        with suppress(NotFound):
            cgroup.limit(limits)
    if not any(name.endswith(".img") and size for name, size in sizes_of(directory).items()):
        raise EngineError(f"{handle.id} could not be checkpointed: the engine wrote nothing")
    write_contents(Saved(platform=platform), directory)


async def end_all(cgroup: Cgroup) -> None:
    """Kill the sandbox with its file server; returns when they have ended."""
    while pids := cgroup.pids():
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(POLL_S)  # the kernel sends no event


def take_over(directory: Path) -> None:
    """Have the files belong to this process's cgroup instead of their writer's."""
    for path in [*directory.iterdir()]:
        copy, size = path.with_name(f"{path.name}.new"), path.stat().st_size
        with path.open("r+b") as source, copy.open("xb") as target:
            target.truncate(size)
            for start in range((size - 1) // STEP * STEP, -1, -STEP):
                data = os.pread(source.fileno(), STEP, start)
                if data.count(0) < len(data):
                    os.pwrite(target.fileno(), data, start)
                source.truncate(start)
        copy.replace(path)


def empty(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


def let_in(directory: Path, group: int) -> None:
    """Let the root of the app's ids, and nobody else, read what is restored."""
    for path in (directory, *directory.iterdir()):
        found = path.stat()
        if found.st_gid != group or not found.st_mode & stat.S_IRGRP:
            os.chown(path, 0, group)
            path.chmod(0o550 if stat.S_ISDIR(found.st_mode) else 0o440)


def fill(spec: InstanceSpec, directory: Path, epoch: str, layer: Path) -> None:
    """Put the saved files into the instance's layer, and what tells it from others."""
    saved.unpack(directory, layer)
    rootfs.write_run(spec, Path(SERVICES).name, EPOCH, f"{epoch}\n")


def check_possible(handle: Handle, containers: int) -> None:
    """Raises `Unsupported` for what an instance like this never can."""
    if containers > 1:
        raise Unsupported(
            "an instance of several containers in one sandbox cannot be checkpointed: use class "
            "container, or a virtual machine"
        )
    volumes = directory_of(handle) / MOUNTED
    if volumes.is_dir() and any(volumes.iterdir()):
        raise Unsupported(f"{handle.id} has volumes, whose files would not fit a copy's memory")
    if handle.data["services"]:
        raise Unsupported(
            "a sandbox with sockets of the node (services) cannot be checkpointed: gVisor saves "
            "none of another kernel's"
        )
