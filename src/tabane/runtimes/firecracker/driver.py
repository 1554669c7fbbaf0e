"""Class `microvm` with Firecracker: the guest is QEMU's, with the same disks, kernel and agent.

A start is: the disks and the tap in the jail (`prepare`); the jailer, through the spawner, which
leaves Firecracker behind; what Firecracker must know, call after call over its socket; its start;
and the agent's word that the app's programs run. When one of them ends, the guest writes how on a
disk of one sector, and resets in the end, which ends Firecracker.

Nothing of this needs the node's agent afterwards: Firecracker's stdout, the guest's console, is
the log; its socket and the one to the agent inside are files in the jail.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from tabane.errors import Closed, TabaneError, Unsupported
from tabane.guest import client as guests
from tabane.model import Class
from tabane.runtimes.api import Command, Enforcement, Handle, InstanceSpec, Probe, Spawner
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.firecracker.client import Api, wait_for_api, wait_for_socket
from tabane.runtimes.firecracker.enforced import ENFORCEMENTS
from tabane.runtimes.firecracker.machine import (
    AGENT_PORT,
    API_SOCKET,
    LOG,
    PID,
    PROGRAM,
    SAVED,
    VSOCK_SOCKET,
    Request,
    jail_of,
    load_requests,
    make_requests,
    snapshot_request,
)
from tabane.runtimes.firecracker.parts import STATE_BYTES, FirecrackerParts
from tabane.runtimes.machines.disks import copy_sparse
from tabane.runtimes.machines.driver import COMMON, directory_of, is_running
from tabane.runtimes.machines.parts import first_line
from tabane.runtimes.machines.saved import MEMORY, STATE
from tabane.runtimes.machines.saving import SavingDriver
from tabane.runtimes.machines.sizes import OVERHEAD_BYTES, memory_for
from tabane.runtimes.threads import to_thread
from tabane.unix import connect_unix

RETRY_S = 0.002
MOST_WORDS = 512
WITH_SIDECARS = (
    "a machine of Firecracker's with several containers cannot be saved: what they say comes over "
    "connections, which a copy of it has not"
)


class FirecrackerDriver(SavingDriver):
    """See the module's text. `directory`: initial file systems and empty layers."""

    capabilities = replace(
        COMMON, checkpoint=True, restore=True, maps_checkpoints=True, saves_processor_state=True
    )

    def __init__(self, spawner: Spawner, directory: Path) -> None:
        self._jails = FirecrackerParts(directory)
        super().__init__("firecracker", Class.MICROVM, self._jails, spawner)
        self._directory = directory
        self._probe: Probe | None = None

    async def probe(self) -> Probe:
        """Boot the guest's kernel once; the answer is kept."""
        if self._probe is None:
            from tabane.runtimes.firecracker.trial import try_machine

            try:
                kernel, initramfs = self._jails.set_up()
                version = await first_line(PROGRAM)
                await try_machine(kernel, initramfs, self._directory)
                self._probe = Probe(True, version, versions={"firecracker": version})
            except (TabaneError, OSError) as error:
                self._probe = Probe(False, str(error))
        return self._probe

    def enforcements(self) -> tuple[Enforcement, ...]:
        return ENFORCEMENTS

    async def start_machine(self, spec: InstanceSpec, handle: Handle) -> tuple[str, ...]:
        await self._wait_for_relays(spec)
        argv = self._jails.command_line(spec)
        pid_file = self.pid_file(handle)
        await self._spawner.spawn(Command(handle.id, argv, log=spec.log, pid_file=pid_file))
        return argv

    async def _wait_for_relays(self, spec: InstanceSpec) -> None:
        """The guest connects to them once."""
        for number in range(1, len(spec.sidecars) + 1):
            for place in self._jails.log_places(spec, number):
                await wait_for_socket(place)

    async def bring_up(self, spec: InstanceSpec, handle: Handle) -> None:
        await self._tell(handle, make_requests(self._jails.plan(spec)))
        await self.reach(handle)

    async def _tell(self, handle: Handle, requests: list[Request]) -> None:
        await wait_for_api(_jail(handle) / API_SOCKET)
        api = Api(_jail(handle) / API_SOCKET)
        for method, path, body in requests:
            await api.call(method, path, body)

    async def checkpoint(self, handle: Handle, directory: Path, *, leave_running: bool) -> None:
        if handle.data.get("containers"):
            raise Unsupported(WITH_SIDECARS)
        await super().checkpoint(handle, directory, leave_running=leave_running)

    async def save_machine(self, handle: Handle, directory: Path) -> None:
        await self.control(handle, "stop")
        place, cgroup = _jail(handle) / SAVED, Cgroup(str(handle.data["cgroup"]))
        booted = handle.data["memory_bytes"]
        assert isinstance(booted, int)
        memory_bytes = memory_for(booted)
        cgroup.limit({"memory_bytes": 2 * memory_bytes + STATE_BYTES + OVERHEAD_BYTES})
        try:  # what Firecracker writes into memory counts as its own
            await Api(_jail(handle) / API_SOCKET).call(*snapshot_request())
            for name in (STATE, MEMORY):
                await to_thread(copy_sparse, place / name, directory / name)
        finally:
            for name in (STATE, MEMORY):
                (place / name).unlink(missing_ok=True)
            cgroup.limit({"memory_bytes": memory_bytes + OVERHEAD_BYTES})

    async def go_on(self, handle: Handle) -> None:
        await self.control(handle, "cont")
        self._lines.of(handle).is_frozen = False

    async def start_saved(
        self, spec: InstanceSpec, handle: Handle, directory: Path
    ) -> tuple[str, ...]:
        await to_thread(self._jails.show_saved, spec, directory)
        return await self.start_machine(spec, handle)

    async def bring_back(self, spec: InstanceSpec, handle: Handle) -> None:
        await self._tell(handle, load_requests(self._jails.plan(spec)))

    def layer_of(self, handle: Handle) -> Path:
        return _jail(handle) / "layer"

    @property
    def ticks_khz(self) -> int:
        return 0

    def machine_log(self, spec: InstanceSpec) -> Path:
        return jail_of(spec.directory, spec.id) / LOG

    async def connect(
        self, handle: Handle, services: guests.Services, on_fault: guests.OnFault
    ) -> guests.Guest:
        """Whoever listens inside: Firecracker hangs up while nobody does."""
        while True:
            with suppress(OSError, Closed):
                sock = await dial(_jail(handle) / VSOCK_SOCKET, AGENT_PORT)
                return await guests.greet(sock, services, on_fault)
            await asyncio.sleep(RETRY_S)

    async def control(self, handle: Handle, command: str) -> Any:
        """Nothing when it is so already."""
        api = Api(_jail(handle) / API_SOCKET)
        state, wanted = {"stop": ("Paused", "Paused"), "cont": ("Running", "Resumed")}[command]
        if (await api.call("GET", "/"))["state"] != state:
            await api.call("PATCH", "/vm", {"state": wanted})

    async def recover(self, spec: InstanceSpec, handle: Handle) -> Handle | None:
        """One whose start was not done by then has nobody who would go on with it."""
        if not handle.data["pid"]:
            handle = self.adopt(handle)
        if not is_running(handle) or not await self.look_after(handle):
            return None
        try:
            told = await Api(_jail(handle) / API_SOCKET).call("GET", "/")
        except TabaneError:
            return None
        if told["state"] == "Not started":
            return None
        self._lines.of(handle).is_frozen = told["state"] == "Paused"
        return self.attend(handle)

    def pid_file(self, handle: Handle) -> Path:
        return _jail(handle) / PID

    def read_end(self, handle: Handle) -> str:
        """From the disk that the guest writes it on."""
        with suppress(FileNotFoundError), (_jail(handle) / "end").open("rb") as disk:
            return disk.read(MOST_WORDS).rstrip(b"\0").partition(b"\n")[0].decode(errors="replace")
        return ""


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
    return jail_of(directory_of(handle), handle.id)
