"""What the drivers of machines have in common: all that is said to the agent inside.

A machine runs all containers of its instance. The guest boots, reads its order from a disk and
starts their programs without asking anyone, so the node's agent may end and come back at any time.
When the first of them ends, the guest ends the others, says how that was, and turns the machine
off. While there is an agent on the node, it is told at once.

A guest is not trusted. One that breaks what was agreed is cut off: its machine is killed, and the
reason kept in the file `cut`.
"""

from __future__ import annotations

import asyncio
import signal
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from tabane.clock import SYSTEM
from tabane.errors import (
    Asleep,
    Closed,
    EngineError,
    NotFound,
    ProtocolError,
    TabaneError,
    TimedOut,
    Unsupported,
)
from tabane.guest.client import Guest, OnFault, Services
from tabane.guest.frames import Kind
from tabane.guest.orders import encode_execution, encode_limits, encode_transfer, parse_numbers
from tabane.guest.processes import list_processes
from tabane.model import Class, ExitStatus, GuestProcess, Resources
from tabane.runtimes import process
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
from tabane.runtimes.bundle import DEFAULT_CAPABILITIES, OPTIONAL_CAPABILITIES
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.machines.ends import CUT, explain, last_words, parse_end, tells_of_program
from tabane.runtimes.machines.lines import Lines
from tabane.runtimes.machines.parts import MachineParts, services_of
from tabane.runtimes.machines.relays import key_of
from tabane.runtimes.machines.sizes import memory_for
from tabane.runtimes.volumes import settle
from tabane.runtimes.wishes import check_wishes
from tabane.spec_fields import CAPABILITIES, MAIN
from tabane.supervise import Supervisor

HANDLE_VERSION = 1
AGENT_S = 5.0
"""How long the agent of a guest that runs may take to answer a new connection."""
KILL_S = 10.0
WRITE_BACK_S = 10.0
"""How long a guest may take to write to its volumes what it has in memory, after a stop in vain."""
LOGS_S = 2.0
"""How long what a machine said may take to be in its containers' logs, once it has ended."""
NO_CHECKPOINTS = "its machines cannot be checkpointed: only cold starts"
REFUSES = {
    name: f"gives no program {name}"
    for name in sorted(CAPABILITIES - OPTIONAL_CAPABILITIES - DEFAULT_CAPABILITIES)
}
"""With these it would have the guest's kernel in its power, and what is beside it."""
COMMON = Capabilities(
    freeze=True,
    exec=True,
    terminal=True,
    copy=True,
    stats=True,
    guest_processes=True,
    network=True,
    services=True,
    pods=True,
    own_stack=True,
    limit=True,
    images=("linux",),
    refuses=REFUSES,
    needs_root=True,
    needs_kvm=True,
)
"""What the agent makes possible."""


class MachineDriver(ABC):
    """See the module's text."""

    capabilities = COMMON

    def __init__(self, name: str, isolation: Class, parts: MachineParts, spawner: Spawner) -> None:
        self.name = name
        self.isolation = isolation
        self._parts = parts
        self._spawner = spawner
        self._lines = Lines(self._connect_to)
        self._tasks = Supervisor(name)
        self._attending: dict[str, asyncio.Task[Any]] = {}

    # What differs

    @abstractmethod
    async def probe(self) -> Probe: ...

    @abstractmethod
    def enforcements(self) -> tuple[Enforcement, ...]: ...

    @abstractmethod
    async def start_machine(self, spec: InstanceSpec, handle: Handle) -> Sequence[str]:
        """Begin to start it. Returns the command line."""

    @abstractmethod
    async def bring_up(self, spec: InstanceSpec, handle: Handle) -> None:
        """Do what is left until its programs run. Raises `Closed` when it ends."""

    @abstractmethod
    async def connect(self, handle: Handle, services: Services, on_fault: OnFault) -> Guest:
        """See `tabane.guest.client.connect`."""

    @abstractmethod
    async def control(self, handle: Handle, command: str) -> Any:
        """Have its processors stand still (`stop`), or go on (`cont`)."""

    @abstractmethod
    async def recover(self, spec: InstanceSpec, handle: Handle) -> Handle | None: ...

    @abstractmethod
    def pid_file(self, handle: Handle) -> Path:
        """With the pid of what runs the machine."""

    @abstractmethod
    def read_end(self, handle: Handle) -> str:
        """The line that the guest said of its end; empty when there is none."""

    def machine_log(self, spec: InstanceSpec) -> Path:
        """Where what runs the machine says what goes wrong with it."""
        return spec.log

    # Life

    async def prepare(self, spec: InstanceSpec) -> Handle:
        check_wishes(spec.app, self.name, REFUSES)
        program = await self._parts.build(spec)
        return self.make_handle(spec, program.stop_signal)

    def make_handle(self, spec: InstanceSpec, stop_signal: int) -> Handle:
        data: dict[str, Any] = {
            "pid": 0,
            "pid_start": 0,
            "cgroup": spec.cgroup,
            "directory": str(spec.directory),
            "log": str(spec.log),
            "stop_signal": stop_signal,
            "memory_bytes": spec.app.resources.memory_bytes,
            "volumes": [str(storage.file) for storage in spec.volumes],
            "services": [str(path) for path in services_of(spec)],
            "containers": [sidecar.name for sidecar in spec.sidecars],
        }
        return Handle(self.name, HANDLE_VERSION, spec.id, data)

    async def start(self, spec: InstanceSpec, handle: Handle) -> Handle:
        begin = partial(self.start_machine, spec, handle)
        return await self.run_machine(spec, handle, begin, partial(self.bring_up, spec, handle))

    async def run_machine(
        self,
        spec: InstanceSpec,
        handle: Handle,
        begin: Callable[[], Awaitable[Sequence[str]]],
        bring_up: Callable[[], Coroutine[Any, Any, None]],
    ) -> Handle:
        """As `start`, by two steps as `start_machine` and `bring_up`."""
        for number in range(1, len(spec.sidecars) + 1):
            await self._spawner.spawn(self._parts.relay(spec, number))
        argv = tuple(await begin())
        async with Supervisor(f"start {handle.id}", on_failure=lambda *_: None) as tasks:
            ended = tasks.start("end", self._spawner.exited(handle.id))
            running = tasks.start("agent", bring_up())
            await asyncio.wait({ended, running}, return_when=asyncio.FIRST_COMPLETED)
            problem = running.exception() if running.done() else Closed("it has ended")
            if isinstance(problem, Closed):
                await asyncio.wait({ended}, timeout=KILL_S)
            if problem is not None and not tells_of_program(self.read_end(handle)):
                raise self._failure(spec, handle, argv, problem, ended)
        return self.attend(self.adopt(handle))

    def _failure(
        self,
        spec: InstanceSpec,
        handle: Handle,
        argv: tuple[str, ...],
        problem: BaseException,
        ended: asyncio.Task[ExitStatus],
    ) -> BaseException:
        """Of a machine whose programs do not run: what the guest said of it, or what was said last
        on its console."""
        if not isinstance(problem, Closed | TimedOut):
            return problem
        end = self.read_end(handle)
        status = parse_end(end, ended.result()) if ended.done() else ExitStatus()
        words = end.removeprefix("failed ")
        words = words or last_words(self.machine_log(spec)) or last_words(spec.log)
        words, which = words or (status.describe() if ended.done() else str(problem)), ""
        for name in _sidecars(handle):
            if words.startswith(of_it := f"container {name}: "):
                words, which = words.removeprefix(of_it), of_it
        text = f"{which}{self.name} could not start {handle.id}: {words}"
        code = -status.signal or status.code or 1
        return EngineError(text, argv=argv, status=code, output=words)

    def adopt(self, handle: Handle) -> Handle:
        """With the machine's pid, which was written down; as it is when there is none."""
        with suppress(FileNotFoundError, ValueError):
            pid = int(self.pid_file(handle).read_text())
            data = handle.data | {"pid": pid, "pid_start": process.start_ticks(pid)}
            return replace(handle, data=data)
        return handle

    def attend(self, handle: Handle) -> Handle:
        """Carry what its programs say to sockets of the node, if it may reach any."""
        if _list(handle, "services") and handle.id not in self._attending:
            self._attending[handle.id] = self._tasks.start(
                f"attend {handle.id}", self._lines.attend(handle)
            )
        return handle

    async def _connect_to(self, handle: Handle) -> Guest:
        services = {path.name: path for path in map(Path, _list(handle, "services"))}

        def cut_off(error: ProtocolError) -> None:
            self._tasks.start(f"cut off {handle.id}", self._cut_off(handle, error))

        return await self.connect(handle, services, cut_off)

    async def _cut_off(self, handle: Handle, error: ProtocolError) -> None:
        (directory_of(handle) / CUT).write_text(error.message)
        await self.kill_machine(handle)

    async def reach(self, handle: Handle, timeout_s: float | None = None) -> Guest:
        """The guest, once its programs run. Raises `Closed` when its machine ends, `TimedOut`."""
        return await self._lines.reach(handle, timeout_s)

    async def running(self, handle: Handle) -> Guest:
        """The guest of a machine that runs. Raises `NotFound`, `Asleep`, `TimedOut`, `Closed`."""
        check_running(handle)
        if self._lines.of(handle).is_frozen:
            raise Asleep(f"{handle.id} is frozen: thaw it first")
        return await self.reach(handle, AGENT_S)

    async def wait_listening(self, handle: Handle, port: int) -> None:
        await self._lines.wait_listening(handle, port)

    async def wait(self, handle: Handle) -> ExitStatus:
        """As `Driver.wait`. How it ended is known until `destroy`."""
        if _sidecars(handle) and (line := await self._first_end(handle)):
            return self._parse(handle, line, ExitStatus())
        status = await self._spawner.exited(handle.id)
        await self._finish_logs(handle)
        status = self._parse(handle, self.read_end(handle), status)
        log = Path(str(handle.data.get("log", "")))
        return explain(status, directory_of(handle), self.read_end(handle), log)

    async def _first_end(self, handle: Handle) -> str:
        """How the first of its programs has ended, while the guest ends the others; empty: the
        machine has ended first."""
        async with Supervisor(f"wait {handle.id}", on_failure=lambda *_: None) as tasks:
            ended = tasks.start("end", self._spawner.exited(handle.id))
            told = tasks.start("told", self._lines.attend(handle))
            await asyncio.wait({ended, told}, return_when=asyncio.FIRST_COMPLETED)
            return "" if ended.done() else told.result()

    @staticmethod
    def _parse(handle: Handle, line: str, machine: ExitStatus) -> ExitStatus:
        status = parse_end(line, machine)
        return status if status.container in _sidecars(handle) else replace(status, container="")

    async def _finish_logs(self, handle: Handle) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LOGS_S):
                for number in range(1, len(_sidecars(handle)) + 1):
                    with suppress(NotFound):
                        await self._spawner.exited(key_of(handle.id, number))

    async def stop(self, handle: Handle, timeout_s: float) -> None:
        with suppress(TabaneError, TimeoutError):  # then it is killed
            async with asyncio.timeout(timeout_s):
                with suppress(Closed):  # it is ending
                    await self._tell_program(handle, _stop_signal(handle))
                await self._spawner.exited(handle.id)
                return
        if _list(handle, "volumes"):
            await self._kill_programs(handle)
        if await self.kill_machine(handle):
            await self._spawner.exited(handle.id)

    async def kill_machine(self, handle: Handle) -> bool:
        """At once. False: it has ended."""
        return await self._spawner.signal(handle.id, signal.SIGKILL)

    async def _tell_program(self, handle: Handle, number: int) -> None:
        await self._resume(handle)
        guest = await self.running(handle)
        guest.say(Kind.SIGNAL, 0, number.to_bytes(4, "little"), must=True)

    async def _kill_programs(self, handle: Handle) -> None:
        """From inside: what the guest has in memory for its volumes would be lost with it."""
        with suppress(TabaneError, TimeoutError):  # the machine is killed then
            async with asyncio.timeout(WRITE_BACK_S):
                await self._tell_program(handle, signal.SIGKILL)
                await self._spawner.exited(handle.id)

    async def freeze(self, handle: Handle) -> None:
        check_running(handle)
        await self.control(handle, "stop")
        self._lines.of(handle).is_frozen = True

    async def _resume(self, handle: Handle) -> None:
        if is_running(handle):
            await self.control(handle, "cont")
            self._lines.of(handle).is_frozen = False

    async def thaw(self, handle: Handle) -> None:
        """Its monotonic clock goes on where it stopped; its wall clock is set."""
        if not is_running(handle):
            return
        await self._resume(handle)
        guest = await self.running(handle)
        await guest.call(Kind.CLOCK, int(SYSTEM.wall() * 1e9).to_bytes(8, "little"))

    async def checkpoint(self, handle: Handle, directory: Path, *, leave_running: bool) -> None:
        raise Unsupported(NO_CHECKPOINTS)

    async def restore(self, spec: InstanceSpec, handle: Handle, directory: Path) -> Handle:
        raise Unsupported(NO_CHECKPOINTS)

    async def destroy(self, handle: Handle) -> None:
        if (attending := self._attending.pop(handle.id, None)) is not None:
            attending.cancel()
        await self._lines.drop(handle)
        await _cgroup(handle).remove()
        with suppress(NotFound, TimeoutError):
            async with asyncio.timeout(KILL_S):
                await self._spawner.exited(handle.id)
        await self._spawner.forget(handle.id)
        for number in range(1, len(_sidecars(handle)) + 1):
            await self._spawner.forget(key_of(handle.id, number))
        for file in map(Path, _list(handle, "volumes")):
            await asyncio.to_thread(settle, file)
        await asyncio.to_thread(self._parts.tear_down, directory_of(handle))

    async def discard(self, spec: InstanceSpec) -> None:
        await self.destroy(self.make_handle(spec, signal.SIGTERM))

    async def aclose(self) -> None:
        """Let go of the guests, which go on. Idempotent."""
        await self._tasks.aclose()
        await self._lines.aclose()

    def abort(self) -> None:
        """As when the node's agent is killed: the guests see their port closed."""
        for task in self._attending.values():
            task.cancel()
        self._lines.abort()

    # Inside

    async def exec(self, handle: Handle, execution: Execution) -> Conversation:
        execution = replace(execution, container=_container(handle, execution.container))
        guest = await self.running(handle)
        has_terminal = execution.terminal is not None
        fields = encode_execution(execution)
        return await guest.converse(Kind.EXEC, fields, has_terminal=has_terminal)

    async def copy(self, handle: Handle, transfer: Transfer) -> Conversation:
        transfer = replace(transfer, container=_container(handle, transfer.container))
        guest = await self.running(handle)
        kind = Kind.PUT if transfer.inward else Kind.GET
        return await guest.converse(kind, encode_transfer(transfer))

    async def stats(self, handle: Handle) -> Stats:
        """Processor and memory as the node has them, with the machine's own; the number of
        processes, and those killed for want of memory, as the guest tells, unless it stands
        still."""
        check_running(handle)
        stats = _cgroup(handle).stats()
        with suppress(TimedOut, Closed, Asleep):
            guest = await self.running(handle)
            told = parse_numbers(await guest.call(Kind.STATS, timeout_s=1.0))
            return Stats(
                stats.cpu_us,
                stats.memory_bytes,
                min(told.get(b"p", 0), 1 << 22),
                min(told.get(b"o", 0), 1 << 32),
            )
        return stats

    async def limit(self, handle: Handle, resources: Resources) -> None:
        guest = await self.running(handle)
        booted = handle.data["memory_bytes"]
        assert isinstance(booted, int)
        if memory_for(resources.memory_bytes) > memory_for(booted):
            raise Unsupported(
                f"{handle.id} was started with {booted} bytes of memory: a machine cannot get more"
            )
        await guest.call(Kind.LIMIT, encode_limits(resources.memory_bytes, resources.pids))
        _cgroup(handle).limit({"cpu": resources.cpu})

    async def processes(self, handle: Handle) -> list[int]:
        return _cgroup(handle).pids()

    async def guest_processes(self, handle: Handle) -> Sequence[GuestProcess]:
        found = await list_processes(await self.running(handle))
        known = {MAIN, *_sidecars(handle)} if _sidecars(handle) else ()
        return [one if one.container in known else replace(one, container="") for one in found]


def directory_of(handle: Handle) -> Path:
    return Path(str(handle.data["directory"]))


def is_running(handle: Handle) -> bool:
    pid, ticks = handle.data["pid"], handle.data["pid_start"]
    if not isinstance(pid, int) or not isinstance(ticks, int) or not process.is_same(pid, ticks):
        return False
    return process.state(pid) not in "ZX"


def check_running(handle: Handle) -> None:
    if not is_running(handle):
        raise NotFound(f"instance {handle.id} does not run")


def _list(handle: Handle, name: str) -> list[str]:
    found = handle.data.get(name, [])
    assert isinstance(found, list)
    return found


def _sidecars(handle: Handle) -> list[str]:
    return _list(handle, "containers")


def _container(handle: Handle, name: str) -> str:
    """Of an order to the guest: empty for the main one."""
    if name in ("", MAIN):
        return ""
    if name not in _sidecars(handle):
        known = ", ".join((*_sidecars(handle), MAIN))
        raise NotFound(f"instance {handle.id} has no container {name} ({known})")
    return name


def _stop_signal(handle: Handle) -> int:
    number = handle.data["stop_signal"]
    assert isinstance(number, int)
    return number


def _cgroup(handle: Handle) -> Cgroup:
    return Cgroup(str(handle.data["cgroup"]))
