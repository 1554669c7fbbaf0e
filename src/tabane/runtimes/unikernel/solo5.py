"""Class `unikernel`: solo5 unikernels, run by the tenders `solo5-spt` and `solo5-hvt`.

A tender is a small program that loads a unikernel and gives it just the devices that its manifest
names. `spt` confines itself with a seccomp list before the unikernel runs, which is Nabla's way;
`hvt` runs it as a guest of KVM. Both are started by the host program, confined already. The command
lines are those of the tenders' documentation and `--help`.
"""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabane.errors import EngineError, TabaneError, Unsupported, UsageError
from tabane.model import App, Value
from tabane.runtimes import half_open, seccomp
from tabane.runtimes.api import (
    Capabilities,
    Enforcement,
    Handle,
    InstanceSpec,
    Link,
    Probe,
    Spawner,
)
from tabane.runtimes.cgroups import Cgroup, missing_controllers
from tabane.runtimes.lookup import resolve
from tabane.runtimes.spawned import PID, is_running
from tabane.runtimes.tap import make_tap
from tabane.runtimes.unikernel.host import INNER_ID, Confinement, exec_argv, find_host
from tabane.runtimes.unikernel.hosted import ERRORS, REFUSES, HostedDriver, check_root
from tabane.runtimes.unikernel.manifest import Unikernel, parse_unikernel
from tabane.runtimes.unikernel.programs import LIBRARY, ask_loader
from tabane.runtimes.wishes import check_wishes

TENDER_BYTES = 16 << 20
"""Of an instance's memory, for the tender itself; the rest is the unikernel's."""
MEBIBYTE = 1 << 20
REFUSED = 1
"""How tenders exit when they do not let the unikernel run."""
START_TIMEOUT_S = 10.0
POLL_S = 0.001
TUN, KVM = Path("/dev/net/tun"), Path("/dev/kvm")
PROGRAM, DISKS = "/unikernel", "/disks"
UNTRIED = "no unikernel was started to try it"
KERNEL_SIDE = "anon_inode:kvm-vcpu"


class Attached(Value, frozen=True):
    """What a unikernel is given: of each kind, NAME -> what it is on the host's side."""

    nets: dict[str, str]
    macs: dict[str, str]
    blocks: dict[str, str]


class Solo5Driver(HostedDriver):
    """One tender: `target` is `spt` or `hvt`."""

    def __init__(self, target: str, spawner: Spawner, directory: Path) -> None:
        super().__init__(spawner, directory)
        self.name = f"solo5-{target}"
        self._target = target
        self.capabilities = Capabilities(
            freeze=True,
            stats=True,
            network=True,
            own_stack=True,
            images=("solo5",),
            refuses=REFUSES,
            needs_root=True,
            needs_kvm=target == "hvt",
            works_emulated=target == "spt",
        )
        self._probe: Probe | None = None
        self._tender = ""
        self._binds: tuple[str, ...] = ()

    # What it can do here

    async def probe(self) -> Probe:
        """Find the tender and ask its version, no more: there is no unikernel at hand that every
        tender would run. The answer is kept."""
        if self._probe is None:
            try:
                check_root()
                self._set_up()
                self._probe = await self._ask_version()
            except (TabaneError, OSError) as error:
                self._probe = Probe(False, str(error))
        return self._probe

    async def _ask_version(self) -> Probe:
        pipe, both = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
        tender = await asyncio.create_subprocess_exec(
            self._tender, "--version", stdout=pipe, stderr=both
        )
        output, _ = await tender.communicate()
        words = output.decode(errors="replace").partition("\n")[0]
        if tender.returncode:
            return Probe(False, f"{self._tender} --version fails: {words}")
        return Probe(True, f"{words}; {UNTRIED}")

    def enforcements(self) -> tuple[Enforcement, ...]:
        return enforcements_of(self._target)

    def _set_up(self) -> None:
        if self._tender:
            return
        path = shutil.which(self.name)
        if path is None:
            raise Unsupported(
                f"{self.name} is not installed: build solo5 and put its tender on the PATH"
            )
        find_host()
        for device in self._devices():
            if not device.exists():
                raise Unsupported(f"{device} is missing")
        if missing := missing_controllers():
            raise Unsupported(f"no cgroup controller {', '.join(missing)}: mount it")
        self._make_root()
        (self._directory / "tender.bpf").write_bytes(seccomp.compile_filter(frozenset()))
        told = ask_loader(Path(path))
        self._binds = (f"{path}:/tender", *(f"{one}:{one}" for one in LIBRARY.findall(told)))
        self._tender = path

    def _devices(self) -> Sequence[Path]:
        return (TUN, KVM) if self._target == "hvt" else (TUN,)

    # Life

    async def prepare(self, spec: InstanceSpec) -> Handle:
        self._set_up()
        if spec.link is None:
            raise Unsupported(f"{spec.app.key}: a unikernel needs a network link")
        check_wishes(spec.app, self.name, self.capabilities.refuses)
        unikernel = parse_unikernel(await asyncio.to_thread(find_unikernel(spec).read_bytes))
        check_unikernel(unikernel, self._target, spec.app)
        handle = self._make_handle(spec, address=spec.link.address)
        try:
            make_disks(spec, unikernel)
        except BaseException:
            await self.destroy(handle)
            raise
        return handle

    async def start(self, spec: InstanceSpec, handle: Handle) -> Handle:
        self._set_up()
        assert spec.link is not None
        path = find_unikernel(spec)
        unikernel = parse_unikernel(await asyncio.to_thread(path.read_bytes))
        attached = await asyncio.to_thread(attach, spec, spec.link, unikernel)
        argv = tender_argv("/tender", spec, attached)
        disks = (f"{disk_of(spec, name)}:{inside}:rw" for name, inside in attached.blocks.items())
        devices = (f"{device}:{device}" for device in self._devices())
        confinement = Confinement(
            root=self._directory / "root",
            filter=self._directory / "tender.bpf",
            link=spec.link,
            cgroups=tuple(Cgroup(spec.cgroup).own_directories()),
            binds=(*self._binds, f"{path}:{PROGRAM}", *disks, *devices),
            pid_file=spec.directory / PID,
            errors=spec.directory / ERRORS,
        )
        started = exec_argv(confinement, argv)
        handle = await self._launch(spec, handle, started, spec.directory / PID)
        await self._wait_running(spec, handle, argv)
        return handle

    async def _wait_running(
        self, spec: InstanceSpec, handle: Handle, argv: tuple[str, ...]
    ) -> None:
        """Return when the tender has let the unikernel run, which it does after it has refused all
        that is wrong. Raises `EngineError` with its last words."""
        pid = handle.data["pid"]
        assert isinstance(pid, int)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while is_running(handle) and not runs(pid, self._target):  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            problem = f"{self.name} did not start {handle.id} in {START_TIMEOUT_S:.0f} s"
            raise EngineError(problem, argv=argv) from None
        if is_running(handle):
            return
        status = await self._spawner.exited(handle.id)
        if status.code == REFUSED:
            words = _last_line(spec.log) or status.describe()
            problem = f"{self.name} could not start {handle.id}: {words}"
            raise EngineError(problem, argv=argv, status=status.code, output=words)

    async def wait_listening(self, handle: Handle, port: int) -> None:
        await half_open.wait_listening(str(handle.data["address"]), port)

    async def destroy(self, handle: Handle) -> None:
        await super().destroy(handle)
        shutil.rmtree(Path(str(handle.data["directory"])) / "disks", ignore_errors=True)


def spt(spawner: Spawner, directory: Path) -> Solo5Driver:
    return Solo5Driver("spt", spawner, directory)


def hvt(spawner: Spawner, directory: Path) -> Solo5Driver:
    return Solo5Driver("hvt", spawner, directory)


def find_unikernel(spec: InstanceSpec) -> Path:
    entrypoint = spec.image.entrypoint
    path = resolve(spec.image.tree, entrypoint[0]) if entrypoint else None
    if path is None or not path.is_file():
        raise UsageError(f"its image has no file {entrypoint[0] if entrypoint else ''}")
    return path


def check_unikernel(unikernel: Unikernel, target: str, app: App) -> None:
    """Raises `UsageError` with what does not fit."""
    if unikernel.target != target:
        raise UsageError(
            f"it is built for solo5's {unikernel.target}, this is {target}: build it anew, or name "
            f"driver solo5-{unikernel.target}"
        )
    if unikernel.machine != platform.machine():
        raise UsageError(f"it is for {unikernel.machine}, this machine is {platform.machine()}")
    nets = [device.name for device in unikernel.devices if device.kind == "net"]
    if len(nets) > 1:
        raise UsageError(f"its manifest has networks {', '.join(nets)}: an instance has one")
    if app.takes_sessions and not nets:
        raise UsageError("its app has a port, but its manifest has no network")
    if guest_mebibytes(app) < 1:
        raise UsageError(
            f"memory must be more than {TENDER_BYTES >> 20} MiB, which its tender needs: raise it"
        )


def guest_mebibytes(app: App) -> int:
    return (app.resources.memory_bytes - TENDER_BYTES) // MEBIBYTE


def disk_of(spec: InstanceSpec, name: str) -> Path:
    return spec.directory / "disks" / name


def make_disks(spec: InstanceSpec, unikernel: Unikernel) -> None:
    """A file of zeros for each block device, which go with the instance; together as large as its
    disk may be. They take room when they are written."""
    names = [device.name for device in unikernel.devices if device.kind == "block"]
    owner = spec.app.id_base + INNER_ID
    if not names:
        return
    (spec.directory / "disks").mkdir(mode=0o711)
    for name in names:
        with disk_of(spec, name).open("xb") as file:
            file.truncate(spec.app.resources.disk_bytes // len(names) // 512 * 512)
            os.fchown(file.fileno(), owner, owner)
            os.fchmod(file.fileno(), 0o600)


def attach(spec: InstanceSpec, link: Link, unikernel: Unikernel) -> Attached:
    """Make the tap, if there is a network, and say what each device is. Blocks."""
    nets = [device.name for device in unikernel.devices if device.kind == "net"]
    blocks = [device.name for device in unikernel.devices if device.kind == "block"]
    disks = {name: f"{DISKS}/{name}" for name in blocks}
    if not nets:
        return Attached({}, {}, disks)
    tap = make_tap(link, spec.app.id_base + INNER_ID)
    return Attached({nets[0]: tap.name}, {nets[0]: tap.mac}, disks)


def tender_argv(tender: str, spec: InstanceSpec, attached: Attached) -> tuple[str, ...]:
    """The tender's command line. In the unikernel's own arguments `{address}` and `{gateway}` mean
    the instance's and its node's, since a unikernel learns them in no other way."""
    app, image, link = spec.app, spec.image, spec.link
    assert link is not None
    own = app.command or (*image.entrypoint[1:], *image.cmd)
    known = {"{address}": link.address, "{gateway}": link.gateway}
    return (
        tender,
        f"--mem={guest_mebibytes(app)}",
        *(f"--net:{name}={tap}" for name, tap in attached.nets.items()),
        *(f"--net-mac:{name}={mac}" for name, mac in attached.macs.items()),
        *(f"--block:{name}={path}" for name, path in attached.blocks.items()),
        *("--", PROGRAM),
        *(_fill_in(word, known) for word in own),
    )


def _fill_in(word: str, known: dict[str, Any]) -> str:
    for name, value in known.items():
        word = word.replace(name, value)
    return word


def runs(pid: int, target: str) -> bool:
    """Whether a tender has let its unikernel run: `spt` has laid its own seccomp list over that of
    its host, `hvt` has a processor of KVM's. False when it has ended."""
    try:
        if target == "spt":
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            return int(fields.get("Seccomp_filters", "0")) > 1
        links = [path.readlink() for path in Path(f"/proc/{pid}/fd").iterdir()]
        return any(str(link).startswith(KERNEL_SIDE) for link in links)
    except OSError:
        return False


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return lines[-1] if lines else ""


def enforcements_of(target: str) -> tuple[Enforcement, ...]:
    """The table of one tender."""
    if target == "spt":
        listed = "its own list before the unikernel runs (about 7 calls, fewer by its devices)"
    else:
        listed = "the unikernel makes none: it is a guest of KVM"
    return tuple(
        Enforcement(default, True, how)
        for default, how in (
            ("no_new_privileges", "prctl(PR_SET_NO_NEW_PRIVS) by the host that starts the tender"),
            ("capabilities", "none at all, also not in the bounding set"),
            ("seccomp", f"the tender: a container's allow list; {listed}"),
            (
                "user_namespace",
                "the link's: own ids per app; its tender is not root in it",
            ),
            ("low_ports", "it has a network stack of its own"),
            ("read_only_image", "the file is bound read-only into the tender's tree"),
            ("disk_quota", "its block devices are files of that size together"),
            ("pids", "pids.max of its cgroup, and the unikernel can start nothing"),
            ("memory", "of the guest: --mem; of all: its cgroup's limit"),
            ("cpu", "CFS quota of its cgroup over 100 ms"),
            ("egress", "by the node's firewall: its tap is bridged to the link"),
            ("dns", "it asks whom it was built to; others than the node are outside (egress)"),
            ("node_services", "by the node's firewall on the link"),
            (
                "engine",
                "the tender has user, mount, ipc and uts namespaces of its own, and in its root "
                "the unikernel, its block devices and the tender's own files only",
            ),
        )
    )
