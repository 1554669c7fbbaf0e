"""Whether a microVM boots here: found out by booting one.

A /dev/kvm that opens proves nothing where this machine is itself a guest. So the guest kernel is
booted to the agent's first word, in a jail as every instance's, without disks and network.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

from tabane.errors import EngineError, Unsupported
from tabane.model import new_instance_id
from tabane.runtimes import mounts
from tabane.runtimes.firecracker.client import Api, wait_for_api
from tabane.runtimes.firecracker.machine import (
    API_SOCKET,
    INITRAMFS,
    VMLINUX,
    Plan,
    jail_of,
    jailer_argv,
    trial_requests,
)
from tabane.runtimes.firecracker.parts import find_programs
from tabane.runtimes.machines.kernel import GuestKernel
from tabane.runtimes.machines.sizes import KERNEL_BYTES, memory_for
from tabane.runtimes.qemu.accelerator import GOOD_WORD, TRIAL
from tabane.runtimes.trial import ID_BASE, cgroup_of_trial, parked, place_for_trials

TIMEOUT_S = 5.0
"""A kernel that boots takes a tenth of that."""
INSTANCE = "trial"
MOST_WORDS = 16 << 10


async def try_machine(kernel: GuestKernel, initramfs: Path, directory: Path) -> None:
    """Raises `Unsupported` with the reason when none boots, `EngineError` with Firecracker's."""
    async with place_for_trials(directory) as trials, parked(ID_BASE) as link:
        place = trials / new_instance_id()
        jail = jail_of(place, INSTANCE)
        jail.mkdir(parents=True)
        for name, source in ((VMLINUX, kernel.vmlinux), (INITRAMFS, initramfs)):
            (jail / name).touch()
            mounts.bind_read_only(source, jail / name)
        os.chown(jail, ID_BASE, ID_BASE)
        argv = jailer_argv(
            *(find_programs(), INSTANCE, place),
            user=ID_BASE,
            network=link.network_namespace,
            options=(),
        )
        async with cgroup_of_trial(place) as cgroup:
            await _boot(cgroup.entering(argv), jail)


async def _boot(argv: tuple[str, ...], jail: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    said = b""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await wait_for_api(jail / API_SOCKET)
            api = Api(jail / API_SOCKET)
            for method, path, body in trial_requests(Plan(memory_for(KERNEL_BYTES), 1), TRIAL):
                await api.call(method, path, body)
            while GOOD_WORD not in said and (more := await process.stdout.read(4096)):
                said = (said + more)[-MOST_WORDS:]
    except TimeoutError:
        raise Unsupported(f"no guest boots with KVM here within {TIMEOUT_S:g} s") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)  # asyncio's own way may reap it unseen
        rest, _ = await process.communicate()
    if GOOD_WORD not in said:
        lines = (said + rest).decode(errors="replace").strip().splitlines()
        words = lines[-1] if lines else "Firecracker ended without a word"
        raise EngineError(f"no guest boots with KVM here: {words}", output=words)
