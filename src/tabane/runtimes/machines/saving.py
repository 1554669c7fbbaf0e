"""Checkpoints of machines: what the guest's agent, and disks, have to do with them.

A checkpoint is made while the guest's programs stand still: its agent holds them by their cgroup,
then the machine is stopped and saved. So no program of a clone runs before its agent was told who
it is now: name, address, hardware address, clock, entropy, epoch. It cuts the connections that the
saved one had, writes all this down, and lets the programs go.

Files in the instance's directory tell the node's next agent what was being done when this one
ended: a dump is void, and the instance goes on (`SAVING`); a clone that does not know who it is
has no use, and ends (`RESTORING`).
"""

from __future__ import annotations

import asyncio
import os
import uuid
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from tabane.clock import SYSTEM
from tabane.errors import EngineError, TabaneError, Unsupported
from tabane.guest.frames import Kind
from tabane.guest.orders import Identity, encode_identity
from tabane.runtimes.api import Handle, InstanceSpec
from tabane.runtimes.bundles import etc_files
from tabane.runtimes.contents import write_contents
from tabane.runtimes.machines.disks import copy_sparse
from tabane.runtimes.machines.driver import MachineDriver, check_running, directory_of
from tabane.runtimes.machines.parts import GATEWAY_MAC, MAC, SEED_BYTES, owner_of
from tabane.runtimes.machines.saved import LAYER, Saved, read_saved
from tabane.runtimes.machines.sizes import memory_for
from tabane.runtimes.threads import to_thread
from tabane.supervise import Supervisor

SAVING, RESTORING = "saving", "restoring"
"""Files in the instance's directory; the first has `FROZEN` in it when it was that before."""
FROZEN = "frozen"
TICKS_SHARE = 0.01
"""By so much the counter of an emulated machine may be measured differently."""
WITH_VOLUMES = (
    "a machine that has a volume cannot be saved: its kernel has in memory what is on that disk, "
    "which goes on to change"
)


class SavingDriver(MachineDriver):
    """A `MachineDriver` with checkpoints."""

    # What differs

    @abstractmethod
    async def save_machine(self, handle: Handle, directory: Path) -> None:
        """Stop it, and write its memory and state into a directory of root's. It stands still
        then, whatever has become of it."""

    @abstractmethod
    async def go_on(self, handle: Handle) -> None:
        """Give up what `save_machine` is doing, or has done, and have the processors go on."""

    @abstractmethod
    async def start_saved(
        self, spec: InstanceSpec, handle: Handle, directory: Path
    ) -> Sequence[str]:
        """As `start_machine`, for one that goes on from there."""

    @abstractmethod
    async def bring_back(self, spec: InstanceSpec, handle: Handle) -> None:
        """Have the processors go on from where they were. Raises `Closed` when it ends."""

    @abstractmethod
    def layer_of(self, handle: Handle) -> Path:
        """The file of its disk for what is written."""

    @property
    @abstractmethod
    def ticks_khz(self) -> int:
        """As of `Saved`, here."""

    # Saving

    async def checkpoint(self, handle: Handle, directory: Path, *, leave_running: bool) -> None:
        check_running(handle)
        if handle.data.get("volumes"):
            raise Unsupported(WITH_VOLUMES)
        async with Supervisor(f"save {handle.id}", on_failure=lambda *_: None) as tasks:
            saving = tasks.start(handle.id, self._save(handle, directory, leave_running))
            try:
                await asyncio.shield(saving)
            except asyncio.CancelledError:
                await asyncio.wait([saving])
                raise

    async def _save(self, handle: Handle, directory: Path, leave_running: bool) -> None:
        was_frozen = self._lines.of(handle).is_frozen
        (directory_of(handle) / SAVING).write_text(FROZEN if was_frozen else "")
        try:
            if was_frozen:
                await self.thaw(handle)
            await (await self.running(handle)).call(Kind.HOLD)
            await self.save_machine(handle, directory)
            await to_thread(copy_sparse, self.layer_of(handle), directory / LAYER)
            booted = handle.data["memory_bytes"]
            assert isinstance(booted, int)
            contents = Saved(memory_bytes=memory_for(booted), ticks_khz=self.ticks_khz)
            write_contents(contents, directory)
        except BaseException as problem:
            await self._settle(handle)
            if isinstance(problem, OSError):
                text = f"{handle.id} could not be saved: {problem}"
                raise EngineError(text, output=str(problem)) from None
            raise
        if leave_running:
            await self._settle(handle)
        elif await self.kill_machine(handle):
            await self._spawner.exited(handle.id)

    async def _settle(self, handle: Handle) -> None:
        """Have it go on as it was before the dump."""
        mark = directory_of(handle) / SAVING
        with suppress(TabaneError):  # it has ended meanwhile, which `wait` tells
            await self.go_on(handle)
            await (await self.running(handle)).call(Kind.RELEASE)
            if mark.read_text() == FROZEN:
                await self.freeze(handle)
        mark.unlink(missing_ok=True)

    # Clones

    async def restore(self, spec: InstanceSpec, handle: Handle, directory: Path) -> Handle:
        saved = await to_thread(read_saved, directory)
        self._check(spec, saved)
        mark = spec.directory / RESTORING
        mark.touch()
        await to_thread(self._lay, spec, handle, directory)
        begin = partial(self.start_saved, spec, handle, directory)
        handle = await self.run_machine(spec, handle, begin, partial(self._wake_up, spec, handle))
        mark.unlink()
        return handle

    def _check(self, spec: InstanceSpec, saved: Saved) -> None:
        wanted = memory_for(spec.app.resources.memory_bytes)
        if saved.memory_bytes != wanted:
            raise EngineError(
                f"it has {saved.memory_bytes} bytes of memory, and is to have {wanted}"
            )
        if abs(saved.ticks_khz - self.ticks_khz) > TICKS_SHARE * saved.ticks_khz:
            raise EngineError(
                f"its kernel tells the time by a counter of {saved.ticks_khz} kHz, and this "
                f"machine's has {self.ticks_khz}: its clock would go wrong"
            )

    def _lay(self, spec: InstanceSpec, handle: Handle, directory: Path) -> None:
        """The saved layer in place of the empty one."""
        layer, owner = self.layer_of(handle), owner_of(spec)
        layer.unlink()
        copy_sparse(directory / LAYER, layer)
        os.chown(layer, owner, owner)
        layer.chmod(0o600)

    async def _wake_up(self, spec: InstanceSpec, handle: Handle) -> None:
        await self.bring_back(spec, handle)
        guest = await self.reach(handle)
        await guest.call(Kind.RELEASE, encode_identity(identity_of(spec)))

    # The next agent

    async def look_after(self, handle: Handle) -> bool:
        """Of one that runs, when it is taken over: what the agent before was doing with it is
        finished. False: it has to end."""
        if (directory_of(handle) / RESTORING).exists():
            await self.kill_machine(handle)
            return False
        if (directory_of(handle) / SAVING).exists():
            await self._settle(handle)
        return True

    async def destroy(self, handle: Handle) -> None:
        await super().destroy(handle)
        for name in (SAVING, RESTORING):
            (directory_of(handle) / name).unlink(missing_ok=True)


def identity_of(spec: InstanceSpec) -> Identity:
    """Who a clone is: one that no other is."""
    assert spec.link is not None
    return Identity(
        hostname=spec.hostname or spec.id,
        address=spec.link.address,
        mac=(spec.directory / MAC).read_text(),
        gateway=spec.link.gateway,
        gateway_mac=(spec.directory / GATEWAY_MAC).read_text(),
        files=etc_files(spec, spec.link),
        memory_bytes=spec.app.resources.memory_bytes,
        pids=spec.app.resources.pids,
        seed=os.urandom(SEED_BYTES),
        clock_ns=int(SYSTEM.wall() * 1e9),
        epoch=str(uuid.uuid4()),
    )
