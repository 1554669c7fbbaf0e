"""Classes `microvm` and `vm` with QEMU: one driver, two machines.

A start is: the disks, a tap in the place of the link's end, and a cgroup (`prepare`); then
`confine` through the spawner, which starts QEMU where it reaches nothing else and stays beside it.
How the first of its programs has ended, the guest says in a line that `confine` keeps in the file
`end`.

The node's agent talks to the agent inside over a socket of QEMU's (see `tabane.guest`), and to QEMU
itself over another. Both are in the instance's directory, and are opened again when need be.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from tabane.errors import TabaneError
from tabane.guest import client as guests
from tabane.runtimes.api import Command, Enforcement, Handle, InstanceSpec, Probe, Spawner
from tabane.runtimes.machines.driver import COMMON, directory_of, is_running
from tabane.runtimes.machines.ends import read_end
from tabane.runtimes.machines.parts import first_line
from tabane.runtimes.machines.saving import SavingDriver
from tabane.runtimes.machines.sizes import memory_for
from tabane.runtimes.process import is_same
from tabane.runtimes.qemu import qmp, saving
from tabane.runtimes.qemu.accelerator import find_accelerator
from tabane.runtimes.qemu.machine import (
    MICROVM,
    PROGRAM,
    Q35,
    Accelerator,
    Machine,
    processor_of,
)
from tabane.runtimes.qemu.parts import QemuParts


def versions_of(qemu: str, machine: Machine, accelerator: Accelerator) -> dict[str, str]:
    """All that has to be the same where a snapshot is restored. Machine and processor are
    Tabane's choice, which its next release may make otherwise."""
    _, processor = processor_of(accelerator)
    chosen = {"machine": machine.type, "processor": processor}
    return {"qemu": qemu, "accelerator": accelerator.name, **chosen}


class QemuDriver(SavingDriver):
    """See the module's text. `directory`: initial file systems and empty layers."""

    capabilities = replace(
        COMMON,
        volumes=True,
        works_emulated=True,
        checkpoint=True,
        restore=True,
        maps_checkpoints=True,
    )

    def __init__(self, machine: Machine, spawner: Spawner, directory: Path) -> None:
        self._machine = machine
        self._qemu = QemuParts(machine, directory)
        super().__init__(machine.name, machine.isolation, self._qemu, spawner)
        self._probe: Probe | None = None

    async def probe(self) -> Probe:
        """Boot the guest's kernel once for each boot of this machine (see accelerator.py)."""
        if self._probe is None:
            try:
                accelerator = await self._qemu.accelerator(find_accelerator)
                version = await first_line(PROGRAM)
                self._probe = Probe(
                    True,
                    version,
                    accelerator.emulates,
                    accelerator.reason,
                    versions_of(version.partition("version ")[2], self._machine, accelerator),
                )
                has_processor = not accelerator.emulates
                self.capabilities = replace(self.capabilities, saves_processor_state=has_processor)
            except (TabaneError, OSError) as error:
                self._probe = Probe(False, str(error))
        return self._probe

    def enforcements(self) -> tuple[Enforcement, ...]:
        from tabane.runtimes.qemu.enforced import ENFORCEMENTS

        return ENFORCEMENTS

    async def prepare(self, spec: InstanceSpec) -> Handle:
        await self._qemu.accelerator(find_accelerator)
        return await super().prepare(spec)

    async def start_machine(self, spec: InstanceSpec, handle: Handle) -> tuple[str, ...]:
        argv = self._qemu.command_line(spec)
        await self._spawner.spawn(Command(handle.id, argv, log=spec.log))
        return argv

    async def start_saved(
        self, spec: InstanceSpec, handle: Handle, directory: Path
    ) -> tuple[str, ...]:
        argv = self._qemu.command_line(spec, directory)
        await self._spawner.spawn(Command(handle.id, argv, log=spec.log))
        return argv

    async def bring_back(self, spec: InstanceSpec, handle: Handle) -> None:
        await saving.go_on(await guests.dial(_qmp(handle)))

    async def save_machine(self, handle: Handle, directory: Path) -> None:
        pid, booted = handle.data["pid"], handle.data["memory_bytes"]
        assert isinstance(pid, int) and isinstance(booted, int)
        await saving.save(_qmp(handle), pid, memory_for(booted), directory)

    async def go_on(self, handle: Handle) -> None:
        await saving.give_up(_qmp(handle))
        self._lines.of(handle).is_frozen = False

    def layer_of(self, handle: Handle) -> Path:
        return directory_of(handle) / "layer"

    @property
    def ticks_khz(self) -> int:
        return self._qemu.ticks_khz

    async def bring_up(self, spec: InstanceSpec, handle: Handle) -> None:
        await self.reach(handle)

    async def connect(
        self, handle: Handle, services: guests.Services, on_fault: guests.OnFault
    ) -> guests.Guest:
        return await guests.connect(directory_of(handle) / "agent.sock", services, on_fault)

    async def control(self, handle: Handle, command: str) -> Any:
        return await qmp.execute(_qmp(handle), command)

    async def kill_machine(self, handle: Handle) -> bool:
        """QEMU alone, if it is known: what waits beside it then still keeps the guest's word."""
        pid, ticks = handle.data["pid"], handle.data["pid_start"]
        assert isinstance(pid, int) and isinstance(ticks, int)
        with suppress(ProcessLookupError):
            if is_running(handle) and _kill(pid, ticks):
                return True
        return await super().kill_machine(handle)

    async def recover(self, spec: InstanceSpec, handle: Handle) -> Handle | None:
        if not handle.data["pid"]:
            handle = self.adopt(handle)
        if not is_running(handle) or not await self.look_after(handle):
            return None
        with suppress(TabaneError):
            status = await self.control(handle, "query-status")
            self._lines.of(handle).is_frozen = status.get("status") == "paused"
        return self.attend(handle)

    def pid_file(self, handle: Handle) -> Path:
        return directory_of(handle) / "pid"

    def read_end(self, handle: Handle) -> str:
        return read_end(directory_of(handle))


def _qmp(handle: Handle) -> Path:
    return directory_of(handle) / "qmp.sock"


def _kill(pid: int, ticks: int) -> bool:
    """The process that has `pid` and began at `ticks`. Raises `ProcessLookupError`."""
    process = os.pidfd_open(pid)
    try:
        if not is_same(pid, ticks):
            return False
        signal.pidfd_send_signal(process, signal.SIGKILL)
        return True
    finally:
        os.close(process)


def microvm(spawner: Spawner, directory: Path) -> QemuDriver:
    return QemuDriver(MICROVM, spawner, directory)


def q35(spawner: Spawner, directory: Path) -> QemuDriver:
    return QemuDriver(Q35, spawner, directory)
