"""Class `microvm` with Firecracker: the guest is QEMU's, with the same disks, kernel and agent.

A start is: the disks and the tap in the jail (`prepare`); the jailer, through the spawner, which
leaves Firecracker behind; what Firecracker must know, call after call over its socket; its start;
and the agent's word that the app's program runs. When the program ends, the guest writes how on a
disk of one sector and resets, which ends Firecracker.

Nothing of this needs the node's agent afterwards: Firecracker's stdout, the guest's console, is
the log; its socket and the one to the agent inside are files in the jail.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from tabane.errors import Closed, EngineError, TabaneError
from tabane.guest import client as guests
from tabane.model import ExitStatus
from tabane.runtimes import process
from tabane.runtimes.api import (
    Capabilities,
    Command,
    Enforcement,
    Handle,
    InstanceSpec,
    Probe,
    Spawner,
)
from tabane.runtimes.firecracker.client import Api, wait_for_api
from tabane.runtimes.firecracker.enforced import ENFORCEMENTS
from tabane.runtimes.firecracker.machine import (
    AGENT_PORT,
    API_SOCKET,
    LOG,
    PID,
    VSOCK_SOCKET,
    jail_of,
    make_requests,
)
from tabane.runtimes.firecracker.parts import MACHINE, FirecrackerParts
from tabane.runtimes.oci import is_running
from tabane.runtimes.qemu.driver import HANDLE_VERSION, QemuDriver
from tabane.runtimes.qemu.ends import parse_end, tells_of_program
from tabane.supervise import Supervisor
from tabane.unix import connect_unix

RETRY_S = 0.002
MOST_WORDS = 512


class FirecrackerDriver(QemuDriver):
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
        images=("linux",),
        needs_root=True,
        needs_kvm=True,
    )

    def __init__(self, spawner: Spawner, directory: Path) -> None:
        super().__init__(MACHINE, spawner, directory)
        self._parts: FirecrackerParts = FirecrackerParts(directory)
        self._directory = directory

    async def probe(self) -> Probe:
        """Boot the guest's kernel once; the answer is kept."""
        if self._probe is None:
            from tabane.runtimes.firecracker.trial import try_machine

            try:
                kernel, initramfs = self._parts.set_up()
                version = await self._parts.version()
                await try_machine(kernel, initramfs, self._directory)
                self._probe = Probe(True, version)
            except (TabaneError, OSError) as error:
                self._probe = Probe(False, str(error))
        return self._probe

    def enforcements(self) -> tuple[Enforcement, ...]:
        return ENFORCEMENTS

    # Life

    async def prepare(self, spec: InstanceSpec) -> Handle:
        program = await self._parts.build(spec)
        data: dict[str, Any] = {
            "pid": 0,
            "pid_start": 0,
            "cgroup": spec.cgroup,
            "directory": str(spec.directory),
            "stop_signal": program.stop_signal,
            "memory_bytes": spec.app.resources.memory_bytes,
        }
        return Handle(self.name, HANDLE_VERSION, spec.id, data)

    async def start(self, spec: InstanceSpec, handle: Handle) -> Handle:
        argv = self._parts.command_line(spec)
        pid_file = _jail(handle) / PID
        await self._spawner.spawn(Command(handle.id, argv, log=spec.log, pid_file=pid_file))
        async with Supervisor(f"start {handle.id}", on_failure=lambda *_: None) as tasks:
            ended = tasks.start("end", self._spawner.exited(handle.id))
            running = tasks.start("machine", self._bring_up(spec, handle))
            await asyncio.wait({ended, running}, return_when=asyncio.FIRST_COMPLETED)
            problem = running.exception() if running.done() else Closed("it has ended")
            if problem is None or tells_of_program(_read_end(handle)):
                return self._adopt(handle)
            raise self._explain(spec, handle, argv, problem, ended)

    async def _bring_up(self, spec: InstanceSpec, handle: Handle) -> None:
        await wait_for_api(_jail(handle) / API_SOCKET)
        api = Api(_jail(handle) / API_SOCKET)
        for method, path, body in make_requests(self._parts.plan(spec)):
            await api.call(method, path, body)
        await self._reach(handle, None)

    def _explain(
        self,
        spec: InstanceSpec,
        handle: Handle,
        argv: tuple[str, ...],
        problem: BaseException,
        ended: asyncio.Task[ExitStatus],
    ) -> EngineError:
        """Of a machine that did not come up: Firecracker's refusal, or the guest's own word, or
        what Firecracker, or the guest on its console, said last."""
        if isinstance(problem, EngineError):
            return problem
        status = ended.result() if ended.done() and not ended.exception() else ExitStatus()
        told = _read_end(handle).removeprefix("failed ")
        said = _last_words(_jail(handle) / LOG) or _last_words(spec.log)
        words = told or said or str(problem)
        text = f"{self.name} could not start {handle.id}: {words}"
        return EngineError(text, argv=argv, status=-status.signal or status.code or 1, output=words)

    def _adopt(self, handle: Handle) -> Handle:
        """With Firecracker's pid, which the jailer wrote down; as it is when there is none."""
        with suppress(FileNotFoundError, ValueError):
            pid = int((_jail(handle) / PID).read_text())
            data = handle.data | {"pid": pid, "pid_start": process.start_ticks(pid)}
            return msgspec.structs.replace(handle, data=data)
        return handle

    async def _connect(self, handle: Handle) -> guests.Guest:
        """Whoever listens inside: Firecracker hangs up while nobody does."""
        while True:
            with suppress(OSError, Closed):
                sock = await dial(_jail(handle) / VSOCK_SOCKET, AGENT_PORT)
                return await guests.greet(sock)
            await asyncio.sleep(RETRY_S)

    async def wait(self, handle: Handle) -> ExitStatus:
        status = await self._spawner.exited(handle.id)
        return parse_end(_read_end(handle), status)

    async def _control(self, handle: Handle, command: str) -> Any:
        """Pause (`stop`) and resume (`cont`); nothing when it is so already."""
        api = Api(_jail(handle) / API_SOCKET)
        state, wanted = {"stop": ("Paused", "Paused"), "cont": ("Running", "Resumed")}[command]
        if (await api.call("GET", "/"))["state"] != state:
            await api.call("PATCH", "/vm", {"state": wanted})

    async def recover(self, spec: InstanceSpec, handle: Handle) -> Handle | None:
        """One whose start was not done by then has nobody who would go on with it."""
        if not handle.data["pid"]:
            handle = self._adopt(handle)
        if not is_running(handle):
            return None
        try:
            told = await Api(_jail(handle) / API_SOCKET).call("GET", "/")
        except TabaneError:
            return None
        return None if told["state"] == "Not started" else handle


def make(spawner: Spawner, directory: Path) -> FirecrackerDriver:
    return FirecrackerDriver(spawner, directory)


async def dial(path: Path, port: int) -> socket.socket:
    """A stream to a port of the guest's, over Firecracker's socket for vsock: `CONNECT 1` is
    answered by `OK 1073741824`. Raises `OSError`, and `Closed` when nobody listens inside."""
    loop = asyncio.get_running_loop()
    sock = connect_unix(path, 0)
    try:
        await loop.sock_sendall(sock, f"CONNECT {port}\n".encode())
        line = b""
        while not line.endswith(b"\n"):
            byte = await loop.sock_recv(sock, 1)  # what follows the line is the guest's
            line += byte
            if not byte or len(line) > MOST_WORDS:
                raise Closed(f"nobody listens on port {port} in the guest")
        if not line.startswith(b"OK "):
            raise Closed(f"the guest's port {port} cannot be had: {line.decode(errors='replace')}")
    except BaseException:
        sock.close()
        raise
    return sock


def _jail(handle: Handle) -> Path:
    return jail_of(Path(str(handle.data["directory"])), handle.id)


def _read_end(handle: Handle) -> str:
    """The line that the guest wrote on its disk `end`; empty when there is none."""
    with suppress(FileNotFoundError), (_jail(handle) / "end").open("rb") as disk:
        return disk.read(MOST_WORDS).rstrip(b"\0").partition(b"\n")[0].decode(errors="replace")
    return ""


def _last_words(log: Path) -> str:
    """The last line of a log. Who writes it is not trusted: no more of it is read."""
    with suppress(OSError), log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - MOST_WORDS))
        lines = file.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""
    return ""
