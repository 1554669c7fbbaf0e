"""What drivers have in common whose instances' processes are the node's own, in one cgroup.

`OfCgroup` has the verbs that read and write its files; `SpawnedDriver` those of an instance
that an engine leaves behind for the spawner, having written its pid to a file.
"""

from __future__ import annotations

import asyncio
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from tabane.errors import Busy, EngineError, NotFound, Unsupported
from tabane.model import ExitStatus, GuestProcess, Resources
from tabane.runtimes import process, rootfs
from tabane.runtimes.api import Command, Handle, InstanceSpec, Spawner, Stats
from tabane.runtimes.cgroups import POLL_S, Cgroup
from tabane.runtimes.pods import layers_of

ENGINE_TIMEOUT_S = 10.0
"""How long `destroy` waits for an engine whose start was given up: it cannot be killed half-way,
its helpers would go on without it."""
PID = "pid"
"""File with the pid, in the instance's directory."""


class OfCgroup:
    """Verbs of drivers whose instances' processes are the node's own, in one cgroup."""

    async def freeze(self, handle: Handle) -> None:
        check_running(handle)
        await cgroup_of(handle).freeze()

    async def thaw(self, handle: Handle) -> None:
        cgroup_of(handle).thaw()

    async def stats(self, handle: Handle) -> Stats:
        check_running(handle)
        return cgroup_of(handle).stats()

    async def limit(self, handle: Handle, resources: Resources) -> None:
        check_running(handle)
        cgroup_of(handle).limit(limits_of(resources))

    async def processes(self, handle: Handle) -> list[int]:
        return cgroup_of(handle).pids()

    async def guest_processes(self, handle: Handle) -> Sequence[GuestProcess]:
        raise Unsupported("its processes are the node's own: the node's table has them")


class PodOfCgroup(OfCgroup, ABC):
    """And of a pod's containers: their cgroups are below the instance's (see `pods`)."""

    @abstractmethod
    def _set_up(self) -> None:
        """Have what is made once. Raises `Unsupported` with what this machine lacks."""

    async def open_pod(self, spec: InstanceSpec) -> None:
        """See `tabane.runtimes.pods`."""
        self._set_up()
        Cgroup(spec.cgroup).make(self._pod_limits(spec))
        disk_bytes, count = spec.app.resources.disk_bytes, 1 + len(spec.sidecars)
        rootfs.mount_layers(layers_of(spec.directory), disk_bytes, count)

    def _pod_limits(self, spec: InstanceSpec) -> dict[str, float]:
        """What the cgroup above a pod's containers has at their start."""
        return limits_of(spec.app.resources)

    async def close_pod(self, directory: Path, cgroup: str) -> None:
        await Cgroup(cgroup).remove()
        rootfs.remove_mount(layers_of(directory))


class SpawnedDriver(OfCgroup):
    """See the module's text."""

    name: str
    _no_checkpoints = "it cannot be checkpointed yet: only cold starts"

    def __init__(self, spawner: Spawner) -> None:
        self._spawner = spawner
        self._starting: set[str] = set()

    async def _launch(
        self, spec: InstanceSpec, handle: Handle, argv: tuple[str, ...], pid_file: Path | None
    ) -> Handle:
        """Start what leaves the instance behind. `pid_file`: of the process whose end is the
        instance's."""
        self._starting.add(handle.id)
        pid = await self._spawner.spawn(Command(handle.id, argv, log=spec.log, pid_file=pid_file))
        self._on_spawned(spec, pid)
        finished = await self._spawner.finished(handle.id)
        self._starting.discard(handle.id)
        if (status := finished.status) == ExitStatus():
            return self._adopt(handle)
        words = self._last_words(handle) or status.describe()
        problem = f"{self.name} could not start {handle.id}: {words}"
        raise EngineError(problem, argv=argv, status=-status.signal or status.code, output=words)

    def _on_spawned(self, spec: InstanceSpec, pid: int) -> None:
        """Its engine has begun, with that pid; its outputs will be the instance's."""

    def _last_words(self, handle: Handle) -> str:
        """Of an engine that failed; empty: it said nothing."""
        raise NotImplementedError

    def _adopt(self, handle: Handle) -> Handle:
        """The handle of what the engine left behind (which may have ended already)."""
        pid = int((directory_of(handle) / PID).read_text())
        data = handle.data | {"pid": pid, "pid_start": process.start_ticks(pid)}
        return msgspec.structs.replace(handle, data=data)

    async def wait_listening(self, handle: Handle, port: int) -> None:
        raise Unsupported("its sockets are the node's kernel's: the link's socket table has them")

    async def wait(self, handle: Handle) -> ExitStatus:
        """As `Driver.wait`. To learn of want of memory, call it before `destroy`."""
        status = parse_init_status(await self._exited(handle))
        if status.signal == signal.SIGKILL and self._oom_kills(handle):
            return ExitStatus(signal=status.signal, oom=True)
        return status

    async def _exited(self, handle: Handle) -> ExitStatus:
        """Wait for its first process's end."""
        return await self._spawner.exited(handle.id)

    async def _signal(self, handle: Handle, number: int) -> bool:
        """Whether its first process got it; False when that has ended."""
        return await self._spawner.signal(handle.id, number)

    def _oom_kills(self, handle: Handle) -> int:
        return cgroup_of(handle).oom_kills()

    async def stop(self, handle: Handle, timeout_s: float) -> None:
        cgroup_of(handle).thaw()
        stop_signal = handle.data["stop_signal"]
        assert isinstance(stop_signal, int)
        await self._wait_for_init(handle)
        if not await self._signal(handle, stop_signal):
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._exited(handle)
        except TimeoutError:
            await self._signal(handle, signal.SIGKILL)
            await self._exited(handle)

    async def _wait_for_init(self, handle: Handle) -> None:
        """Wait until its first process takes signals, where it may not do so from the start."""

    async def checkpoint(self, handle: Handle, directory: Path, *, leave_running: bool) -> None:
        raise Unsupported(self._no_checkpoints)

    async def restore(self, spec: InstanceSpec, handle: Handle, directory: Path) -> Handle:
        raise Unsupported(self._no_checkpoints)

    async def recover(self, spec: InstanceSpec, handle: Handle) -> Handle | None:
        if not handle.data["pid"]:
            try:
                finished = await self._spawner.finished(handle.id)
            except NotFound:
                return None
            if finished.status != ExitStatus():
                return None
            handle = self._adopt(handle)
        if not is_running(handle):
            return None
        await self._end_left_behind(handle)
        return handle

    async def _end_left_behind(self, handle: Handle) -> None:
        """End the commands inside whose agent is no more: nobody hears them."""

    async def destroy(self, handle: Handle) -> None:
        if handle.id in self._starting:
            await self._wait_for_engine(handle.id)
        if not handle.data["pid"]:
            await self._end_engine(handle)
        await cgroup_of(handle).remove()
        await asyncio.to_thread(self._remove, handle)
        await self._spawner.forget(handle.id)

    async def _end_engine(self, handle: Handle) -> None:
        """Kill what works on at its start although the engine that was spawned for that is gone."""
        left: list[int] = []
        try:
            async with asyncio.timeout(ENGINE_TIMEOUT_S):
                while left := await asyncio.to_thread(self._engine_processes, handle):
                    for pid in left:
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise Busy(f"{self.name} still starts {handle.id}: {left} do not end") from None

    def _engine_processes(self, handle: Handle) -> list[int]:
        """Those that the engine may have forked to start the instance."""
        return []

    def _remove(self, handle: Handle) -> None:
        """Remove what was made for it, but for its cgroup. Idempotent."""
        raise NotImplementedError

    async def _wait_for_engine(self, key: str) -> None:
        try:
            async with asyncio.timeout(ENGINE_TIMEOUT_S):
                await self._spawner.finished(key)
        except TimeoutError:
            await self._spawner.signal(key, signal.SIGKILL)
        except NotFound:
            pass
        self._starting.discard(key)


def parse_init_status(status: ExitStatus) -> ExitStatus:
    """The program's own end: init says 128 + N, as shells do, when signal N ended it."""
    number = status.code - 128
    return ExitStatus(signal=number) if number in signal.valid_signals() else status


def limits_of(resources: Resources) -> dict[str, float]:
    """Of the cgroup of what an app's program needs and the memory that its layer is in."""
    limits = resources.with_layer()
    return {"cpu": limits.cpu, "memory_bytes": limits.memory_bytes, "pids": limits.pids}


def directory_of(handle: Handle) -> Path:
    return Path(str(handle.data["directory"]))


def cgroup_of(handle: Handle) -> Cgroup:
    return Cgroup(str(handle.data["cgroup"]))


def is_running(handle: Handle) -> bool:
    pid, ticks = handle.data["pid"], handle.data["pid_start"]
    return isinstance(pid, int) and isinstance(ticks, int) and process.is_same(pid, ticks)


def check_running(handle: Handle) -> None:
    if not is_running(handle):
        raise NotFound(f"instance {handle.id} does not run")
