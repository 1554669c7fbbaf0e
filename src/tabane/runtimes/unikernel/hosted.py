"""What the drivers of unikernels have in common: an instance is one process, left behind by the
host program as an OCI engine leaves its container behind, in a cgroup that the driver makes. All
that is done to it later is done by signals and the cgroup.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from tabane.errors import EngineError, NotFound, Unsupported
from tabane.model import Class, ExitStatus, GuestProcess, Resources
from tabane.runtimes import process
from tabane.runtimes.api import (
    Capabilities,
    Command,
    Conversation,
    Execution,
    Handle,
    InstanceSpec,
    Spawner,
    Stats,
    Transfer,
)
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.oci import (
    cgroup_of,
    check_running,
    directory_of,
    is_running,
    parse_init_status,
)

HANDLE_VERSION = 1
START_TIMEOUT_S = 10.0
"""How long `destroy` waits for a start that was given up."""
NO_CHECKPOINTS = "unikernels cannot be checkpointed yet: only cold starts"
ERRORS, PID = "host.errors", "pid"
REFUSES = {
    "capabilities": "gives a unikernel no capabilities: leave out [security] capabilities",
    "workdir": "gives a unikernel no directories: leave out workdir",
}


class HostedDriver:
    """See the module's text. A driver adds `name`, `capabilities`, `probe`, `enforcements`,
    `prepare`, `start` and what its instances have inside."""

    name = ""
    isolation = Class.UNIKERNEL
    capabilities = Capabilities()
    _inside = "there is no program inside but its own, and no shell to start another"

    def __init__(self, spawner: Spawner, directory: Path) -> None:
        self._spawner = spawner
        self._directory = directory
        self._starting: set[str] = set()

    def _make_root(self) -> Path:
        """The empty directory on which hosts make their trees."""
        root = self._directory / "root"
        for path in (self._directory, root):
            path.mkdir(mode=0o711, parents=True, exist_ok=True)
        return root

    # Life

    def _make_handle(self, spec: InstanceSpec, **more: Any) -> Handle:
        """And the cgroup."""
        limits = spec.app.resources
        Cgroup(spec.cgroup).make(
            {"cpu": limits.cpu, "memory_bytes": limits.memory_bytes, "pids": limits.pids}
        )
        data: dict[str, Any] = {
            "pid": 0,
            "pid_start": 0,
            "cgroup": spec.cgroup,
            "directory": str(spec.directory),
            "stop_signal": int(signal.SIGTERM),
        }
        return Handle(self.name, HANDLE_VERSION, spec.id, data | more)

    async def _launch(self, spec: InstanceSpec, handle: Handle, argv: tuple[str, ...]) -> Handle:
        self._starting.add(handle.id)
        command = Command(handle.id, argv, log=spec.log, pid_file=spec.directory / PID)
        await self._spawner.spawn(command)
        finished = await self._spawner.finished(handle.id)
        self._starting.discard(handle.id)
        if finished.status != ExitStatus():
            words = _read(spec.directory / ERRORS) or finished.status.describe()
            code = -finished.status.signal or finished.status.code
            problem = f"{self.name} could not start {handle.id}: {words}"
            raise EngineError(problem, argv=argv, status=code, output=words)
        return self._adopt(handle)

    def _adopt(self, handle: Handle) -> Handle:
        pid = int((directory_of(handle) / PID).read_text())
        data = handle.data | {"pid": pid, "pid_start": process.start_ticks(pid)}
        return msgspec.structs.replace(handle, data=data)

    async def wait_listening(self, handle: Handle, port: int) -> None:
        raise Unsupported("its sockets are the node's kernel's: the link's socket table has them")

    async def wait(self, handle: Handle) -> ExitStatus:
        status = parse_init_status(await self._spawner.exited(handle.id))
        if status.signal == signal.SIGKILL and cgroup_of(handle).oom_kills():
            return ExitStatus(signal=status.signal, oom=True)
        return status

    async def stop(self, handle: Handle, timeout_s: float) -> None:
        cgroup_of(handle).thaw()
        number = handle.data["stop_signal"]
        assert isinstance(number, int)
        if not await self._spawner.signal(handle.id, number):
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._spawner.exited(handle.id)
        except TimeoutError:
            await self._spawner.signal(handle.id, signal.SIGKILL)
            await self._spawner.exited(handle.id)

    async def freeze(self, handle: Handle) -> None:
        check_running(handle)
        await cgroup_of(handle).freeze()

    async def thaw(self, handle: Handle) -> None:
        cgroup_of(handle).thaw()

    async def checkpoint(self, handle: Handle, directory: Path, *, leave_running: bool) -> None:
        raise Unsupported(NO_CHECKPOINTS)

    async def restore(self, spec: InstanceSpec, handle: Handle, directory: Path) -> Handle:
        raise Unsupported(NO_CHECKPOINTS)

    async def recover(self, spec: InstanceSpec, handle: Handle) -> Handle | None:
        if not handle.data["pid"]:
            try:
                finished = await self._spawner.finished(handle.id)
            except NotFound:
                return None
            if finished.status != ExitStatus():
                return None
            handle = self._adopt(handle)
        return handle if is_running(handle) else None

    async def destroy(self, handle: Handle) -> None:
        if handle.id in self._starting:
            await self._wait_for_start(handle.id)
        await _remove(cgroup_of(handle), directory_of(handle))
        await self._spawner.forget(handle.id)

    async def discard(self, spec: InstanceSpec) -> None:
        data: dict[str, Any] = {"cgroup": spec.cgroup, "directory": str(spec.directory)}
        await self.destroy(Handle(self.name, HANDLE_VERSION, spec.id, data))

    async def _wait_for_start(self, key: str) -> None:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._spawner.finished(key)
        except TimeoutError:
            await self._spawner.signal(key, signal.SIGKILL)
        except NotFound:
            pass
        self._starting.discard(key)

    # Inside

    async def exec(self, handle: Handle, execution: Execution) -> Conversation:
        raise Unsupported(f"no command can be run in a unikernel: {self._inside}")

    async def copy(self, handle: Handle, transfer: Transfer) -> Conversation:
        raise Unsupported("a unikernel has no files that could be copied")

    async def stats(self, handle: Handle) -> Stats:
        check_running(handle)
        return cgroup_of(handle).stats()

    async def limit(self, handle: Handle, resources: Resources) -> None:
        raise Unsupported("it cannot change its limits while it runs")

    async def processes(self, handle: Handle) -> list[int]:
        return cgroup_of(handle).pids()

    async def guest_processes(self, handle: Handle) -> Sequence[GuestProcess]:
        raise Unsupported("it is one process, which the node's own table has")


def check_root() -> None:
    """Raises `Unsupported`: namespaces of links are entered, and cgroups made."""
    if os.geteuid() != 0:
        raise Unsupported("it needs root here: run the node as root")


async def _remove(cgroup: Cgroup, directory: Path) -> None:
    await cgroup.remove()
    for name in (ERRORS, PID, f"{PID}.new"):
        (directory / name).unlink(missing_ok=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except FileNotFoundError:
        return ""
