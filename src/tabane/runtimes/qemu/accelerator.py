"""Whether this machine's processor can be lent to guests: found out by booting one.

A /dev/kvm that opens proves nothing: where this machine is itself a guest, it may take the first
ordinary kernel down or stand still. So the guest kernel is booted to the agent's first word, with
KVM and for a few seconds; where that fails it is booted once by emulation. What came out holds for
as long as the machine is up, and is kept where all its nodes find it, so that it is done once.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec

from tabane.errors import TabaneError, Unsupported
from tabane.model import Value, new_instance_id
from tabane.runtimes.machines.kernel import AGENT, GuestKernel
from tabane.runtimes.machines.sizes import KERNEL_BYTES, memory_for
from tabane.runtimes.qemu.machine import (
    MICROVM,
    Accelerator,
    Confinement,
    Plan,
    bare_argv,
    kernel_options,
)
from tabane.runtimes.trial import ID_BASE, cgroup_of_trial, parked, place_for_trials

KVM = Path("/dev/kvm")
KVM_S = 3.0
"""A kernel that boots takes a tenth of that."""
TCG_S = 60.0
GOOD_WORD = b"tabane: this machine runs"
TRIAL = "tabane.trial"
MAX_WORDS = 16 << 10
LOCK_POLL_S = 0.05
KEPT = Path("/run/tabane")
"""Gone with the machine's boot."""


class Verdict(Value, frozen=True):
    """What was found out, and of which kernel of the machine and of guests."""

    boot: str
    release: str
    accelerator: Accelerator


async def find_accelerator(
    kernel: GuestKernel, initramfs: Path, confinement: Confinement, kept: Path = KEPT
) -> Accelerator:
    """The kept verdict, or a new one, which takes seconds. Raises `Unsupported` when nothing runs.
    `confinement` is what QEMU gets; namespaces are made for it, and roots below its own."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    file = kept / "accelerator.json"
    async with place_for_trials(confinement.root) as place, _locked(kept):
        with suppress(FileNotFoundError, msgspec.DecodeError):
            verdict = msgspec.json.decode(file.read_bytes(), type=Verdict)
            if (verdict.boot, verdict.release) == (boot, kernel.release):
                return verdict.accelerator
        found = await _find(confinement, place)
        fresh = file.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(Verdict(boot, kernel.release, found)))
        fresh.replace(file)
        return found


@asynccontextmanager
async def _locked(directory: Path) -> AsyncIterator[None]:
    """One of all nodes on the machine at a time."""
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    lock = os.open(directory / "accelerator.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not _try_lock(lock):  # noqa: ASYNC110 - a thread that waits could not be given up
            await asyncio.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(lock)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def _find(confinement: Confinement, place: Path) -> Accelerator:
    problem = await _why_not(Accelerator("kvm", ""), confinement, place, KVM_S)
    if problem is None:
        return Accelerator("kvm", "with KVM")
    emulated = Accelerator("tcg", f"emulated, as {problem}", await _ticks_khz())
    if (failure := await _why_not(emulated, confinement, place, TCG_S)) is not None:
        raise Unsupported(f"QEMU boots no guest: {failure} (and with KVM: {problem})")
    return emulated


async def _ticks_khz() -> int:
    process = await asyncio.create_subprocess_exec(str(AGENT), stdout=asyncio.subprocess.PIPE)
    words, _ = await process.communicate()
    return int(words)


async def _why_not(
    accelerator: Accelerator, confinement: Confinement, place: Path, timeout_s: float
) -> str | None:
    """Boot a machine; why it did not get to the agent, None when it did."""
    if not accelerator.emulates and not os.access(KVM, os.R_OK | os.W_OK):
        return f"there is no {KVM}" if not KVM.exists() else f"{KVM} cannot be opened"
    plan = Plan(memory_for(KERNEL_BYTES), 1)
    argv = bare_argv(MICROVM, plan, accelerator, kernel_options(accelerator, TRIAL))
    devices = () if accelerator.emulates else (str(KVM),)
    root = place / new_instance_id()
    root.mkdir()
    try:
        async with parked(ID_BASE) as link, cgroup_of_trial(root) as cgroup:
            confined = msgspec.structs.replace(
                confinement,
                root=root,
                user_namespace=link.user_namespace,
                network_namespace=link.network_namespace,
                devices=devices,
            )
            return await _boot(cgroup.entering(confined.around(argv)), timeout_s)
    except (TabaneError, OSError) as error:
        return str(error)


async def _boot(argv: tuple[str, ...], timeout_s: float) -> str | None:
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    said = b""
    try:
        async with asyncio.timeout(timeout_s):
            while GOOD_WORD not in said and (more := await process.stderr.read(4096)):
                said = (said + more)[-MAX_WORDS:]
    except TimeoutError:
        return f"a guest did not boot within {timeout_s:g} s"
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)  # asyncio's own way may reap it unseen
        await process.communicate()
    if GOOD_WORD in said:
        return None
    lines = said.decode(errors="replace").strip().splitlines()
    return f"a guest did not boot: {lines[-1] if lines else 'it said nothing'}"
