"""Containers that containerd keeps: `io.containerd.runc.v2` for class `container`.

    ID/config.json, ID/rootfs   as for every OCI engine: containerd gets this spec and this root
                                file system, and needs neither images nor snapshots
    ID/exit.json                how it ended, once it has

A start is three calls: `Containers.Create`, `Tasks.Create` (the shim starts, and makes the
container), `Tasks.Start`. Its output goes into pipes of the spawner's, which a process of the
spawner's holds open until the shim has opened them by their names in /proc: so they outlive the
agent, and lines look as those of other drivers. The shim is the parent of the container and knows
how it ends; `wait` asks for that, has the shim deleted, which first copies the last of the output,
and writes the end down, for those who ask later.

The containers of a pod have one shim, as the annotations say that CRI has for them: it is started
with the first of them (the leader) and has its name, and ends with the last. Freezing is the
cgroup's, not the shim's: thawing it takes one write, and no process.

The shim outlives containerd and containerd the agent. A call that finds containerd gone has it
started again and is repeated where that is safe.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tabane.errors import Closed, EngineError, NotFound, TabaneError, TimedOut, Unsupported
from tabane.model import ExitStatus
from tabane.runtimes import bundle, bundles, copying, inside
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
    Transfer,
)
from tabane.runtimes.bundles import Bundles
from tabane.runtimes.containerd.client import Client
from tabane.runtimes.containerd.daemon import Daemon
from tabane.runtimes.containerd.ends import end_file, read_end, write_end
from tabane.runtimes.containerd.enforced import ENFORCEMENTS
from tabane.runtimes.containerd.messages import RUNC_OPTIONS_URL, SPEC_URL, make
from tabane.runtimes.containerd.shims import RUNC, Shim, kill_shims, socket_of
from tabane.runtimes.containerd.talks import Task, begin, left_behind
from tabane.runtimes.ending import end_session, wait_for_init
from tabane.runtimes.process import start_ticks
from tabane.runtimes.spawned import (
    PodOfCgroup,
    cgroup_of,
    check_running,
    directory_of,
    is_running,
    parse_init_status,
)
from tabane.supervise import Supervisor

HANDLE_VERSION = 1
NAMESPACE = "tabane"
KEEP_OPEN = ("sleep", "infinity")
RUNNING, PAUSED = 2, 4
"""States of a task."""
NO_CHECKPOINTS = (
    "what containerd runs cannot be checkpointed: Kata saves no pods, and runc's own way gives a "
    "copy neither its network nor its ids: only cold starts"
)
FORGET_TIMEOUT_S = 10.0
POLL_S = 0.005
REPEATS = 3
"""Of a call that finds containerd gone: it may be killed again meanwhile."""

Answer = TypeVar("Answer")


class ContainerdDriver(PodOfCgroup):
    """See the module's text. `directory`: containerd's own things, the init layer, kept mounts."""

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

    def __init__(self, shim: Shim, spawner: Spawner, directory: Path) -> None:
        self.name = shim.driver
        self.isolation = shim.isolation
        self._shim = shim
        self._spawner = spawner
        self._directory = directory
        self._bundles = Bundles(directory)
        self._daemon = Daemon(f"{shim.driver}-daemon", spawner, directory / "daemon")
        self._client = Client(self._daemon.socket, NAMESPACE)
        self._probe: Probe | None = None
        self._starting: dict[str, asyncio.Task[Handle]] = {}
        self._ends: dict[str, asyncio.Task[ExitStatus]] = {}
        self._tasks = Supervisor(shim.driver, on_failure=lambda *_: None)

    # What it can do here

    async def probe(self) -> Probe:
        """Run a trivial instance with every default on; the answer is kept. A containerd that was
        started for that ends again: the first instance starts it in some 10 ms."""
        if self._probe is None:
            self._probe = await self._try()
        return self._probe

    async def _try(self) -> Probe:
        from tabane.runtimes.trial import try_driver

        try:
            self._check()
            started = await self._daemon.ensure()
        except (TabaneError, OSError) as error:
            return Probe(False, str(error))
        try:
            return await try_driver(self, "containerd", self._directory)
        finally:
            if started:
                self._client.close()
                await self._daemon.stop()

    def _set_up(self) -> None:
        self._check()
        self._bundles.set_up()

    def _check(self) -> None:
        """Raises `Unsupported` with what is missing on this machine."""
        if os.geteuid() != 0:
            raise Unsupported(f"{self.name} needs root here: run the node as root")
        try:
            import google.protobuf  # noqa: F401
            import grpclib  # noqa: F401
        except ImportError as error:
            package = "grpclib" if error.name == "grpclib" else "protobuf"
            problem = f"the Python package {package} is missing: pip install tabane[containerd]"
            raise Unsupported(problem) from None
        self._daemon.check()
        if shutil.which(self._shim.program) is None:
            raise Unsupported(f"{self._shim.program} is not installed")

    def enforcements(self) -> tuple[Enforcement, ...]:
        return ENFORCEMENTS

    # Life

    async def prepare(self, spec: InstanceSpec) -> Handle:
        self._check()
        return self._make_handle(spec, await self._build(spec))

    def _make_handle(self, spec: InstanceSpec, built: dict[str, Any]) -> Handle:
        data: dict[str, Any] = {
            "pid": 0,
            "pid_start": 0,
            "cgroup": spec.cgroup,
            "directory": str(spec.directory),
            "shim": spec.id if spec.pod is None else spec.pod.leader,
        }
        return Handle(self.name, HANDLE_VERSION, spec.id, data | built)

    async def _build(self, spec: InstanceSpec) -> dict[str, Any]:
        """Make the bundle; what the handle must remember of it."""
        program = self._bundles.build(spec)
        await bundles.mount_volumes(spec)
        return {
            "stop_signal": program.stop_signal,
            "io_uid": spec.app.id_base + program.user.uid,
            "io_gid": spec.app.id_base + program.user.gid,
        }

    async def start(self, spec: InstanceSpec, handle: Handle) -> Handle:
        self._hand_over(spec)
        starting = self._tasks.start(f"start {handle.id}", self._start(spec, handle))
        self._starting[handle.id] = starting
        started: Handle = await asyncio.shield(starting)  # a shim cannot be stopped half-way
        self._starting.pop(handle.id, None)
        return started

    def _hand_over(self, spec: InstanceSpec) -> None:
        """The container's root must get to its own files."""
        os.chown(spec.directory, spec.app.id_base, spec.app.id_base)
        spec.directory.chmod(0o700)

    async def _start(self, spec: InstanceSpec, handle: Handle) -> Handle:
        try:
            return await self._start_task(spec, handle)
        except EngineError as error:
            problem = f"{self.name} could not start {handle.id}: {error.output or error}"
            argv, status = error.argv, error.status
            raise EngineError(problem, argv=argv, status=status, output=error.output) from None

    async def _start_task(self, spec: InstanceSpec, handle: Handle) -> Handle:
        await self._daemon.ensure()
        let_go = partial(self._spawner.signal, handle.id, signal.SIGKILL)
        try:
            handle = await self._create(spec, handle)
        except BaseException:
            await let_go()
            raise
        await _together(let_go(), self._client.call("start", container_id=handle.id))
        return handle

    async def _create(self, spec: InstanceSpec, handle: Handle) -> Handle:
        keeper, _ = await _together(
            self._spawner.spawn(Command(handle.id, KEEP_OPEN, log=spec.log)),
            self._client.call("create_container", container=self._describe(handle)),
        )
        created = await self._client.call(
            "create",
            container_id=handle.id,
            stdout=f"/proc/{keeper}/fd/1",
            stderr=f"/proc/{keeper}/fd/2",
            **self._task_fields(handle),
        )
        return self._with_pid(handle, created.pid)

    def _with_pid(self, handle: Handle, told: int) -> Handle:
        """The handle with the pid that containerd told."""
        data = handle.data | {"pid": told, "pid_start": start_ticks(told)}
        return msgspec.structs.replace(handle, data=data)

    def _describe(self, handle: Handle) -> Any:
        spec = make("Any", type_url=SPEC_URL, value=self._config(handle))
        runtime = make("Runtime", name=self._shim.runtime)
        return make("Container", id=handle.id, runtime=runtime, spec=spec)

    def _config(self, handle: Handle) -> bytes:
        return (directory_of(handle) / "config.json").read_bytes()

    def _task_fields(self, handle: Handle) -> dict[str, Any]:
        """What `Tasks.Create` gets that depends on the shim. runc keeps its state with the rest of
        the driver's; its pipes are the app's."""
        options = make(
            "RuncOptions",
            root=str(self._daemon.engine_state),
            io_uid=handle.data["io_uid"],
            io_gid=handle.data["io_gid"],
        )
        packed = make("Any", type_url=RUNC_OPTIONS_URL, value=options.SerializeToString())
        return {"options": packed}

    async def _repeat(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """What may be asked twice: also if containerd was killed meanwhile."""
        for _ in range(REPEATS):
            with suppress(Closed):
                return await ask()
            await self._daemon.ensure()
        return await ask()

    async def wait_listening(self, handle: Handle, port: int) -> None:
        raise Unsupported("its sockets are the node's kernel's: the link's socket table has them")

    async def wait(self, handle: Handle) -> ExitStatus:
        """As `Driver.wait`. Its log is complete then."""
        end = self._ends.get(handle.id)
        if end is None or (end.done() and (end.cancelled() or end.exception())):
            end = self._tasks.start(f"end {handle.id}", self._wait_end(handle))
            self._ends[handle.id] = end
        status: ExitStatus = await asyncio.shield(end)
        return status

    async def _wait_end(self, handle: Handle) -> ExitStatus:
        if (known := read_end(handle)) is not None:
            return known
        status = await self._repeat(lambda: self._ask_end(handle))
        if status.signal == signal.SIGKILL and self._oom_kills(handle):
            status = ExitStatus(signal=status.signal, oom=True)
        await self._repeat(lambda: self._delete(handle))
        await self._spawner.forget(handle.id)
        write_end(handle, status)
        return status

    async def _ask_end(self, handle: Handle) -> ExitStatus:
        """containerd kills what has lost its shim, and forgets it, in a moment."""
        try:
            ended = await self._client.call("wait", container_id=handle.id, timeout_s=None)
        except (NotFound, EngineError):
            if not handle.data["pid"]:
                raise
            await self._wait_forgotten(handle)
            return ExitStatus(signal=signal.SIGKILL)
        return parse_init_status(ExitStatus(ended.exit_status))

    async def _wait_forgotten(self, handle: Handle) -> None:
        try:
            async with asyncio.timeout(FORGET_TIMEOUT_S):
                while await self._find(handle.id) is not None:  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            problem = f"containerd does not clear {handle.id} away, which has no shim any more"
            raise TimedOut(problem) from None

    def _oom_kills(self, handle: Handle) -> int:
        return cgroup_of(handle).oom_kills()

    async def _delete(self, handle: Handle) -> None:
        """End the shim of what has ended, and forget the container. Idempotent."""
        try:
            await self._client.call("delete", container_id=handle.id)
        except NotFound:
            pass
        except EngineError:  # unless its shim is being cleared away just now
            await self._wait_forgotten(handle)
        with suppress(NotFound):
            await self._client.call("delete_container", id=handle.id)

    async def stop(self, handle: Handle, timeout_s: float) -> None:
        if not is_running(handle):
            return
        await self.thaw(handle)
        await self._wait_for_init(handle)
        await self._kill(handle, int(str(handle.data["stop_signal"])))
        try:
            async with asyncio.timeout(timeout_s):
                await self.wait(handle)
        except TimeoutError:
            await self._kill(handle, signal.SIGKILL)
            await self.wait(handle)

    async def _wait_for_init(self, handle: Handle) -> None:
        pid, ticks = handle.data["pid"], handle.data["pid_start"]
        assert isinstance(pid, int) and isinstance(ticks, int)
        await wait_for_init(pid, ticks)

    async def _kill(self, handle: Handle, number: int) -> None:
        """Nothing when it has ended."""

        async def kill() -> None:
            with suppress(NotFound):
                await self._client.call("kill", container_id=handle.id, signal=number)

        try:
            await self._repeat(kill)
        except EngineError as error:  # unless its shim is being cleared away just now
            try:
                await self._wait_forgotten(handle)
            except TimedOut:
                raise error from None

    async def _find(self, container: str) -> Any:
        """Its task's process; None: there is none."""
        try:
            ask = lambda: self._client.call("get", container_id=container)  # noqa: E731
            return (await self._repeat(ask)).process
        except NotFound:
            return None

    async def checkpoint(self, handle: Handle, directory: Path, *, leave_running: bool) -> None:
        raise Unsupported(NO_CHECKPOINTS)

    async def restore(self, spec: InstanceSpec, handle: Handle, directory: Path) -> Handle:
        raise Unsupported(NO_CHECKPOINTS)

    async def recover(self, spec: InstanceSpec, handle: Handle) -> Handle | None:
        if read_end(handle) is not None:
            return None
        await self._daemon.ensure()
        found = await self._find(handle.id)
        if found is None or found.status not in (RUNNING, PAUSED):
            return None
        handle = self._with_pid(handle, found.pid)
        await self._end_left_behind(handle)
        return handle

    async def _end_left_behind(self, handle: Handle) -> None:
        """End the commands inside whose agent is no more: nobody hears them."""
        for task in left_behind(self._client, handle.id, directory_of(handle)):
            await self._end(handle, task)
            await task.signal(signal.SIGKILL)
            await task.delete()

    async def destroy(self, handle: Handle) -> None:
        if (starting := self._starting.pop(handle.id, None)) is not None:
            await asyncio.wait([starting])
        if directory_of(handle).exists() and read_end(handle) is None:
            await self._end_task(handle)
        await cgroup_of(handle).remove()
        await asyncio.to_thread(self._remove, handle)
        await self._spawner.signal(handle.id, signal.SIGKILL)
        await self._spawner.forget(handle.id)
        if (end := self._ends.pop(handle.id, None)) is not None:
            await asyncio.wait([end])

    async def discard(self, spec: InstanceSpec) -> None:
        await self.destroy(self._make_handle(spec, {}))

    async def _end_task(self, handle: Handle) -> None:
        """Kill what runs and have containerd forget it; without one, end the shim: the rest goes
        with its cgroup, and containerd finds out when it is there again."""
        try:
            await self._daemon.ensure()
        except (Unsupported, EngineError):
            kill_shims(self._shim.program, shim_of(handle))
            return
        if await self._find(handle.id) is not None:
            await self.thaw(handle)
            await self._kill(handle, signal.SIGKILL)
            with suppress(NotFound):  # another that waited for its end has deleted it
                await self.wait(handle)
        await self._repeat(lambda: self._delete(handle))

    def _remove(self, handle: Handle) -> None:
        directory = directory_of(handle)
        if directory.exists():
            bundles.tear_down(directory)
            inside.clear(directory)
            end_file(handle).unlink(missing_ok=True)
        shutil.rmtree(self._daemon.engine_state / NAMESPACE / handle.id, ignore_errors=True)
        if handle.id == shim_of(handle):  # of several the last
            socket_of(self._daemon.socket, NAMESPACE, handle.id).unlink(missing_ok=True)

    async def aclose(self) -> None:
        """Leave: instances go on, and their containerd does. Idempotent."""
        await self._tasks.aclose()
        self._client.close()

    async def end(self) -> None:
        """At the node's end: leave, unmount what is kept between instances, and end the node's own
        containerd."""
        await self.aclose()
        self._bundles.close()
        await self._daemon.stop()
        self._daemon.remove()

    # Inside

    async def exec(self, handle: Handle, execution: Execution) -> Conversation:
        check_running(handle)
        process = inside.describe_process(self._config(handle), execution)
        if (problem := inside.look_up(self._tree(handle), process)) is not None:
            return problem
        await self._daemon.ensure()
        if execution.terminal is None:
            process["args"] = (bundle.INIT, "-s", "--", *execution.argv)
        task = Task(self._client, handle.id, inside.Files(directory_of(handle)))
        return await begin(task, process, execution, lambda: self._end(handle, task))

    def _tree(self, handle: Handle) -> Path:
        """Its root file system, where the node can look into it."""
        return Path(f"/proc/{handle.data['pid']}/root")

    async def _end(self, handle: Handle, task: Task) -> None:
        """End a command with all it started."""
        with suppress(TimeoutError):
            async with asyncio.timeout(inside.END_TIMEOUT_S):
                await end_session(task.pid, task.began, cgroup_of(handle).pids)

    async def copy(self, handle: Handle, transfer: Transfer) -> Conversation:
        check_running(handle)
        pid = handle.data["pid"]
        assert isinstance(pid, int)
        place = inside.Place(handle.id, pid, directory_of(handle), ())
        return await copying.converse(place, transfer)


def containerd(spawner: Spawner, directory: Path) -> ContainerdDriver:
    return ContainerdDriver(RUNC, spawner, directory)


async def _together(*work: Awaitable[Any]) -> list[Any]:
    """What they return that go on at the same time, once all have ended."""
    ended = await asyncio.gather(*work, return_exceptions=True)
    for one in ended:
        if isinstance(one, BaseException):
            raise one
    return ended


def shim_of(handle: Handle) -> str:
    """By whose name the shim was started."""
    return str(handle.data["shim"])
