"""Saving a machine of QEMU's, and having one go on from there, by QEMU's own migration.

QEMU writes into a descriptor what its devices and processors are like. Memory is no part of that:
it is shared (`x-ignore-shared`), so it lies in a file, which is read here once the machine stands
still, without what is zero. A machine that goes on gets that file as its memory, privately
(private.c). docs/decisions/machine-snapshots.md says what else was tried.

QEMU is not to be stopped before: it saves that, too, and what goes on from there would stand still.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from contextlib import suppress
from pathlib import Path

from tabane.errors import Closed, EngineError, TimedOut, Unsupported
from tabane.runtimes.machines.saved import MEMORY, STATE
from tabane.runtimes.qemu.machine import SAVED_MEMORY_FD, SAVED_STATE_FD
from tabane.runtimes.qemu.qmp import Session

COPIER = Path(__file__).with_name("_memory")
PRIVATE = Path(__file__).with_name("_private")
"""Compiled when Tabane is installed (hatch_build.py)."""
MEMFD = "/memfd:memory-backend-memfd"
POLL_S = 0.001
STATE_S = 20.0
"""Processors and devices have less than 1 MB, and are saved in some milliseconds."""
COPY_BYTES_S = 64 << 20
"""Ten times slower than it ever was."""
UNDER_WAY = ("setup", "active", "device", "cancelling", "pre-switchover", "wait-unplug")
ADDRESS = re.compile(r"is (0x[0-9a-f]+)")


def check_helpers() -> None:
    """Raises `Unsupported`."""
    for path in (COPIER, PRIVATE):
        if not path.exists():
            raise Unsupported(f"{path} was not compiled: install gcc, then Tabane")


async def save(where: Path, pid: int, memory_bytes: int, directory: Path) -> None:
    """Write memory and state of the machine that QEMU runs as `pid`. Raises `EngineError`,
    `TimedOut`, `Closed`; it may stand still then, or not."""
    state = os.memfd_create(STATE, os.MFD_CLOEXEC)  # a disk that is full is not for QEMU to find
    try:
        found = await _save_state(where, state)
        (directory / STATE).write_bytes(os.pread(state, os.fstat(state).st_size, 0))
    finally:
        os.close(state)
    address = ADDRESS.search(str(found))
    if address is None:
        raise EngineError(f"QEMU does not tell where its memory is: {found}", output=str(found))
    await _copy_memory(pid, address[1], memory_bytes, directory / MEMORY)


async def _save_state(where: Path, state: int) -> object:
    """Returns what QEMU tells of where its memory is."""
    async with Session(where) as qemu:
        await _prepare(qemu)
        await qemu.execute("getfd", {"fdname": STATE}, state)
        await qemu.execute("migrate", {"uri": f"fd:{STATE}"})
        told = await _wait_done(qemu)
        if told["status"] != "completed":
            words = str(told.get("error-desc", told["status"]))
            raise EngineError(f"QEMU could not save its devices: {words}", output=words)
        return await qemu.execute("human-monitor-command", {"command-line": "gpa2hva 0"})


async def _prepare(qemu: Session) -> None:
    able = [{"capability": "x-ignore-shared", "state": True}]
    await qemu.execute("migrate-set-capabilities", {"capabilities": able})
    await qemu.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})


async def _wait_done(qemu: Session) -> dict[str, object]:
    """What became of the latest migration."""
    try:
        async with asyncio.timeout(STATE_S):
            while True:
                told: dict[str, object] = await qemu.execute("query-migrate")
                if told.get("status", "none") not in UNDER_WAY:
                    return told
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise TimedOut(f"QEMU did not save its devices within {STATE_S:g} s") from None


async def _copy_memory(pid: int, address: str, size_bytes: int, target: Path) -> None:
    target.touch(mode=0o600)
    argv = (str(COPIER), str(pid), address, str(size_bytes), str(_memory_of(pid)), str(target))
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(STATE_S + size_bytes / COPY_BYTES_S):
            _, said = await process.communicate()
    except TimeoutError:
        raise TimedOut(f"the memory of {pid} was not saved in time") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        words = said.decode(errors="replace").strip()
        code = process.returncode
        problem = f"the memory could not be saved: {words}"
        raise EngineError(problem, argv=argv, status=code, output=words)


def _memory_of(pid: int) -> int:
    """QEMU's descriptor of the file that is mapped as its memory. Raises `Closed`."""
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if str(link.readlink()).startswith(MEMFD):
                return int(link.name)
    except OSError as error:
        raise Closed(f"there is no QEMU any more: {error}") from None
    return SAVED_MEMORY_FD


async def give_up(where: Path) -> None:
    """Have a machine go on that was being saved, or is saved. Idempotent."""
    async with Session(where) as qemu:
        await qemu.execute("migrate_cancel")
        await _wait_done(qemu)
        await qemu.execute("cont")


async def go_on(where: socket.socket) -> None:
    """Have a machine begin where it was saved, by the state that QEMU was given. Returns when that
    is being done; QEMU ends when it fails. Raises `Closed`."""
    async with Session(where) as qemu:
        await _prepare(qemu)
        await qemu.execute("migrate-incoming", {"uri": f"fd:{SAVED_STATE_FD}"})
