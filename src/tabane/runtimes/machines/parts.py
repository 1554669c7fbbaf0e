"""What one node's machines are made of: kernel, disks, network, order, whoever runs them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from pathlib import Path

from tabane.clock import SYSTEM
from tabane.errors import EngineError, Unsupported
from tabane.guest.orders import ContainerOrder, StartOrder, encode_start, mask_of
from tabane.model import App, AppName
from tabane.runtimes import tap
from tabane.runtimes.api import (
    HUB_SOCKET,
    K2I_SOCKET,
    LEASE_SOCKET,
    Command,
    Image,
    InstanceSpec,
    Link,
)
from tabane.runtimes.bundle import Program, make_program
from tabane.runtimes.bundles import etc_files
from tabane.runtimes.cgroups import Cgroup, missing_controllers
from tabane.runtimes.machines import relays
from tabane.runtimes.machines.disks import copy_sparse, disk_of, layer_disk, make_image_disk
from tabane.runtimes.machines.ends import CUT
from tabane.runtimes.machines.ends import FILE as END_FILE
from tabane.runtimes.machines.kernel import GuestKernel, find_kernel, make_initramfs
from tabane.runtimes.machines.relays import RELAY, Places
from tabane.runtimes.machines.sizes import OVERHEAD_BYTES, memory_for
from tabane.runtimes.volumes import lend
from tabane.spec_fields import MAIN

INNER_ID = 65533
"""User and group of what runs a machine, in its app's id range: nobody's, and not its root."""
SEED_BYTES = 64
BASE_THREADS = 80
"""Of what runs a machine beside its processors: its own, and up to 64 for disks."""
MAC, GATEWAY_MAC = "mac", "gateway-mac"
FILES = ("layer", "start", MAC, GATEWAY_MAC, END_FILE, CUT)
"""In the instance's directory."""

Part = tuple[str, App, Image]
"""A container: its name, its app, and its image."""


class MachineParts:
    """Of one kind of machines, for which the guest needs these `modules`. `directory` holds what is
    common to its instances. Who runs machines says what it needs (`check`), and adds what it needs
    beside the disks (`furnish`, `tear_down`)."""

    def __init__(self, modules: tuple[str, ...], directory: Path) -> None:
        self._modules = modules
        self._directory = directory
        self._kernel: GuestKernel | None = None
        self._initramfs = directory / "none"
        self._programs: dict[AppName, tuple[int, str, Program]] = {}
        self._making = asyncio.Lock()
        """Held while a disk is made that others may want, too."""

    def check(self) -> None:
        """Raises `Unsupported` with what is missing on this machine."""
        if missing := missing_controllers():
            raise Unsupported(f"no cgroup controller {', '.join(missing)}: mount it")
        if not RELAY.exists():
            raise Unsupported(f"{RELAY} was not compiled: install gcc, then Tabane")

    def set_up(self) -> tuple[GuestKernel, Path]:
        """The guest's kernel and its initial file system. Raises `Unsupported`."""
        if self._kernel is None:
            self.check()
            kernel = find_kernel()
            self._directory.mkdir(mode=0o711, parents=True, exist_ok=True)
            self._initramfs = make_initramfs(kernel, self._modules, self._directory)
            self._kernel = kernel
        return self._kernel, self._initramfs

    async def build(self, spec: InstanceSpec) -> Program:
        """Disks, network and cgroup of an instance; its main program. What is half made when this
        fails is removed.

        Raises `Unsupported` and `UsageError` for what a machine cannot be given, `Busy` when a
        volume is in use.
        """
        self.set_up()
        if spec.link is None:
            raise Unsupported(f"{spec.app.key}: a machine needs a network link")
        parts = parts_of(spec)
        for name, app, image in parts:
            if image.kind != "linux" or image.host_usr:
                which = f"container {name}" if name != MAIN else app.key
                raise Unsupported(
                    f"{which}: a machine has a kernel of its own, so it needs an "
                    "image of its own, not this host's programs: name one"
                )
        programs = [self._program(app, image) for _, app, image in parts]
        try:
            await self._make_disks(spec, spec.link, programs)
            for storage in spec.volumes:
                await asyncio.to_thread(lend, storage.file)
            _make_cgroup(spec)
        except BaseException:
            await Cgroup(spec.cgroup).remove()
            self.tear_down(spec.directory)
            raise
        return programs[-1]

    def _program(self, app: App, image: Image) -> Program:
        known = self._programs.get(app.key)
        if known is None or known[:2] != (app.revision, image.digest):
            program = make_program(app, image, {})
            known = self._programs[app.key] = (app.revision, image.digest, program)
        return known[2]

    async def _make_disks(self, spec: InstanceSpec, link: Link, programs: list[Program]) -> None:
        async with self._making:
            for tree in trees_of(spec):
                await make_image_disk(tree)
            empty = await layer_disk(spec.app.resources.disk_bytes, self._directory)
        owner = owner_of(spec)
        made = await asyncio.to_thread(tap.make_tap, link, owner)
        (spec.directory / MAC).write_text(made.mac)
        (spec.directory / GATEWAY_MAC).write_text(made.gateway_mac)
        layer, start = spec.directory / "layer", spec.directory / "start"
        await asyncio.to_thread(copy_sparse, empty, layer)
        start.touch(mode=0o600)
        start.write_bytes(encode_start(_start_order(spec, link, programs, made)))
        for path in (layer, start):
            os.chown(path, owner, owner)
        await asyncio.to_thread(self.furnish, spec)

    def furnish(self, spec: InstanceSpec) -> None:
        """Make the rest of what is in the instance's directory."""

    def log_places(self, spec: InstanceSpec, number: int) -> Places:
        """Where the machine says what goes into a sidecar's log. They are counted from 1."""
        raise NotImplementedError

    def relay(self, spec: InstanceSpec, number: int) -> Command:
        """What writes that log."""
        return relays.make_command(spec, number, self.log_places(spec, number), owner_of(spec))

    def tear_down(self, directory: Path) -> None:
        """Remove what `build`, and the machine, made in an instance's directory. Idempotent."""
        for name in FILES:
            (directory / name).unlink(missing_ok=True)


def parts_of(spec: InstanceSpec) -> list[Part]:
    """The containers in the order of their start; the main one is the last."""
    sidecars = [(each.name, each.app, each.image) for each in spec.sidecars]
    return [*sidecars, (MAIN, spec.app, spec.image)]


def trees_of(spec: InstanceSpec) -> list[Path]:
    """Of the containers' images, each once; the main one's is the first."""
    return list(dict.fromkeys(image.tree for _, _, image in reversed(parts_of(spec))))


def disks_of(spec: InstanceSpec) -> list[Path]:
    """Those of the images, likewise."""
    return [disk_of(tree) for tree in trees_of(spec)]


def owner_of(spec: InstanceSpec) -> int:
    """The user who runs the machine, as the node has it."""
    return spec.app.id_base + INNER_ID


def services_of(spec: InstanceSpec) -> list[Path]:
    """The sockets of the node that the instance may reach."""
    if spec.services is None:
        return []
    asked = spec.app.services
    wanted = {HUB_SOCKET: bool(asked.middlecon), K2I_SOCKET: asked.k2i, LEASE_SOCKET: asked.lease}
    return [spec.services / name for name, is_wanted in wanted.items() if is_wanted]


def processors_of(app: App) -> int:
    """As many as the begun ones of what it may use."""
    return max(1, int(-(-app.resources.cpu // 1)))


async def first_line(program: str) -> str:
    """Of what a program says of its version."""
    process = await asyncio.create_subprocess_exec(
        *(program, "--version"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    words, _ = await process.communicate()
    if process.returncode:
        raise EngineError(f"{program} does not run", status=process.returncode)
    return words.decode(errors="replace").partition("\n")[0]


def _make_cgroup(spec: InstanceSpec) -> None:
    resources = spec.app.resources
    threads = BASE_THREADS + processors_of(spec.app) + len(spec.sidecars)
    Cgroup(spec.cgroup).make(
        {
            "memory_bytes": memory_for(resources.memory_bytes) + OVERHEAD_BYTES,
            "pids": threads,
            "cpu": resources.cpu,
        }
    )


def _start_order(
    spec: InstanceSpec, link: Link, programs: Iterable[Program], made: tap.Tap
) -> StartOrder:
    return StartOrder(
        containers=tuple(
            _container_order(spec, part, program)
            for part, program in zip(parts_of(spec), programs, strict=True)
        ),
        hostname=spec.hostname or spec.id,
        address=link.address,
        mac=made.mac,
        gateway=link.gateway,
        gateway_mac=made.gateway_mac,
        files=etc_files(spec, link),
        memory_bytes=spec.app.resources.memory_bytes,
        pids=spec.app.resources.pids,
        seed=os.urandom(SEED_BYTES),
        clock_ns=int(SYSTEM.wall() * 1e9),
        stop_timeout_s=spec.app.reactive.stop_timeout_s,
        services=tuple(path.name for path in services_of(spec)),
    )


def _container_order(spec: InstanceSpec, part: Part, program: Program) -> ContainerOrder:
    name, app, image = part
    seen = {volume.name for volume in app.volumes}
    return ContainerOrder(
        name=name,
        image=trees_of(spec).index(image.tree),
        args=program.args,
        env=program.env,
        workdir=program.cwd,
        user=program.user,
        capabilities=mask_of(program.capabilities),
        stop_signal=program.stop_signal,
        volumes=tuple(
            (number, storage.path)
            for number, storage in enumerate(spec.volumes)
            if storage.name in seen
        ),
    )
