"""What one node's machines are made of: kernel, disks, network, the place QEMU runs in."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from tabane.clock import SYSTEM
from tabane.errors import EngineError, Unsupported
from tabane.guest.orders import StartOrder, encode_start, mask_of
from tabane.model import AppName
from tabane.runtimes import seccomp, tap
from tabane.runtimes.api import InstanceSpec, Link
from tabane.runtimes.bundle import Program, make_program
from tabane.runtimes.bundles import etc_files
from tabane.runtimes.cgroups import Cgroup, missing_controllers
from tabane.runtimes.qemu.disks import copy_sparse, disk_of, layer_disk, make_image_disk
from tabane.runtimes.qemu.ends import FILE as END_FILE
from tabane.runtimes.qemu.kernel import GuestKernel, find_kernel, make_initramfs
from tabane.runtimes.qemu.machine import (
    AGENT_FD,
    BASE_THREADS,
    END_FD,
    INSIDE,
    OVERHEAD_BYTES,
    PROGRAM,
    QMP_FD,
    TAP_FD,
    VOLUME_FD,
    Accelerator,
    Confinement,
    Machine,
    Plan,
    make_argv,
    memory_for,
)
from tabane.runtimes.volumes import lend

CONFINE = Path(__file__).parents[1] / "_confine"
"""Compiled when Tabane is installed (hatch_build.py)."""
INNER_ID = 65533
"""User and group of every QEMU, in its app's id range: nobody's, and not its root."""
SEED_BYTES = 64
OPEN_FILES = 1024
LOADED_FROM = ("/usr", "/lib", "/lib64")
"""QEMU, its libraries and its firmware."""
FILES = ("layer", "start", "agent.sock", "qmp.sock", "pid", END_FILE)
"""In the instance's directory, beside the directory `root`."""

FindAccelerator = Callable[[GuestKernel, Path, Confinement], Awaitable[Accelerator]]


class Parts:
    """Of one machine type. `directory` holds what is common to its instances."""

    def __init__(self, machine: Machine, directory: Path) -> None:
        self._machine = machine
        self._directory = directory
        self._kernel: GuestKernel | None = None
        self._initramfs = directory / "none"
        self._filter = directory / "calls.bpf"
        self._accelerator: Accelerator | None = None
        self._programs: dict[AppName, tuple[int, str, Program]] = {}
        self._macs: dict[str, str] = {}
        self._making = asyncio.Lock()
        """Held while a disk is made that others may want, too."""

    def _set_up(self) -> GuestKernel:
        """Raises `Unsupported` when the machine lacks something."""
        if self._kernel is None:
            if os.geteuid() != 0:
                raise Unsupported("QEMU is confined by root only: run the node as root")
            if not Path(PROGRAM).exists():
                raise Unsupported(f"{PROGRAM} is not there: install qemu-system-x86")
            if not CONFINE.exists():
                raise Unsupported(f"{CONFINE} was not compiled: install gcc, then Tabane")
            if missing := missing_controllers():
                raise Unsupported(f"no cgroup controller {', '.join(missing)}: mount it")
            kernel = find_kernel()
            self._directory.mkdir(mode=0o711, parents=True, exist_ok=True)
            self._initramfs = make_initramfs(kernel, self._machine.modules, self._directory)
            self._filter.write_bytes(seccomp.compile_filter(frozenset()))
            self._kernel = kernel
        return self._kernel

    async def accelerator(self, find: FindAccelerator) -> Accelerator:
        """How processors are had here; asks `find` once."""
        if self._accelerator is None:
            kernel = self._set_up()
            self._accelerator = await find(kernel, self._initramfs, self._confinement(kernel))
        return self._accelerator

    def _confinement(self, kernel: GuestKernel) -> Confinement:
        shows = {path: Path(path) for path in LOADED_FROM if Path(path).exists()}
        shows |= {f"{INSIDE}/vmlinux": kernel.vmlinux, f"{INSIDE}/initramfs": self._initramfs}
        nowhere = Path("/nonexistent")
        return Confinement(CONFINE, nowhere, "", "", INNER_ID, shows, filter=self._filter)

    async def version(self) -> str:
        """The first line of what QEMU says of its version."""
        process = await asyncio.create_subprocess_exec(
            PROGRAM, "--version", stdout=asyncio.subprocess.PIPE
        )
        words, _ = await process.communicate()
        if process.returncode:
            raise EngineError(f"{PROGRAM} does not run", status=process.returncode)
        return words.decode(errors="replace").partition("\n")[0]

    async def build(self, spec: InstanceSpec) -> Program:
        """Disks, network and cgroup of an instance. What is half made when this fails is removed.

        Raises `Unsupported` and `UsageError` for what a machine cannot be given, `Busy` when a
        volume is in use.
        """
        self._set_up()
        if spec.link is None:
            raise Unsupported(f"{spec.app.key}: a machine needs a network link")
        if spec.image.kind != "linux" or spec.image.host_usr:
            raise Unsupported(
                f"{spec.app.key}: a machine has a kernel of its own, so it needs an "
                "image of its own, not this host's programs: name one"
            )
        program = self._program(spec)
        try:
            await self._make_disks(spec, spec.link, program)
            for storage in spec.volumes:
                await asyncio.to_thread(lend, storage.file)
            _make_cgroup(spec)
        except BaseException:
            await Cgroup(spec.cgroup).remove()
            self.tear_down(spec.directory)
            raise
        return program

    def _program(self, spec: InstanceSpec) -> Program:
        app = spec.app
        known = self._programs.get(app.key)
        if known is None or known[:2] != (app.revision, spec.image.digest):
            program = make_program(app, spec.image, {})
            known = self._programs[app.key] = (app.revision, spec.image.digest, program)
        return known[2]

    async def _make_disks(self, spec: InstanceSpec, link: Link, program: Program) -> None:
        async with self._making:
            await make_image_disk(spec.image.tree)
            empty = await layer_disk(spec.app.resources.disk_bytes, self._directory)
        owner = spec.app.id_base + INNER_ID
        made = await asyncio.to_thread(tap.make_tap, link, owner)
        (spec.directory / "mac").write_text(made.mac)
        layer, start = spec.directory / "layer", spec.directory / "start"
        await asyncio.to_thread(copy_sparse, empty, layer)
        start.touch(mode=0o600)
        start.write_bytes(encode_start(_start_order(spec, link, program, made)))
        for path in (layer, start):
            os.chown(path, owner, owner)
        (spec.directory / "root").mkdir(mode=0o711)

    def command_line(self, spec: InstanceSpec) -> tuple[str, ...]:
        """What starts the instance's machine."""
        kernel, accelerator = self._set_up(), self._accelerator
        assert spec.link is not None and accelerator is not None
        directory, common = spec.directory, self._confinement(kernel)
        resources = spec.app.resources
        memory, processors = memory_for(resources.memory_bytes), max(1, -(-resources.cpu // 1))
        mac = (directory / "mac").read_text()
        plan = Plan(memory, int(processors), mac, len(spec.volumes))
        options = ["--pid", f"{directory}/pid", "--word", f"{END_FD}={directory}/{END_FILE}"]
        options += ["--listen", f"{AGENT_FD}={directory}/agent.sock"]
        options += ["--listen", f"{QMP_FD}={directory}/qmp.sock"]
        options += ["--tap", f"{TAP_FD}={tap.TAP}", "--files", str(OPEN_FILES)]
        volumes = [storage.file for storage in spec.volumes]
        for number, file in enumerate(volumes, VOLUME_FD):
            options += ["--open", f"{number}={file}"]
        sizes = [file.stat().st_size for file in (directory / "layer", *volumes)]
        options += ["--size", str(max(memory, *sizes))]  # memory is a file, too
        for place in Cgroup(spec.cgroup).own_directories():
            options += ["--cgroup", f"{place}/cgroup.procs"]
        confinement = Confinement(
            common.confine,
            directory / "root",
            spec.link.user_namespace,
            spec.link.network_namespace,
            INNER_ID,
            common.shows
            | {f"{INSIDE}/image": disk_of(spec.image.tree)}
            | {f"{INSIDE}/start": directory / "start"},
            {f"{INSIDE}/layer": directory / "layer"},
            () if accelerator.emulates else ("/dev/kvm",),
            tuple(options),
            common.filter,
        )
        return confinement.around(make_argv(self._machine, plan, accelerator))

    def tear_down(self, directory: Path) -> None:
        """Remove what `build`, and the machine, made in an instance's directory. Idempotent."""
        for name in (*FILES, "mac"):
            (directory / name).unlink(missing_ok=True)
        if (directory / "root").exists():
            (directory / "root").rmdir()


def _make_cgroup(spec: InstanceSpec) -> None:
    resources = spec.app.resources
    Cgroup(spec.cgroup).make(
        {
            "memory_bytes": memory_for(resources.memory_bytes) + OVERHEAD_BYTES,
            "pids": BASE_THREADS + int(-(-resources.cpu // 1)),
            "cpu": resources.cpu,
        }
    )


def _start_order(spec: InstanceSpec, link: Link, program: Program, made: tap.Tap) -> StartOrder:
    return StartOrder(
        args=program.args,
        env=program.env,
        workdir=program.cwd,
        user=program.user,
        capabilities=mask_of(program.capabilities),
        hostname=spec.hostname or spec.id,
        address=link.address,
        gateway=link.gateway,
        gateway_mac=made.gateway_mac,
        files=etc_files(spec, link),
        memory_bytes=spec.app.resources.memory_bytes,
        pids=spec.app.resources.pids,
        seed=os.urandom(SEED_BYTES),
        clock_ns=int(SYSTEM.wall() * 1e9),
        volumes=tuple(storage.path for storage in spec.volumes),
    )
