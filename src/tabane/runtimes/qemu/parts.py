"""What a machine of QEMU's is made of beside what all machines are: the place that QEMU runs in."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from tabane.errors import Unsupported
from tabane.runtimes import seccomp, tap
from tabane.runtimes.api import InstanceSpec
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.machines.ends import FILE as END_FILE
from tabane.runtimes.machines.kernel import GuestKernel
from tabane.runtimes.machines.parts import (
    INNER_ID,
    MAC,
    MachineParts,
    disks_of,
    owner_of,
    processors_of,
)
from tabane.runtimes.machines.relays import Places
from tabane.runtimes.machines.saved import MEMORY, STATE
from tabane.runtimes.machines.sizes import memory_for
from tabane.runtimes.qemu.machine import (
    AGENT_FD,
    END_FD,
    INSIDE,
    LOG_FD,
    PROGRAM,
    QMP_FD,
    SAVED_MEMORY_FD,
    SAVED_STATE_FD,
    TAP_FD,
    VOLUME_FD,
    Accelerator,
    Confinement,
    Machine,
    Plan,
    make_argv,
)
from tabane.runtimes.qemu.saving import PRIVATE, check_helpers

CONFINE = Path(__file__).parents[1] / "_confine"
"""Compiled when Tabane is installed (hatch_build.py)."""
OPEN_FILES = 1024
LOADED_FROM = ("/usr", "/lib", "/lib64")
"""QEMU, its libraries and its firmware."""
FILES = ("agent.sock", "qmp.sock", "pid")
"""In the instance's directory, beside the directory `root` and the pipes of logs."""
LOGS = "log-"

FindAccelerator = Callable[[GuestKernel, Path, Confinement], Awaitable[Accelerator]]


class QemuParts(MachineParts):
    """Of one machine type."""

    def __init__(self, machine: Machine, directory: Path) -> None:
        super().__init__(machine.modules, directory)
        self._machine = machine
        self._filter = directory / "calls.bpf"
        self._accelerator: Accelerator | None = None

    def check(self) -> None:
        if os.geteuid() != 0:
            raise Unsupported("QEMU is confined by root only: run the node as root")
        if not Path(PROGRAM).exists():
            raise Unsupported(f"{PROGRAM} is not there: install qemu-system-x86")
        if not os.access(PROGRAM, os.X_OK):
            raise Unsupported(
                f"{PROGRAM} is there and cannot be executed: see its mode, or install "
                "qemu-system-x86 again"
            )
        if not CONFINE.exists():
            raise Unsupported(f"{CONFINE} was not compiled: install gcc, then Tabane")
        check_helpers()
        super().check()

    def set_up(self) -> tuple[GuestKernel, Path]:
        kernel, initramfs = super().set_up()
        if not self._filter.exists():
            self._filter.write_bytes(seccomp.compile_filter(frozenset()))
        return kernel, initramfs

    async def accelerator(self, find: FindAccelerator) -> Accelerator:
        """How processors are had here; asks `find` once."""
        if self._accelerator is None:
            kernel, initramfs = self.set_up()
            self._accelerator = await find(kernel, initramfs, self._confinement())
        return self._accelerator

    def _confinement(self) -> Confinement:
        kernel, initramfs = self.set_up()
        shows = {path: Path(path) for path in LOADED_FROM if Path(path).exists()}
        shows |= {f"{INSIDE}/vmlinux": kernel.vmlinux, f"{INSIDE}/initramfs": initramfs}
        here = self._directory
        return Confinement(CONFINE, here, "", "", INNER_ID, shows, filter=self._filter)

    def furnish(self, spec: InstanceSpec) -> None:
        (spec.directory / "root").mkdir(mode=0o711)
        for number in range(1, len(spec.sidecars) + 1):
            for place in self.log_places(spec, number):
                os.mkfifo(place, 0o600)
                os.chown(place, owner_of(spec), owner_of(spec))

    def log_places(self, spec: InstanceSpec, number: int) -> Places:
        return spec.directory / f"{LOGS}out{number}", spec.directory / f"{LOGS}err{number}"

    @property
    def is_emulated(self) -> bool:
        return self._accelerator is not None and self._accelerator.emulates

    @property
    def ticks_khz(self) -> int:
        return self._accelerator.ticks_khz if self._accelerator is not None else 0

    def command_line(self, spec: InstanceSpec, saved: Path | None = None) -> tuple[str, ...]:
        """What starts the instance's machine; `saved`: a checkpoint that it goes on from."""
        common, accelerator = self._confinement(), self._accelerator
        assert spec.link is not None and accelerator is not None
        directory, images = spec.directory, disks_of(spec)
        plan = Plan(
            memory_for(spec.app.resources.memory_bytes),
            processors_of(spec.app),
            (directory / MAC).read_text(),
            len(images),
            len(spec.volumes),
            len(spec.sidecars),
            saved is not None,
        )
        shows = {f"{INSIDE}/image{number}": disk for number, disk in enumerate(images)}
        own = {f"{INSIDE}/start": directory / "start"}
        if saved is not None:
            own[f"{INSIDE}/private"] = PRIVATE
        confinement = Confinement(
            common.confine,
            directory / "root",
            spec.link.user_namespace,
            spec.link.network_namespace,
            INNER_ID,
            common.shows | shows | own,
            {f"{INSIDE}/layer": directory / "layer"},
            () if accelerator.emulates else ("/dev/kvm",),
            (*self._options(spec, plan), *_options_of(saved)),
            common.filter,
        )
        return confinement.around(make_argv(self._machine, plan, accelerator))

    def _options(self, spec: InstanceSpec, plan: Plan) -> tuple[str, ...]:
        directory = spec.directory
        options = ["--pid", f"{directory}/pid", "--word", f"{END_FD}={directory}/{END_FILE}"]
        options += ["--listen", f"{AGENT_FD}={directory}/agent.sock"]
        options += ["--listen", f"{QMP_FD}={directory}/qmp.sock"]
        options += ["--tap", f"{TAP_FD}={tap.TAP}", "--files", str(OPEN_FILES)]
        volumes = [storage.file for storage in spec.volumes]
        for number, file in enumerate(volumes, VOLUME_FD):
            options += ["--open", f"{number}={file}"]
        numbers = range(1, len(spec.sidecars) + 1)
        logs = [place for number in numbers for place in self.log_places(spec, number)]
        for number, file in enumerate(logs, LOG_FD):
            options += ["--write", f"{number}={file}"]
        sizes = [file.stat().st_size for file in (directory / "layer", *volumes)]
        options += ["--size", str(max(plan.memory_bytes, *sizes))]  # memory is a file, too
        for place in Cgroup(spec.cgroup).own_directories():
            options += ["--cgroup", f"{place}/cgroup.procs"]
        return tuple(options)

    def tear_down(self, directory: Path) -> None:
        super().tear_down(directory)
        for path in (*(directory / name for name in FILES), *directory.glob(f"{LOGS}*")):
            path.unlink(missing_ok=True)
        if (directory / "root").exists():
            (directory / "root").rmdir()


def _options_of(saved: Path | None) -> tuple[str, ...]:
    if saved is None:
        return ()
    return (
        *("--read", f"{SAVED_MEMORY_FD}={saved / MEMORY}"),
        *("--read", f"{SAVED_STATE_FD}={saved / STATE}"),
        *("--preload", f"{INSIDE}/private"),
    )
