"""Class `sandbox`: gVisor's runsc, whose kernel in user space answers every system call.

Bundles, logs, exit statuses and the end are those of a container (`tabane.runtimes.oci`): what
runsc leaves behind is the sandbox, whose process ends as the program does, and passes signals on to
it. It differs in where things are:

- The whole engine runs in the app's ids, without any right over the machine (see `engine`), so the
  cgroup is made for it, and its state lies in the instance's directory.
- The sandbox takes the link's address over into a network stack of its own, and with it what
  listens there; `half_open` tells. The link's namespace has no address any more, but no link is
  ever used again.
- Files are written through to the layer on the node, and nothing of them is kept inside (`shared`),
  so that copies by the node, which go by the file server's view, and the program's never differ.
- The engine, which is no part of the app, has all processors while it starts; the limit follows.
- Freezing is the cgroup's, not the engine's: thawing it takes one write, and no process.
"""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from tabane.errors import Conflict, EngineError, NotFound, Unsupported
from tabane.model import Class, ExitStatus, GuestProcess, Resources
from tabane.runtimes import copying, half_open, inside, terminal
from tabane.runtimes.api import (
    Capabilities,
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
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.contents import read_contents
from tabane.runtimes.lookup import resolve
from tabane.runtimes.oci import Engine as OciEngine
from tabane.runtimes.oci import OciDriver
from tabane.runtimes.pods import ids_of
from tabane.runtimes.process import is_same, start_ticks
from tabane.runtimes.runsc import engine, formats, saving
from tabane.runtimes.runsc.inside import Inside, Sandbox
from tabane.runtimes.spawned import (
    cgroup_of,
    check_running,
    directory_of,
    is_running,
    parse_init_status,
)
from tabane.runtimes.terminal import LONGEST_SOCKET
from tabane.runtimes.threads import to_its_end, to_thread
from tabane.runtimes.wishes import check_wishes
from tabane.supervise import Supervisor

ENDING_S = 0.3
"""How long a sandbox may take to end after its containers have."""
STATE = "runsc"
"""Directory of the engine's state, in the instance's."""
RESTORE_TIMEOUT_S = 30.0
NO_LIMIT = 2
"""For each processor that there is: with just one the kernel may hold some of it back."""


class RunscDriver(OciDriver):
    """See the module's text."""

    isolation = Class.SANDBOX
    capabilities = Capabilities(
        freeze=True,
        checkpoint=True,
        restore=True,
        saves_processor_state=True,
        exec=True,
        terminal=True,
        copy=True,
        stats=True,
        guest_processes=True,
        network=True,
        services=True,
        volumes=True,
        layer_in_memory=True,
        pods=True,
        own_stack=True,
        limit=True,
        images=("linux", "host"),
        refuses=formats.REFUSES,
        needs_root=True,
        works_emulated=True,
    )

    def __init__(self, spawner: Spawner, directory: Path) -> None:
        super().__init__(OciEngine("runsc"), spawner, directory)
        self._platform = formats.PLATFORMS[0]

    # What it can do here

    async def probe(self) -> Probe:
        """Run a trivial sandbox on each platform until one works; the answer is kept."""
        if self._probe is None:
            try:
                found = await asyncio.to_thread(engine.find_engine)
            except Unsupported as error:
                self._probe = Probe(False, error.message)
            else:
                self._path = ""
                self._probe = await self._try_platforms(found.path)
        return self._probe

    async def _try_platforms(self, path: str) -> Probe:
        from tabane.runtimes.trial import try_driver

        failures = []
        for self._platform in formats.PLATFORMS:
            probe = await try_driver(self, path, self._directory)
            if probe.works:
                version = str(formats.parse_release(engine.find_engine().version))
                said = f"{probe.reason}, platform {self._platform}"
                return Probe(True, said, versions={"runsc": version})
            failures.append(f"{self._platform}: {probe.reason}")
        return Probe(False, "; ".join(failures))

    def enforcements(self) -> tuple[Enforcement, ...]:
        return formats.ENFORCEMENTS

    def _set_up(self) -> None:
        if not self._path:
            path = engine.find_engine().path
            self._bundles.set_up()
            self._path = path

    # Life

    async def prepare(self, spec: InstanceSpec) -> Handle:
        check_wishes(spec.app, self.name, self.capabilities.refuses)
        leader = spec.id if spec.pod is None else spec.pod.leader
        control = state_of(spec) / f"runsc-{leader}.sock"
        if len(str(control)) > LONGEST_SOCKET:
            raise Unsupported(
                f"{control} is too long a name for a socket: keep the node's state in a directory "
                "with a shorter one"
            )
        handle = await super().prepare(spec)
        try:
            self._prepare_sandbox(spec)
        except BaseException:
            await self.destroy(handle)
            raise
        return handle

    def _make_handle(self, spec: InstanceSpec, stop_signal: int) -> Handle:
        handle = super()._make_handle(spec, stop_signal)
        return msgspec.structs.replace(handle, data=handle.data | _own_data(spec))

    def _prepare_sandbox(self, spec: InstanceSpec) -> None:
        config = spec.directory / "config.json"
        own_tmp = str(spec.directory / "rootfs/tmp") if _has_tmp(spec) else ""
        made = formats.for_sandbox(config.read_bytes(), spec.app, own_tmp=own_tmp)
        config.write_bytes(made)
        engine.write_meminfo(spec.directory, spec.app.resources.memory_bytes)
        state = state_of(spec)
        state.mkdir(mode=0o700, exist_ok=True)
        os.chown(state, spec.app.id_base, spec.app.id_base)
        Cgroup(spec.cgroup).make(self._pod_limits(spec) if spec.pod is None else {})

    def _pod_limits(self, spec: InstanceSpec) -> dict[str, float]:
        """Of the whole sandbox, while the engine starts it."""
        limits = spec.app.resources
        outer = formats.outer_limits(limits, len(spec.sidecars))
        return outer | {"cpu": max(limits.cpu, NO_LIMIT * (os.cpu_count() or 1))}

    def _watched(self, spec: InstanceSpec) -> Path | None:
        """The sandbox's process ends as its first container does."""
        is_leader = spec.pod is None or spec.id == spec.pod.leader
        return spec.directory / "pid" if is_leader else None

    async def _exited(self, handle: Handle) -> ExitStatus:
        """Of one of several, also when the sandbox was killed, which the main one tells."""
        sandbox = str(handle.data["sandbox"])
        if handle.id == sandbox:
            status = await self._spawner.exited(sandbox)
            if status.signal and not handle.data["limits"]:
                raise NotFound(f"the sandbox {sandbox} was killed")
            return status
        while is_running(handle):
            if (ended := await self._wait_inside(handle, sandbox)) is not None:
                return ended
        status = await self._spawner.exited(sandbox)
        if status.signal and handle.data["limits"]:
            return status
        raise NotFound(f"{handle.id} has ended with the sandbox {sandbox}")

    async def _wait_inside(self, handle: Handle, sandbox: str) -> ExitStatus | None:
        """None when the sandbox has ended with it, or cannot tell. Where all are killed since that
        ends, each is told to be killed, and a moment later the sandbox has ended."""
        status = None
        with suppress(EngineError, NotFound):
            answer = await self._ask(handle, "wait", handle.id, for_ever=True)
            status = formats.parse_wait(answer)
        if status is not None and parse_init_status(status).signal != signal.SIGKILL:
            return status
        with suppress(TimeoutError):
            async with asyncio.timeout(ENDING_S):
                await self._spawner.exited(sandbox)
                return None
        return status

    async def _signal(self, handle: Handle, number: int) -> bool:
        if handle.id == handle.data["sandbox"]:
            return await super()._signal(handle, number)
        try:
            await self._ask(handle, "kill", handle.id, str(number))
        except (EngineError, NotFound):
            return False
        return True

    async def stop(self, handle: Handle, timeout_s: float) -> None:
        """One of several has ended, too, when its sandbox has."""
        try:
            await super().stop(handle, timeout_s)
        except (EngineError, NotFound):
            if is_running(handle):
                raise

    def _oom_kills(self, handle: Handle) -> int:
        return Cgroup(str(handle.data["limits"])).oom_kills() if handle.data["limits"] else 0

    def _run(self, spec: InstanceSpec, handle: Handle) -> tuple[str, ...]:
        return self._beginning(spec, handle, "run", "-detach")

    def _beginning(self, spec: InstanceSpec, handle: Handle, *words: str) -> tuple[str, ...]:
        assert spec.link is not None
        directory = directory_of(handle)
        place = ("-bundle", str(directory), "-pid-file", str(directory / "pid"), handle.id)
        run = (*self._command(handle), *words, *place)
        pid = spec.link.parked_pid
        return cgroup_of(handle).entering(engine.joining(pid, engine.covering(directory, run)))

    def _command(self, handle: Handle) -> tuple[str, ...]:
        directory = directory_of(handle)
        return (
            self._path or engine.find_engine().path,
            *("--root", str(handle.data["state"])),
            *("--log", str(directory / "engine.log"), "--log-format", "json"),
            *("--platform", self._platform, "--network=sandbox", "--ignore-cgroups"),
            *("--overlay2=none", "--file-access=shared", "--net-disconnect-ok"),
            *(("--host-uds=open",) if handle.data["services"] else ()),
        )

    def _cause(self, entries: list[dict[str, Any]]) -> str:
        """The first of its parts that failed knows; the others miss that part."""
        errors = (str(entry.get("msg", "")) for entry in entries if entry.get("level") == "error")
        return next(errors, "") or super()._cause(entries)

    def _adopt(self, handle: Handle) -> Handle:
        handle = super()._adopt(handle)
        if handle.data["limits"]:
            with suppress(NotFound):
                limits = Cgroup(str(handle.data["limits"]))
                limits.limit({"cpu": float(str(handle.data["cpu"]))})
        pid = read_file_server(self._state_of(handle), handle.id)
        data = handle.data | {"file_server": pid, "file_server_start": start_ticks(pid)}
        return msgspec.structs.replace(handle, data=data)

    def _state_of(self, handle: Handle) -> Path:
        return Path(str(handle.data["state"]))

    def _remove(self, handle: Handle) -> None:
        super()._remove(handle)
        for name in (engine.MEMINFO, saving.PAUSED):
            (directory_of(handle) / name).unlink(missing_ok=True)

    async def wait_listening(self, handle: Handle, port: int) -> None:
        await half_open.wait_listening(str(handle.data["address"]), port)

    async def _wait_for_init(self, handle: Handle) -> None:
        """The sandbox's kernel delivers what its first process does not wait for, too."""

    async def _end_left_behind(self, handle: Handle) -> None:
        sandbox, directory = self._sandbox(handle), directory_of(handle)
        for name, pid in inside.left_behind(directory, inside.INSIDE_SUFFIX):
            await sandbox.end(pid)
            await self._spawner.forget(inside.key_of(handle.id, name))
        inside.clear(directory)

    # Checkpoints

    async def thaw(self, handle: Handle) -> None:
        await super().thaw(handle)
        await self._pause(handle).end()

    def _pause(self, handle: Handle) -> saving.Pause:
        return saving.Pause(self._ask, handle)

    async def checkpoint(self, handle: Handle, directory: Path, *, leave_running: bool) -> None:
        check_running(handle)
        saving.check_possible(handle, len(ids_of(handle)))
        if any(True for _ in inside.left_behind(directory_of(handle), inside.INSIDE_SUFFIX)):
            raise Conflict(f"a command runs inside {handle.id}: it would run in each copy, too")
        frozen_before, pause = cgroup_of(handle).is_frozen(), self._pause(handle)
        layer = Path(str(handle.data["layer"]))
        work = saving.save(self._ask, pause, handle, layer, directory, self._platform)
        try:
            async with Supervisor("checkpoint", on_failure=lambda *_: None) as tasks:
                await to_its_end(tasks.start(handle.id, work))
        except BaseException:
            await self._go_on(handle, frozen=frozen_before)
            raise
        if leave_running:
            await self._go_on(handle, frozen=frozen_before)
            return
        await saving.end_all(cgroup_of(handle))
        await self._spawner.exited(handle.id)

    async def _go_on(self, handle: Handle, *, frozen: bool) -> None:
        """Stand still as before, or go on."""
        if frozen:
            await cgroup_of(handle).freeze()
        else:
            await self._pause(handle).end()

    async def restore(self, spec: InstanceSpec, handle: Handle, directory: Path) -> Handle:
        record = read_contents(directory, saving.Saved, "a sandbox")
        if record.platform != self._platform:
            raise EngineError(f"it was saved on platform {record.platform}, not {self._platform}")
        self._set_up()
        fill = partial(saving.fill, spec, directory, str(uuid.uuid4()))
        await to_thread(self._bundles.refill, spec, fill)
        saving.let_in(directory, spec.app.id_base)
        os.chown(spec.directory, spec.app.id_base, spec.app.id_base)
        spec.directory.chmod(0o700)
        restore = ("restore", "-detach", "-image-path", str(directory))
        try:
            async with asyncio.timeout(RESTORE_TIMEOUT_S):
                argv = self._beginning(spec, handle, *restore)
                return await self._launch(spec, handle, argv, self._watched(spec))
        except TimeoutError:
            problem = f"{handle.id} was not restored within {RESTORE_TIMEOUT_S:g} s"
            raise EngineError(problem) from None

    async def recover(self, spec: InstanceSpec, handle: Handle) -> Handle | None:
        found = await super().recover(spec, handle)
        if found is not None and not cgroup_of(found).is_frozen():
            await self._pause(found).end()
        return found

    # Inside

    async def exec(self, handle: Handle, execution: Execution) -> Conversation:
        _check_thawed(handle)
        place = self._place(handle)
        begin = partial(Inside, sandbox=self._sandbox(handle))
        if execution.terminal is None:
            return await inside.converse(place, execution, self._spawner, begin)
        return await terminal.converse(place, execution, self._spawner, begin)

    def _place(self, handle: Handle) -> inside.Place:
        """With its file server, which sees the files as the program does."""
        check_running(handle)
        pid, began = handle.data["file_server"], handle.data["file_server_start"]
        assert isinstance(pid, int) and isinstance(began, int)
        if not is_same(pid, began):
            raise NotFound(f"the file server of instance {handle.id} has ended")
        entering = cgroup_of(handle).entering(engine.joining(pid, self._command(handle)))
        directory = directory_of(handle)
        return inside.Place(handle.id, pid, directory, entering, tells_inside=True, init=())

    async def copy(self, handle: Handle, transfer: Transfer) -> Conversation:
        place = self._place(handle)
        own = handle.data["own_mounts"]
        assert isinstance(own, list)
        if (mount := within(Path(f"/proc/{place.pid}/root"), transfer.path, own)) is not None:
            raise Unsupported(
                f"{transfer.path} is in the memory of the sandbox's kernel ({mount}): copy from or "
                "to another directory, and inside from there"
            )
        return await copying.converse(place, transfer)

    def _sandbox(self, handle: Handle) -> Sandbox:
        async def kill(pid: int, number: int) -> None:
            await self._ask(handle, "kill", "-pid", str(pid), handle.id, str(number))

        return Sandbox(partial(self.guest_processes, handle), kill)

    async def stats(self, handle: Handle) -> Stats:
        """Processor and memory are the whole sandbox's, its kernel included; `pids` are the threads
        inside, and when it is frozen, so that they cannot be asked for, the node's."""
        check_running(handle)
        cgroup = cgroup_of(handle)
        stats = cgroup.stats()
        if cgroup.is_frozen():
            return stats
        return msgspec.structs.replace(stats, pids=(await self._usage(handle)).threads)

    async def _usage(self, handle: Handle) -> formats.Usage:
        """Of all containers in the sandbox; each is told the same memory."""
        told = [await self._ask(handle, "events", "-stats", each) for each in ids_of(handle)]
        threads, memory_bytes = zip(*map(formats.parse_usage, told), strict=True)
        return formats.Usage(sum(threads), max(memory_bytes))

    async def limit(self, handle: Handle, resources: Resources) -> None:
        check_running(handle)
        if resources.pids != handle.data["pids"]:
            raise Unsupported(
                f"the number of processes in a sandbox ({handle.data['pids']}) is set at its start"
            )
        if not cgroup_of(handle).is_frozen():
            used_bytes = (await self._usage(handle)).memory_bytes
            if resources.memory_bytes < used_bytes:
                raise Conflict(f"instance {handle.id} uses {used_bytes} bytes now")
        limits = formats.outer_limits(resources, len(ids_of(handle)) - 1)
        cgroup_of(handle).limit(limits)

    async def guest_processes(self, handle: Handle) -> Sequence[GuestProcess]:
        _check_thawed(handle)
        table = await self._ask(handle, "ps", "-format", "table", handle.id)
        return formats.parse_processes(table)

    async def _ask(self, handle: Handle, *words: str, for_ever: bool = False) -> str:
        pid = handle.data["pid"]
        assert isinstance(pid, int)
        check_running(handle)
        argv = engine.joining(pid, (*self._command(handle), *words))
        return await engine.ask(argv, None if for_ever else engine.ANSWER_TIMEOUT_S)


def make(spawner: Spawner, directory: Path) -> RunscDriver:
    return RunscDriver(spawner, directory)


def _own_data(spec: InstanceSpec) -> dict[str, str | int | float | bool | list[str]]:
    """What a handle has beside a container's."""
    is_sidecar = spec.pod is not None and spec.id != spec.pod.id
    return {
        "sandbox": spec.id if spec.pod is None else spec.pod.leader,
        "state": str(state_of(spec)),
        "limits": "" if is_sidecar else spec.cgroup if spec.pod is None else spec.pod.cgroup,
        "address": spec.link.address if spec.link is not None else "",
        "cpu": spec.app.resources.cpu,
        "pids": spec.app.resources.pids,
        "services": spec.services is not None,
        "layer": str(spec.layer),
        "own_mounts": [*formats.KERNELS_OWN, *(() if _has_tmp(spec) else ("/tmp",))],
        "file_server": 0,
        "file_server_start": 0,
    }


def state_of(spec: InstanceSpec) -> Path:
    """The engine's, of the sandbox, which is shared by the containers of a pod."""
    return (spec.directory if spec.pod is None else spec.pod.directory) / STATE


def read_file_server(state: Path, container: str) -> int:
    """The pid of a container's file server (its gofer), as the engine wrote it down; 0 when it has
    not. Raises `EngineError` for a file that says nothing of it."""
    for path in state.glob(f"{container}_sandbox:*.state"):
        try:
            return int(msgspec.json.decode(path.read_bytes())["goferPid"])
        except (msgspec.DecodeError, KeyError, TypeError) as error:
            raise EngineError(f"{path} does not name the file server: {error}") from error
    return 0


def within(tree: Path, path: str, mounts: list[str]) -> str | None:
    """Which of `mounts` a path inside leads into, links followed; None for none of them. The last
    part of the path need not be there."""
    above, _, _ = path.rstrip("/").rpartition("/")
    marks = {mount.lstrip("/"): Path(mount) for mount in mounts}
    for name in (path, above or "/"):
        if (found := resolve(tree, name, marks)) is not None:
            if found.is_relative_to(tree):
                return None
            return next(m for m in mounts if found.is_relative_to(m))
    return next((m for m in mounts if f"{path}/".startswith(f"{m}/")), None)


def _has_tmp(spec: InstanceSpec) -> bool:
    tmp = spec.image.tree / "tmp"
    return tmp.is_dir() and not tmp.is_symlink()


def _check_thawed(handle: Handle) -> None:
    check_running(handle)
    if cgroup_of(handle).is_frozen():
        raise Conflict(f"instance {handle.id} is frozen: what is inside cannot be asked")
