"""Instances with a kernel of their own that containerd keeps: Kata Containers, and
firecracker-containerd.

What differs from containers: user and network of the spec are the guest's, so no ids are mapped and
nothing of the node is bound into it; `pid` is the shim's, below which the machine's processes are;
figures and limits go through the shim, since the node's cgroups hold the machine and not the
program. Kata plugs its machine into the link's network namespace, behind the address and hardware
address that it finds there.

The containers of a pod are in one machine, which is made with the leader and ends with it. Nothing
in there bounds all of them together, so each gets an equal part of the app's limits.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from tabane.errors import Closed, EngineError, NotFound, Unsupported
from tabane.model import Resources
from tabane.runtimes import bundle, half_open, rootfs
from tabane.runtimes.api import (
    Capabilities,
    Conversation,
    Enforcement,
    Handle,
    InstanceSpec,
    Link,
    Spawner,
    Stats,
    Transfer,
)
from tabane.runtimes.bundles import etc_files
from tabane.runtimes.cgroups import counts_swap
from tabane.runtimes.containerd.driver import PAUSED, POLL_S, ContainerdDriver, shim_of
from tabane.runtimes.containerd.messages import METRICS_URLS, RESOURCES_URL, classes, make
from tabane.runtimes.containerd.shims import FIRECRACKER, KATA, find_shims
from tabane.runtimes.containerd.talks import Task
from tabane.runtimes.ending import HANGUP_S
from tabane.runtimes.pods import ids_of
from tabane.runtimes.process import descendants
from tabane.runtimes.spawned import check_running, directory_of

KVM = Path("/dev/kvm")
INIT_TIMEOUT_S = 2.0
"""How long init may take after the shim has started it."""


class GuestDriver(ContainerdDriver):
    """See the module's text."""

    capabilities = Capabilities(
        freeze=True,
        exec=True,
        terminal=True,
        stats=True,
        network=True,
        layer_in_memory=True,
        pods=True,
        own_stack=True,
        limit=True,
        images=("linux",),
        needs_root=True,
        needs_kvm=True,
    )

    def _check(self) -> None:
        super()._check()
        if not os.access(KVM, os.R_OK | os.W_OK):
            raise Unsupported(f"there is no {KVM}: {self._shim.runtime} starts real machines only")

    def enforcements(self) -> tuple[Enforcement, ...]:
        return ENFORCEMENTS

    # Life

    async def _build(self, spec: InstanceSpec) -> dict[str, Any]:
        host = self._bundles.set_up()
        if spec.link is None:
            raise Unsupported(f"{spec.app.key}: a machine needs a network link")
        program = bundle.make_program(spec.app, spec.image, {})
        resources = share(spec.app.resources, 1 if spec.pod is None else spec.pod.count)
        limits = bundle.make_limits(resources, limits_swap=host.limits_swap)
        config = guest_config(bundle.make_config(spec, program, host, None), spec.link, limits)
        # what it sees belongs to the image's own users
        unmapped = msgspec.structs.replace(spec, app=msgspec.structs.replace(spec.app, id_base=0))
        try:
            lowers = (self._bundles.init, spec.image.tree)
            rootfs.build(unmapped, lowers, etc_files(spec, spec.link))
            (spec.directory / "config.json").write_bytes(config)
        except BaseException:
            rootfs.tear_down(spec.directory)
            raise
        return {"stop_signal": program.stop_signal, "address": spec.link.address}

    def _hand_over(self, spec: InstanceSpec) -> None:
        """Nobody but the shim goes into its directory."""
        spec.directory.chmod(0o700)

    def _task_fields(self, handle: Handle) -> dict[str, Any]:
        source = str(directory_of(handle) / "rootfs")
        return {"rootfs": [make("Mount", type="bind", source=source, options=["rbind", "rw"])]}

    def _with_pid(self, handle: Handle, told: int) -> Handle:
        """The shim's: what it tells may be a pid inside."""
        return super()._with_pid(handle, next(find_shims(self._shim.program, shim_of(handle)), 0))

    async def _wait_for_init(self, handle: Handle) -> None:
        """It takes signals before it starts the program: until there are two."""
        ask = partial(self._figures, [handle.id])
        with suppress(TimeoutError, NotFound, EngineError):
            async with asyncio.timeout(INIT_TIMEOUT_S):
                while (await self._repeat(ask)).pids < 2:  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)

    def _oom_kills(self, handle: Handle) -> int:
        return 0

    def _pod_limits(self, spec: InstanceSpec) -> dict[str, float]:
        """None: the node's cgroup holds the machine."""
        return {}

    async def freeze(self, handle: Handle) -> None:
        check_running(handle)
        await self._daemon.ensure()
        for container in ids_of(handle):
            if await self._status(container) != PAUSED:
                await self._client.call("pause", container_id=container)

    async def thaw(self, handle: Handle) -> None:
        for container in ids_of(handle):
            while handle.data["pid"] and await self._status(container) == PAUSED:
                with suppress(Closed, NotFound):  # then it is looked at again
                    await self._client.call("resume", container_id=container)

    async def _status(self, container: str) -> int:
        """Of its task; 0: there is none."""
        found = await self._find(container)
        return 0 if found is None else int(found.status)

    async def wait_listening(self, handle: Handle, port: int) -> None:
        await half_open.wait_listening(str(handle.data["address"]), port)

    # Inside

    def _tree(self, handle: Handle) -> Path:
        return directory_of(handle) / "rootfs"

    async def _end(self, handle: Handle, task: Task) -> None:
        """Nobody here sees what it started; it is told as if its terminal were closed."""
        await task.signal(signal.SIGHUP)
        with suppress(TimeoutError, NotFound):
            async with asyncio.timeout(HANGUP_S):
                await task.wait()
        await task.signal(signal.SIGKILL)

    async def copy(self, handle: Handle, transfer: Transfer) -> Conversation:
        raise Unsupported(
            f"{self.name} has no way into its guest's files but exec: use a program of the image's"
        )

    async def stats(self, handle: Handle) -> Stats:
        check_running(handle)
        return await self._figures(ids_of(handle))

    async def _figures(self, containers: Sequence[str]) -> Stats:
        """Of these together."""
        filters = [f"id=={container}" for container in containers]
        found = (await self._client.call("metrics", filters=filters)).metrics
        if not found:
            raise NotFound(f"instance {containers[0]} does not run")
        told = [parse_metrics(metric.data) for metric in found]
        return Stats(
            sum(stats.cpu_us for stats in told),
            sum(stats.memory_bytes for stats in told),
            sum(stats.pids for stats in told),
        )

    async def limit(self, handle: Handle, resources: Resources) -> None:
        check_running(handle)
        containers = ids_of(handle)
        part = share(resources, len(containers))
        value = msgspec.json.encode(bundle.make_limits(part, limits_swap=counts_swap()))
        packed = make("Any", type_url=RESOURCES_URL, value=value)
        for container in containers:
            await self._client.call("update", container_id=container, resources=packed)

    async def processes(self, handle: Handle) -> list[int]:
        """The shim, the machine monitor and their helpers."""
        shims = list(find_shims(self._shim.program, shim_of(handle)))
        return [pid for shim in shims for pid in (shim, *descendants(shim))]


class FirecrackerGuestDriver(GuestDriver):
    """firecracker-containerd: its machines get devices only through a service of its own
    (`fccontrol`), not through the calls that all shims have, so none with a network, and none with
    a disk for a second container."""

    capabilities = msgspec.structs.replace(
        GuestDriver.capabilities, network=False, own_stack=False, pods=False
    )

    async def _build(self, spec: InstanceSpec) -> dict[str, Any]:
        if spec.app.takes_sessions:
            raise Unsupported(
                f"{spec.app.key} listens on a port, and {self.name} gives its machines no network: "
                "use the driver firecracker, or qemu-microvm"
            )
        return await super()._build(spec)

    async def wait_listening(self, handle: Handle, port: int) -> None:
        raise Unsupported(f"{self.name} gives its machines no network")


def kata(spawner: Spawner, directory: Path) -> GuestDriver:
    return GuestDriver(KATA, spawner, directory)


def firecracker(spawner: Spawner, directory: Path) -> GuestDriver:
    return FirecrackerGuestDriver(FIRECRACKER, spawner, directory)


def share(resources: Resources, count: int) -> Resources:
    """An equal part for each of so many containers."""
    return msgspec.structs.replace(
        resources,
        cpu=resources.cpu / count,
        memory_bytes=resources.memory_bytes // count,
        pids=max(1, resources.pids // count),
    )


def guest_config(config: bytes, link: Link, limits: dict[str, Any]) -> bytes:
    """A container's `config.json` for a guest: without what only means something on the node (its
    ids, its /dev), and in its place what every Linux system has. `limits`: those within, where the
    layer takes no memory."""
    made: dict[str, Any] = msgspec.json.decode(config)
    linux = made["linux"]
    linux["resources"] |= limits
    del linux["uidMappings"], linux["gidMappings"]
    linux["namespaces"] = [
        {"type": "network", "path": link.network_namespace},
        *({"type": kind} for kind in ("pid", "mount", "ipc", "uts")),
    ]
    made["root"] = {"path": "rootfs"}
    made["mounts"] = MOUNTS
    return msgspec.json.encode(made)


MOUNTS = tuple(
    {"destination": target, "type": kind, "source": source, "options": options}
    for target, kind, source, options in (
        ("/proc", "proc", "proc", ("nosuid", "noexec", "nodev")),
        ("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
        (
            *("/dev/pts", "devpts", "devpts"),
            ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        ),
        ("/dev/shm", "tmpfs", "shm", ("nosuid", "noexec", "nodev", "mode=1777", "size=65536k")),
        ("/sys", "sysfs", "sysfs", ("nosuid", "noexec", "nodev", "ro")),
    )
)


def parse_metrics(data: Any) -> Stats:
    """What a shim tells of cgroups within its guest, of either version. Raises `Unsupported`."""
    kind = data.type_url.rpartition("/")[2]
    if kind not in METRICS_URLS:
        raise Unsupported(f"figures of the kind {kind} are not understood")
    found = classes()[METRICS_URLS[kind]].FromString(data.value)
    memory = found.memory
    if METRICS_URLS[kind] == "MetricsV1":
        cpu_us = found.cpu.usage.total // 1000
        used, inactive = memory.usage.usage, memory.total_inactive_file
    else:
        cpu_us, used, inactive = found.cpu.usage_usec, memory.usage, memory.inactive_file
    return Stats(cpu_us, max(0, used - inactive), found.pids.current)


ENFORCEMENTS = tuple(
    Enforcement(default, enforced, how)
    for default, enforced, how in (
        ("no_new_privileges", True, "prctl(PR_SET_NO_NEW_PRIVS) by the agent in the guest"),
        ("capabilities", True, "in the guest: 10 defaults and what the app declares"),
        ("seccomp", False, "the agent in the guest applies the profile if the shim is set up so"),
        ("user_namespace", False, "the guest's ids are its own: none of them is an id of the node"),
        ("low_ports", True, "CAP_NET_BIND_SERVICE is one of the defaults in the guest"),
        ("read_only_image", True, "the image is overlay's lower layer, in a read-only mount"),
        ("disk_quota", True, "size and inodes of the node's tmpfs with the upper layer"),
        ("pids", True, "pids.max of its cgroup in the guest"),
        ("memory", True, "limit of its cgroup in the guest; the machine itself takes more"),
        ("cpu", True, "CFS quota of its cgroup in the guest"),
        ("egress", True, "by the node's firewall on the link, which its traffic goes through"),
        ("dns", True, "/etc/resolv.conf names the node's resolver only; others are outside"),
        ("node_services", True, "by the node's firewall on the link; it is shown no socket"),
        (
            "engine",
            False,
            "containerd, the shim and the monitor that it starts are confined as they set up "
            "themselves, by a configuration that is not Tabane's",
        ),
    )
)
