"""Class `container`: runc and crun, two engines behind one driver.

A start is: mount the root file system and write `config.json` (`prepare`, under 2 ms, no process),
then `ENGINE run -d` through the spawner (`start`). The engine ends when the program runs; what it
leaves behind is the container's init, which the spawner watches by the engine's pid file. From then
on no engine is needed except for `exec`: signals go to init, everything else through the cgroup's
files, and `destroy` removes the engine's state with the rest, which also works for a start that
broke off half-way.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from tabane.errors import EngineError, NotFound, Unsupported
from tabane.model import Class, ExitStatus, GuestProcess, Resources, Value
from tabane.runtimes import bundle, bundles, copying, inside, process, rootfs, terminal
from tabane.runtimes.api import (
    Capabilities,
    Command,
    Conversation,
    Enforcement,
    Execution,
    Handle,
    InstanceSpec,
    Probe,
    Spawner,
    Stats,
    Transfer,
)
from tabane.runtimes.bundles import Bundles
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.ending import end_session, wait_for_init
from tabane.runtimes.pods import layers_of

HANDLE_VERSION = 1
ENGINE_TIMEOUT_S = 10.0
"""How long `destroy` waits for an engine whose start was given up: it cannot be killed half-way,
its helpers would go on without it."""
_DECODER = json.JSONDecoder()
NO_CHECKPOINTS = "containers cannot be checkpointed yet: only cold starts"


class Engine(Value, frozen=True):
    """What differs between engines."""

    name: str
    takes_bpf: bool = False
    """It takes a compiled seccomp filter from an annotation (crun's `run.oci.seccomp_bpf_data`)."""


class OfCgroup(ABC):
    """Verbs of drivers whose instances' processes are the node's own, in one cgroup."""

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


class OciDriver(OfCgroup):
    """See the module's text. `directory`: its init layer, kept mounts and the engine's state."""

    isolation = Class.CONTAINER
    capabilities = Capabilities(
        freeze=True,
        exec=True,
        terminal=True,
        copy=True,
        stats=True,
        network=True,
        services=True,
        volumes=True,
        layer_in_memory=True,
        pods=True,
        limit=True,
        images=("linux", "host"),
        needs_root=True,
        works_emulated=True,
    )

    def __init__(self, engine: Engine, spawner: Spawner, directory: Path) -> None:
        self.name = engine.name
        self._engine = engine
        self._spawner = spawner
        self._state = directory / "state"
        self._bundles = Bundles(directory, takes_bpf=engine.takes_bpf)
        self._directory = directory
        self._path = ""
        self._probe: Probe | None = None
        self._starting: set[str] = set()

    # What it can do here

    async def probe(self) -> Probe:
        """Run a trivial container with every default on; the answer is kept."""
        if self._probe is None:
            from tabane.runtimes.trial import try_driver

            self._probe = await try_driver(self, self.name, self._directory)
        return self._probe

    def enforcements(self) -> tuple[Enforcement, ...]:
        return bundle.ENFORCEMENTS

    def _set_up(self) -> None:
        if not self._path:
            path = shutil.which(self._engine.name)
            if path is None:
                raise Unsupported(f"{self._engine.name} is not installed")
            self._bundles.set_up()
            self._state.mkdir(mode=0o700, exist_ok=True)
            self._path = path

    # Life

    async def prepare(self, spec: InstanceSpec) -> Handle:
        self._set_up()
        program = self._bundles.build(spec)
        await bundles.mount_volumes(spec)
        return self._make_handle(spec, program.stop_signal)

    def _make_handle(self, spec: InstanceSpec, stop_signal: int) -> Handle:
        """Of what is prepared."""
        data: dict[str, Any] = {
            "pid": 0,
            "pid_start": 0,
            "cgroup": spec.cgroup,
            "directory": str(spec.directory),
            "stop_signal": stop_signal,
        }
        return Handle(self.name, HANDLE_VERSION, spec.id, data)

    async def start(self, spec: InstanceSpec, handle: Handle) -> Handle:
        os.chown(spec.directory, spec.app.id_base, spec.app.id_base)
        spec.directory.chmod(0o700)
        argv = self._run(spec, handle)
        self._starting.add(handle.id)
        command = Command(handle.id, argv, log=spec.log, pid_file=self._watched(spec))
        await self._spawner.spawn(command)
        finished = await self._spawner.finished(handle.id)
        self._starting.discard(handle.id)
        if finished.status != ExitStatus():
            raise self._failure(handle, argv, finished.status)
        return self._adopt(handle)

    def _watched(self, spec: InstanceSpec) -> Path | None:
        """The file with the pid of the process whose end is the container's."""
        return spec.directory / "pid"

    def _run(self, spec: InstanceSpec, handle: Handle) -> tuple[str, ...]:
        """The engine's command line that starts the instance and leaves it behind."""
        return (
            *self._command(handle),
            *("run", "--detach", "--bundle", str(spec.directory)),
            *("--pid-file", str(spec.directory / "pid"), handle.id),
        )

    def _adopt(self, handle: Handle) -> Handle:
        """The handle of what the engine left behind (which may have ended already)."""
        pid = int((directory_of(handle) / "pid").read_text())
        data = handle.data | {"pid": pid, "pid_start": process.start_ticks(pid)}
        return msgspec.structs.replace(handle, data=data)

    def _command(self, handle: Handle) -> tuple[str, ...]:
        log = directory_of(handle) / "engine.log"
        path = self._path or shutil.which(self._engine.name) or self._engine.name
        return (path, "--root", str(self._state), "--log", str(log), "--log-format", "json")

    def _failure(self, handle: Handle, argv: tuple[str, ...], status: ExitStatus) -> EngineError:
        log = directory_of(handle) / "engine.log"
        entries = parse_log(log.read_text(errors="replace")) if log.exists() else []
        words = self._cause(entries) or status.describe()
        code = -status.signal or status.code
        problem = f"{self.name} could not start {handle.id}: {words}"
        return EngineError(problem, argv=argv, status=code, output=words)

    def _cause(self, entries: list[dict[str, Any]]) -> str:
        """What a start failed for, of an engine's log; empty when that does not say."""
        return str(entries[-1].get("msg", "")) if entries else ""

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
        pid, ticks = handle.data["pid"], handle.data["pid_start"]
        assert isinstance(pid, int) and isinstance(ticks, int)
        await wait_for_init(pid, ticks)

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
        if not is_running(handle):
            return None
        await self._end_left_behind(handle)
        return handle

    async def _end_left_behind(self, handle: Handle) -> None:
        """End the commands inside whose agent is no more: nobody hears them."""
        members, directory = cgroup_of(handle).pids, directory_of(handle)
        for name, pid in inside.left_behind(directory):
            if pid in members():
                await end_session(pid, process.start_ticks(pid), members)
            await self._spawner.forget(inside.key_of(handle.id, name))
        inside.clear(directory)

    async def destroy(self, handle: Handle) -> None:
        if handle.id in self._starting:
            await self._wait_for_engine(handle.id)
        await cgroup_of(handle).remove()
        await asyncio.to_thread(self._remove, handle)
        await self._spawner.forget(handle.id)

    async def _wait_for_engine(self, key: str) -> None:
        try:
            async with asyncio.timeout(ENGINE_TIMEOUT_S):
                await self._spawner.finished(key)
        except TimeoutError:
            await self._spawner.signal(key, signal.SIGKILL)
        except NotFound:
            pass
        self._starting.discard(key)

    async def discard(self, spec: InstanceSpec) -> None:
        await self.destroy(self._make_handle(spec, signal.SIGTERM))

    def _remove(self, handle: Handle) -> None:
        directory = directory_of(handle)
        bundles.tear_down(directory)
        shutil.rmtree(self._state_of(handle), ignore_errors=True)
        for name in ("pid", "engine.log"):
            (directory / name).unlink(missing_ok=True)
        inside.clear(directory)

    def _state_of(self, handle: Handle) -> Path:
        """Where the engine has what it remembers of the instance."""
        return self._state / handle.id

    def close(self) -> None:
        """Unmount what is kept between instances; they go on. Call it when the node ends."""
        self._bundles.close()

    # Inside

    async def exec(self, handle: Handle, execution: Execution) -> Conversation:
        place = self._place(handle)
        if execution.terminal is None:
            return await inside.converse(place, execution, self._spawner)
        begin = partial(terminal.Leader, members=cgroup_of(handle).pids)
        return await terminal.converse(place, execution, self._spawner, begin)

    def _place(self, handle: Handle) -> inside.Place:
        check_running(handle)
        pid = handle.data["pid"]
        assert isinstance(pid, int)
        return inside.Place(handle.id, pid, directory_of(handle), self._command(handle))

    async def copy(self, handle: Handle, transfer: Transfer) -> Conversation:
        return await copying.converse(self._place(handle), transfer)


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


def parse_log(text: str) -> list[dict[str, Any]]:
    """The entries of an engine's JSON log. Not every engine ends its lines, and one that was killed
    leaves half an entry."""
    entries, rest = [], text.strip()
    with suppress(ValueError):
        while rest:
            entry, end = _DECODER.raw_decode(rest)
            entries.append(entry)
            rest = rest[end:].lstrip()
    return entries
