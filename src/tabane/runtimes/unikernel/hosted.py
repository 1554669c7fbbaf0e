"""What the drivers of unikernels have in common: an instance is one process, left behind by the
host program as an OCI engine leaves its container behind, in a cgroup that the driver makes. All
that is done to it later is done by signals and the cgroup.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabane.errors import Unsupported
from tabane.model import Class, GuestProcess, Resources
from tabane.runtimes.api import (
    Capabilities,
    Conversation,
    Execution,
    Handle,
    InstanceSpec,
    Spawner,
    Transfer,
)
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.spawned import PID, SpawnedDriver, directory_of

HANDLE_VERSION = 1
ERRORS = "host.errors"
REFUSES = {
    "capabilities": "gives a unikernel no capabilities: leave out [security] capabilities",
    "workdir": "gives a unikernel no directories: leave out workdir",
}


class HostedDriver(SpawnedDriver):
    """See the module's text. A driver adds `name`, `capabilities`, `probe`, `enforcements`,
    `prepare`, `start` and what its instances have inside."""

    name = ""
    isolation = Class.UNIKERNEL
    capabilities = Capabilities()
    _no_checkpoints = "unikernels cannot be checkpointed yet: only cold starts"
    _inside = "there is no program inside but its own, and no shell to start another"

    def __init__(self, spawner: Spawner, directory: Path) -> None:
        super().__init__(spawner)
        self._directory = directory

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

    def _last_words(self, handle: Handle) -> str:
        try:
            return (directory_of(handle) / ERRORS).read_text(errors="replace").strip()
        except FileNotFoundError:
            return ""

    def _remove(self, handle: Handle) -> None:
        for name in (ERRORS, PID, f"{PID}.new"):
            (directory_of(handle) / name).unlink(missing_ok=True)

    async def discard(self, spec: InstanceSpec) -> None:
        data: dict[str, Any] = {"pid": 0, "cgroup": spec.cgroup, "directory": str(spec.directory)}
        await self.destroy(Handle(self.name, HANDLE_VERSION, spec.id, data))

    # Inside

    async def exec(self, handle: Handle, execution: Execution) -> Conversation:
        raise Unsupported(f"no command can be run in a unikernel: {self._inside}")

    async def copy(self, handle: Handle, transfer: Transfer) -> Conversation:
        raise Unsupported("a unikernel has no files that could be copied")

    async def limit(self, handle: Handle, resources: Resources) -> None:
        raise Unsupported("it cannot change its limits while it runs")

    async def guest_processes(self, handle: Handle) -> Sequence[GuestProcess]:
        raise Unsupported("it is one process, which the node's own table has")


def check_root() -> None:
    """Raises `Unsupported`: namespaces of links are entered, and cgroups made."""
    if os.geteuid() != 0:
        raise Unsupported("it needs root here: run the node as root")
