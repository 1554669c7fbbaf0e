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

from tabane.errors import Closed, TabaneError
from tabane.guest import client as guests
from tabane.model import Class
from tabane.runtimes.api import Command, Enforcement, Handle, InstanceSpec, Probe, Spawner
from tabane.runtimes.firecracker.client import Api, wait_for_api, wait_for_socket
from tabane.runtimes.firecracker.enforced import ENFORCEMENTS
from tabane.runtimes.firecracker.machine import (
    AGENT_PORT,
    API_SOCKET,
    LOG,
    PID,
    PROGRAM,
    VSOCK_SOCKET,
    jail_of,
    make_requests,
)
from tabane.runtimes.firecracker.parts import FirecrackerParts
from tabane.runtimes.machines.driver import MachineDriver, directory_of, is_running
from tabane.runtimes.machines.parts import first_line
from tabane.unix import connect_unix

RETRY_S = 0.002
MOST_WORDS = 512


class FirecrackerDriver(MachineDriver):
    """See the module's text. `directory`: initial file systems and empty layers."""

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
                self._probe = Probe(True, version)
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
        await wait_for_api(_jail(handle) / API_SOCKET)
        api = Api(_jail(handle) / API_SOCKET)
        for method, path, body in make_requests(self._jails.plan(spec)):
            await api.call(method, path, body)
        await self.reach(handle)

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
        if not is_running(handle):
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
