"""Instances of several containers (pods): each driver's own verbs, once for each of them.

A driver that can have several of its containers share a link, and a cgroup above theirs
(`PodEngine`), is given one `InstanceSpec` for each:

    ID/                  the main container's directory, as if it were alone
      containers/NAME/   a sidecar's
      layers/            one file system for what all of them write
    CGROUP               has the limits, is frozen and measured
      main, NAME         a container's

Sidecars start first, in the order written, and stop last, in reverse. The handle is the main
container's, with the others' in it; so whoever has it, also after a restart, finds all of them. An
instance without sidecars is the driver's alone.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol, cast

import msgspec
from msgspec.structs import replace

from tabane.errors import EngineError, NotFound, TabaneError
from tabane.model import Class, ExitStatus, GuestProcess, InstanceId, Resources
from tabane.runtimes.api import (
    Conversation,
    Driver,
    Enforcement,
    Execution,
    Handle,
    InstanceSpec,
    Pod,
    Probe,
    Stats,
    Transfer,
)
from tabane.spec_fields import MAIN
from tabane.supervise import Supervisor

TOLD_S = 0.3
"""How long the end of a container that seems to have ended may take to be told."""


class PodEngine(Driver, Protocol):
    """A driver with `Capabilities.pods`. Its verbs take the spec and the handle of one container
    (`InstanceSpec.pod`); `freeze`, `thaw`, `stats`, `limit` and `processes` also the main one's
    with the pod's cgroup in it, and then mean the pod."""

    async def open_pod(self, spec: InstanceSpec) -> None:
        """Make what the containers of `spec` share: its cgroup, with the limits, and a file system
        for their layers. What is half made when this fails, `close_pod` removes."""

    async def close_pod(self, directory: Path, cgroup: str) -> None:
        """Kill all that still runs and remove that. Idempotent."""


class Pods:
    """See the module's text; a `Driver` like the one it is made of."""

    def __init__(self, driver: PodEngine) -> None:
        self.name: str = driver.name
        self.isolation: Class = driver.isolation
        self.capabilities = driver.capabilities
        self.engine = driver
        self._ends: dict[InstanceId, ExitStatus] = {}
        """Of pods, how the first of their containers to end has."""

    async def probe(self) -> Probe:
        probe = await self.engine.probe()
        self.capabilities = self.engine.capabilities
        return probe

    def enforcements(self) -> tuple[Enforcement, ...]:
        return self.engine.enforcements()

    # Life

    async def prepare(self, spec: InstanceSpec) -> Handle:
        if not spec.sidecars:
            return await self.engine.prepare(spec)
        try:
            await self.engine.open_pod(spec)
            *sidecars, main = [await self._prepare(part) for part in parts_of(spec)]
        except BaseException:
            await self.discard(spec)
            raise
        return _join(spec, main, sidecars)

    async def _prepare(self, spec: InstanceSpec) -> Handle:
        spec.directory.mkdir(parents=True, exist_ok=True)
        try:
            return await self.engine.prepare(spec)
        except TabaneError as error:
            _name_in(error, spec)
            raise

    async def start(self, spec: InstanceSpec, handle: Handle) -> Handle:
        if not spec.sidecars:
            return await self.engine.start(spec, handle)
        started: dict[str, Handle] = {}
        for part, prepared in zip(parts_of(spec), split(handle).values(), strict=True):
            name = _name(part)
            try:
                started[name] = await self.engine.start(part, prepared)
            except EngineError as error:
                await self._check_running(started, error)
                _name_in(error, part)
                raise
        *sidecars, main = started.values()
        return _join(spec, main, sidecars)

    async def _check_running(self, started: dict[str, Handle], error: EngineError) -> None:
        """If a container could not be started as one before it has ended, raise that."""
        if not started:
            return
        try:
            async with asyncio.timeout(TOLD_S):
                end = await self._first_end(started)
        except (TimeoutError, TabaneError):
            return
        problem = f"container {end.container} {end.describe()} before all others were started"
        argv, status = error.argv, error.status
        raise EngineError(problem, argv=argv, status=status, output=error.output) from error

    async def wait_listening(self, handle: Handle, port: int) -> None:
        await self.engine.wait_listening(handle, port)

    async def wait(self, handle: Handle) -> ExitStatus:
        parts = split(handle)
        if len(parts) == 1:
            return await self.engine.wait(handle)
        if handle.id not in self._ends:
            end = await self._first_end(parts)
            self._ends.setdefault(handle.id, end)
        return self._ends[handle.id]

    async def _first_end(self, parts: dict[str, Handle]) -> ExitStatus:
        """Of those that have ended at the same time, the last that was started. One of which that
        cannot be told is left out, unless that holds for all."""
        async with Supervisor("pod", on_failure=lambda *_: None) as tasks:
            waits = {
                tasks.start(name, self.engine.wait(part)): name
                for name, part in reversed(parts.items())
            }
            while True:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in waits if task.done()]:
                    name = waits.pop(task)
                    if task.exception() is None or not waits:
                        status: ExitStatus = task.result()
                        return replace(status, container="" if name == MAIN else name)

    async def stop(self, handle: Handle, timeout_s: float) -> None:
        """The main one first, then the others in reverse, all of them within the time."""
        parts = split(handle)
        if len(parts) == 1:
            await self.engine.stop(handle, timeout_s)
            return
        await self.engine.thaw(_whole(handle))
        clock = asyncio.get_running_loop().time
        ends = clock() + timeout_s
        for part in reversed(parts.values()):
            await self.engine.stop(part, max(0.0, ends - clock()))
            if handle.data["pid"] and handle.id not in self._ends:
                await self._note_end(handle)

    async def _note_end(self, handle: Handle) -> None:
        """Learn how the first of a pod has ended, while that can be told."""
        with suppress(TimeoutError, TabaneError):
            async with asyncio.timeout(TOLD_S):
                await self.wait(handle)

    async def freeze(self, handle: Handle) -> None:
        await self.engine.freeze(self._running(handle))

    async def thaw(self, handle: Handle) -> None:
        await self.engine.thaw(_whole(handle))

    async def checkpoint(self, handle: Handle, directory: Path, *, leave_running: bool) -> None:
        self._running(handle)
        await self.engine.checkpoint(handle, directory, leave_running=leave_running)

    async def restore(self, spec: InstanceSpec, handle: Handle, directory: Path) -> Handle:
        if not spec.sidecars:
            return await self.engine.restore(spec, handle, directory)
        restored = []
        for part, prepared in zip(parts_of(spec), split(handle).values(), strict=True):
            restored.append(await self.engine.restore(part, prepared, directory / _name(part)))
        *sidecars, main = restored
        return _join(spec, main, sidecars)

    async def recover(self, spec: InstanceSpec, handle: Handle) -> Handle | None:
        if not spec.sidecars:
            return await self.engine.recover(spec, handle)
        found = []
        for part, known in zip(parts_of(spec), split(handle).values(), strict=True):
            if (running := await self.engine.recover(part, known)) is None:
                return None
            found.append(running)
        *sidecars, main = found
        return _join(spec, main, sidecars)

    async def destroy(self, handle: Handle) -> None:
        parts = split(handle)
        if len(parts) == 1:
            await self.engine.destroy(handle)
            return
        self._ends.pop(handle.id, None)
        await self.engine.thaw(_whole(handle))
        remove = [partial(self.engine.destroy, part) for part in reversed(parts.values())]
        await self._remove(remove, Path(str(handle.data["pod"])), str(handle.data["pod_cgroup"]))

    async def discard(self, spec: InstanceSpec) -> None:
        if not spec.sidecars:
            await self.engine.discard(spec)
            return
        remove = [partial(self.engine.discard, part) for part in reversed(parts_of(spec))]
        await self._remove(remove, spec.directory, spec.cgroup)

    async def _remove(
        self, removals: Iterable[Callable[[], Awaitable[None]]], directory: Path, cgroup: str
    ) -> None:
        """Each container, then what they share: also when one cannot be removed, of which the first
        is told."""
        problem: Exception | None = None
        last: Callable[[], Awaitable[None]] = partial(self.engine.close_pod, directory, cgroup)
        for remove in (*removals, last):
            try:
                await remove()
            except (TabaneError, OSError) as error:
                problem = problem or error
        if problem is not None:
            raise problem
        await asyncio.to_thread(shutil.rmtree, sidecars_of(directory), ignore_errors=True)

    # Inside

    def _running(self, handle: Handle) -> Handle:
        """For verbs on all there is of it. Raises `NotFound` when one of its containers has ended,
        although others may still run."""
        if (end := self._ends.get(handle.id)) is not None:
            what = f"container {end.container}" if end.container else "its program"
            raise NotFound(f"instance {handle.id} does not run: {what} {end.describe()}")
        return _whole(handle)

    async def exec(self, handle: Handle, execution: Execution) -> Conversation:
        self._running(handle)
        part = _part(handle, execution.container)
        return await self.engine.exec(part, replace(execution, container=""))

    async def copy(self, handle: Handle, transfer: Transfer) -> Conversation:
        self._running(handle)
        part = _part(handle, transfer.container)
        return await self.engine.copy(part, replace(transfer, container=""))

    async def stats(self, handle: Handle) -> Stats:
        return await self.engine.stats(self._running(handle))

    async def limit(self, handle: Handle, resources: Resources) -> None:
        await self.engine.limit(self._running(handle), resources)

    async def processes(self, handle: Handle) -> list[int]:
        return await self.engine.processes(_whole(handle))

    async def guest_processes(self, handle: Handle) -> Sequence[GuestProcess]:
        parts = split(handle)
        if len(parts) == 1:
            return await self.engine.guest_processes(handle)
        return [
            replace(process, container=process.container or name)
            for name, part in parts.items()
            for process in await self.engine.guest_processes(part)
        ]


def with_pods(driver: Driver) -> Driver:
    """A driver whose instances may have sidecars, where that can be. One that runs all containers
    of an instance at once, as machines do, has its own way for that."""
    return Pods(cast(PodEngine, driver)) if hasattr(driver, "open_pod") else driver


def layers_of(directory: Path) -> Path:
    """Where the containers of the instance with this directory have their layers."""
    return directory / "layers"


def sidecars_of(directory: Path) -> Path:
    """Where the sidecars of the instance with this directory have theirs."""
    return directory / "containers"


def log_of(log: Path, container: str) -> Path:
    """Of a container, where the main one's is `log`."""
    return log if container in ("", MAIN) else log.with_name(f"{container}.log")


def parts_of(spec: InstanceSpec) -> list[InstanceSpec]:
    """The containers in the order of their start, each as an instance; the main one is the last."""
    names = [*(sidecar.name for sidecar in spec.sidecars), MAIN]
    pods = [
        Pod(
            spec.id,
            _id_of(spec.id, 1),
            spec.directory,
            spec.cgroup,
            layers_of(spec.directory) / name,
            len(names),
        )
        for name in names
    ]
    common = replace(spec, hostname=spec.hostname or spec.id, sidecars=())
    sidecars = [
        replace(
            common,
            id=_id_of(spec.id, number),
            app=sidecar.app,
            image=sidecar.image,
            directory=sidecars_of(spec.directory) / sidecar.name,
            log=log_of(spec.log, sidecar.name),
            cgroup=f"{spec.cgroup}/{sidecar.name}",
            volumes=tuple(
                storage
                for storage in spec.volumes
                if storage.name in (volume.name for volume in sidecar.app.volumes)
            ),
            pod=pod,
        )
        for number, (sidecar, pod) in enumerate(zip(spec.sidecars, pods, strict=False), 1)
    ]
    return [*sidecars, replace(common, cgroup=f"{spec.cgroup}/{MAIN}", pod=pods[-1])]


def _id_of(instance: InstanceId, number: int) -> InstanceId:
    """Of a sidecar, counted from 1. None is the beginning of another, which runsc would take for a
    short form."""
    return InstanceId(f"s{number}-{instance}")


def ids_of(handle: Handle) -> list[InstanceId]:
    """Of all containers of an instance, the main one first."""
    return [handle.id, *(_id_of(handle.id, number) for number in range(1, len(split(handle))))]


def split(handle: Handle) -> dict[str, Handle]:
    """The containers' handles by name, in the order of their start."""
    names, encoded = handle.data.get("sidecars", []), handle.data.get("sidecar_handles", [])
    assert isinstance(names, list) and isinstance(encoded, list)
    handles = [msgspec.json.decode(text, type=Handle) for text in encoded]
    return {**dict(zip(names, handles, strict=True)), MAIN: handle}


def _join(spec: InstanceSpec, main: Handle, sidecars: Sequence[Handle]) -> Handle:
    own: dict[str, str | int | float | bool | list[str]] = {
        "pod": str(spec.directory),
        "pod_cgroup": spec.cgroup,
        "sidecars": [sidecar.name for sidecar in spec.sidecars],
        "sidecar_handles": [msgspec.json.encode(handle).decode() for handle in sidecars],
    }
    return replace(main, data=main.data | own)


def _whole(handle: Handle) -> Handle:
    """For verbs on all there is of it."""
    if (cgroup := handle.data.get("pod_cgroup")) is None:
        return handle
    return replace(handle, data=handle.data | {"cgroup": cgroup})


def _part(handle: Handle, container: str) -> Handle:
    parts = split(handle)
    if (part := parts.get(container or MAIN)) is None:
        raise NotFound(f"instance {handle.id} has no container {container} ({', '.join(parts)})")
    return part


def _name(part: InstanceSpec) -> str:
    assert part.pod is not None
    return MAIN if part.id == part.pod.id else part.directory.name


def _name_in(error: TabaneError, part: InstanceSpec) -> None:
    """Have an error say which container it is about."""
    if (name := _name(part)) != MAIN:
        error.message = f"container {name}: {error.message}"
        error.args = (error.message,)
