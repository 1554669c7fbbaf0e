"""Classes `microvm` and `vm` with QEMU: one driver, two machines.

A start is: the disks, a tap in the place of the link's end, and a cgroup (`prepare`); then
`confine` through the spawner, which starts QEMU where it reaches nothing else and stays beside it.
The guest boots, reads its order from a disk and starts the app's program without asking anyone, so
the node's agent may end and come back at any time. When the program ends, the guest says how, in a
line that `confine` keeps in the file `end`, and turns the machine off.

The node's agent talks to the agent inside over a socket of QEMU's (see `tabane.guest`), and to QEMU
itself over another. Both are in the instance's directory, and are opened again when need be.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

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
from tabane.guest import client as guests
from tabane.guest.frames import Kind
from tabane.guest.orders import (
    encode_execution,
    encode_limits,
    encode_transfer,
    parse_numbers,
)
from tabane.guest.processes import list_processes
from tabane.model import ExitStatus, GuestProcess, InstanceId, Resources
from tabane.runtimes import process
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
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.qemu import qmp
from tabane.runtimes.qemu.accelerator import find_accelerator
from tabane.runtimes.qemu.ends import parse_end, read_end, tells_of_program
from tabane.runtimes.qemu.machine import MICROVM, Q35, Machine, memory_for
from tabane.runtimes.qemu.parts import Parts
from tabane.runtimes.volumes import settle
from tabane.supervise import Supervisor

HANDLE_VERSION = 1
AGENT_S = 5.0
"""How long the agent of a guest that runs may take to answer a new connection."""
KILL_S = 10.0
WRITE_BACK_S = 10.0
"""How long a guest may take to write to its volumes what it has in memory, after a stop in vain."""
RETRY_S = 0.05
LOG_BYTES = 64 << 10
PANIC = "Kernel panic - "
"""What the kernel says then; lines without a reason follow."""
NO_CHECKPOINTS = "machines cannot be checkpointed yet: only cold starts"


class Line:
    """The connection to one guest, made when it is wanted. `is_frozen`: nobody answers there."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.guest: guests.Guest | None = None
        self.is_frozen = False


class QemuDriver:
    """See the module's text. `directory`: initial file systems and empty layers."""

    capabilities = Capabilities(
        freeze=True,
        exec=True,
        terminal=True,
        copy=True,
        stats=True,
        guest_processes=True,
        network=True,
        own_stack=True,
        limit=True,
        volumes=True,
        images=("linux",),
        needs_root=True,
        needs_kvm=True,
        works_emulated=True,
    )

    def __init__(self, machine: Machine, spawner: Spawner, directory: Path) -> None:
        self.name = machine.name
        self.isolation = machine.isolation
        self._parts = Parts(machine, directory)
        self._spawner = spawner
        self._lines: dict[InstanceId, Line] = {}
        self._probe: Probe | None = None

    # What it can do here

    async def probe(self) -> Probe:
        """Boot the guest's kernel once for each boot of this machine (see accelerator.py)."""
        if self._probe is None:
            try:
                accelerator = await self._parts.accelerator(find_accelerator)
                version = await self._parts.version()
                self._probe = Probe(True, version, accelerator.emulates, accelerator.reason)
            except (TabaneError, OSError) as error:
                self._probe = Probe(False, str(error))
        return self._probe

    def enforcements(self) -> tuple[Enforcement, ...]:
        from tabane.runtimes.qemu.enforced import ENFORCEMENTS

        return ENFORCEMENTS

    # Life

    async def prepare(self, spec: InstanceSpec) -> Handle:
        await self._parts.accelerator(find_accelerator)
        program = await self._parts.build(spec)
        return self._make_handle(spec, program.stop_signal)

    def _make_handle(self, spec: InstanceSpec, stop_signal: int) -> Handle:
        data: dict[str, Any] = {
            "pid": 0,
            "pid_start": 0,
            "cgroup": spec.cgroup,
            "directory": str(spec.directory),
            "stop_signal": stop_signal,
            "memory_bytes": spec.app.resources.memory_bytes,
            "volumes": [str(storage.file) for storage in spec.volumes],
        }
        return Handle(self.name, HANDLE_VERSION, spec.id, data)

    async def start(self, spec: InstanceSpec, handle: Handle) -> Handle:
        argv = self._parts.command_line(spec)
        await self._spawner.spawn(Command(handle.id, argv, log=spec.log))
        async with Supervisor(f"start {handle.id}", on_failure=lambda *_: None) as tasks:
            ended = tasks.start("end", self._spawner.exited(handle.id))
            running = tasks.start("agent", self._reach(handle, None))
            await asyncio.wait({ended, running}, return_when=asyncio.FIRST_COMPLETED)
            problem = running.exception() if running.done() else Closed("it has ended")
            if isinstance(problem, Closed):
                status = await ended
                if not tells_of_program(read_end(spec.directory)):
                    raise self._failure(handle, argv, status, spec.log)
            elif problem is not None:
                raise problem
        return _adopt(handle)

    def _failure(
        self, handle: Handle, argv: tuple[str, ...], status: ExitStatus, log: Path
    ) -> EngineError:
        """Of a machine that ended before its app's program ran."""
        end = read_end(_directory(handle))
        status = parse_end(end, status)
        words = end.removeprefix("failed ") or _last_words(log) or status.describe()
        problem = f"{self.name} could not start {handle.id}: {words}"
        code = -status.signal or status.code or 1
        return EngineError(problem, argv=argv, status=code, output=words)

    async def _reach(self, handle: Handle, timeout_s: float | None) -> guests.Guest:
        """The guest, once its program runs. Raises `Closed` when its machine ends, `TimedOut`."""
        line = self._line(handle)
        try:
            async with asyncio.timeout(timeout_s), line.lock:
                if line.guest is not None and not line.guest.is_open:
                    await line.guest.aclose()
                    line.guest = None
                if line.guest is None:
                    line.guest = await self._connect(handle)
                return line.guest
        except TimeoutError:
            raise TimedOut(f"the agent in {handle.id} does not answer") from None

    async def _connect(self, handle: Handle) -> guests.Guest:
        return await guests.connect(_directory(handle) / "agent.sock")

    def _line(self, handle: Handle) -> Line:
        return self._lines.setdefault(handle.id, Line())

    async def _running(self, handle: Handle) -> guests.Guest:
        """The guest of a machine that runs. Raises `NotFound`, `Asleep`, `TimedOut`, `Closed`."""
        _check_running(handle)
        if self._line(handle).is_frozen:
            raise Asleep(f"{handle.id} is frozen: thaw it first")
        return await self._reach(handle, AGENT_S)

    async def wait_listening(self, handle: Handle, port: int) -> None:
        while True:
            with suppress(Closed, ProtocolError):
                guest = await self._reach(handle, None)
                return await guest.wait_listening(port)
            await asyncio.sleep(RETRY_S)  # of its end, somebody else tells

    async def wait(self, handle: Handle) -> ExitStatus:
        """As `Driver.wait`. How its program ended is known until `destroy`."""
        status = await self._spawner.exited(handle.id)
        return parse_end(read_end(_directory(handle)), status)

    async def stop(self, handle: Handle, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                with suppress(TabaneError):  # then it is killed
                    await self._tell_program(handle, _stop_signal(handle))
                    await self._spawner.exited(handle.id)
                    return
        except TimeoutError:
            pass
        if _volumes(handle):
            await self._kill_program(handle)
        if await self._spawner.signal(handle.id, signal.SIGKILL):
            await self._spawner.exited(handle.id)

    async def _tell_program(self, handle: Handle, number: int) -> None:
        await self._resume(handle)
        guest = await self._running(handle)
        guest.say(Kind.SIGNAL, 0, number.to_bytes(4, "little"), must=True)

    async def _kill_program(self, handle: Handle) -> None:
        """From inside: what the guest has in memory for its volumes would be lost with QEMU."""
        with suppress(TabaneError, TimeoutError):  # QEMU is killed then
            async with asyncio.timeout(WRITE_BACK_S):
                await self._tell_program(handle, signal.SIGKILL)
                await self._spawner.exited(handle.id)

    async def freeze(self, handle: Handle) -> None:
        _check_running(handle)
        await self._control(handle, "stop")
        self._line(handle).is_frozen = True

    async def _resume(self, handle: Handle) -> None:
        if _is_running(handle):
            await self._control(handle, "cont")
            self._line(handle).is_frozen = False

    async def thaw(self, handle: Handle) -> None:
        """Its monotonic clock goes on where it stopped; its wall clock is set."""
        if not _is_running(handle):
            return
        await self._resume(handle)
        guest = await self._running(handle)
        await guest.call(Kind.CLOCK, int(SYSTEM.wall() * 1e9).to_bytes(8, "little"))

    async def _control(self, handle: Handle, command: str) -> Any:
        return await qmp.execute(_directory(handle) / "qmp.sock", command)

    async def checkpoint(self, handle: Handle, directory: Path, *, leave_running: bool) -> None:
        raise Unsupported(NO_CHECKPOINTS)

    async def restore(self, spec: InstanceSpec, handle: Handle, directory: Path) -> Handle:
        raise Unsupported(NO_CHECKPOINTS)

    async def recover(self, spec: InstanceSpec, handle: Handle) -> Handle | None:
        if not handle.data["pid"]:
            handle = _adopt(handle)
        if not _is_running(handle):
            return None
        with suppress(TabaneError):
            status = await self._control(handle, "query-status")
            self._line(handle).is_frozen = status.get("status") == "paused"
        return handle

    async def destroy(self, handle: Handle) -> None:
        if (line := self._lines.pop(handle.id, None)) is not None and line.guest is not None:
            await line.guest.aclose()
        await _cgroup(handle).remove()
        with suppress(NotFound, TimeoutError):
            async with asyncio.timeout(KILL_S):
                await self._spawner.exited(handle.id)
        await self._spawner.forget(handle.id)
        for file in _volumes(handle):
            await asyncio.to_thread(settle, file)
        await asyncio.to_thread(self._parts.tear_down, _directory(handle))

    async def discard(self, spec: InstanceSpec) -> None:
        await self.destroy(self._make_handle(spec, signal.SIGTERM))

    async def aclose(self) -> None:
        """Let go of the guests, which go on. Idempotent."""
        for line in self._lines.values():
            if line.guest is not None:
                await line.guest.aclose()
        self._lines.clear()

    def abort(self) -> None:
        """As when the node's agent is killed: the guests see their port closed."""
        for line in self._lines.values():
            if line.guest is not None:
                line.guest.abort()

    # Inside

    async def exec(self, handle: Handle, execution: Execution) -> Conversation:
        guest = await self._running(handle)
        has_terminal = execution.terminal is not None
        fields = encode_execution(execution)
        return await guest.converse(Kind.EXEC, fields, has_terminal=has_terminal)

    async def copy(self, handle: Handle, transfer: Transfer) -> Conversation:
        guest = await self._running(handle)
        kind = Kind.PUT if transfer.inward else Kind.GET
        return await guest.converse(kind, encode_transfer(transfer))

    async def stats(self, handle: Handle) -> Stats:
        """Processor and memory as the node has them, with QEMU's own; the number of processes, and
        those killed for want of memory, as the guest tells, unless it stands still."""
        _check_running(handle)
        stats = _cgroup(handle).stats()
        with suppress(TimedOut, Closed, Asleep):
            guest = await self._running(handle)
            told = parse_numbers(await guest.call(Kind.STATS, timeout_s=1.0))
            return Stats(
                stats.cpu_us,
                stats.memory_bytes,
                min(told.get(b"p", 0), 1 << 22),
                min(told.get(b"o", 0), 1 << 32),
            )
        return stats

    async def limit(self, handle: Handle, resources: Resources) -> None:
        guest = await self._running(handle)
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
        return await list_processes(await self._running(handle))


def microvm(spawner: Spawner, directory: Path) -> QemuDriver:
    return QemuDriver(MICROVM, spawner, directory)


def q35(spawner: Spawner, directory: Path) -> QemuDriver:
    return QemuDriver(Q35, spawner, directory)


def _directory(handle: Handle) -> Path:
    return Path(str(handle.data["directory"]))


def _volumes(handle: Handle) -> list[Path]:
    files = handle.data.get("volumes", [])
    assert isinstance(files, list)
    return [Path(file) for file in files]


def _stop_signal(handle: Handle) -> int:
    number = handle.data["stop_signal"]
    assert isinstance(number, int)
    return number


def _cgroup(handle: Handle) -> Cgroup:
    return Cgroup(str(handle.data["cgroup"]))


def _adopt(handle: Handle) -> Handle:
    """With QEMU's pid, which `confine` wrote down; as it is when there is none."""
    with suppress(FileNotFoundError, ValueError):
        pid = int((_directory(handle) / "pid").read_text())
        data = handle.data | {"pid": pid, "pid_start": process.start_ticks(pid)}
        return msgspec.structs.replace(handle, data=data)
    return handle


def _is_running(handle: Handle) -> bool:
    pid, ticks = handle.data["pid"], handle.data["pid_start"]
    if not isinstance(pid, int) or not isinstance(ticks, int) or not process.is_same(pid, ticks):
        return False
    return process.state(pid) not in "ZX"


def _check_running(handle: Handle) -> None:
    if not _is_running(handle):
        raise NotFound(f"instance {handle.id} does not run")


def _last_words(log: Path) -> str:
    """What the console said last, or why the kernel panicked; empty when that cannot be read."""
    with suppress(OSError):
        lines = log.read_bytes()[-LOG_BYTES:].decode(errors="replace").strip().splitlines()
        panics = [line[line.index(PANIC) :] for line in lines if PANIC in line]
        return (panics or lines or [""])[-1].strip()
    return ""
