"""The OCI configuration of an instance: pure, from what is asked to `config.json`.

What it contains is chosen to be safe first and cheap second, because the engine's work is most of
a wake (docs/decisions/oci-bundle.md has the measurements): no mount that something else does as
well, one architecture in the seccomp list, no hooks.
"""

from __future__ import annotations

import base64
import signal
from pathlib import Path
from typing import Any

import msgspec

from tabane.errors import Unsupported, UsageError
from tabane.model import App, Resources, Value
from tabane.runtimes import seccomp
from tabane.runtimes.api import (
    HUB_SOCKET,
    HUB_VARIABLE,
    K2I_SOCKET,
    K2I_VARIABLE,
    LEASE_SOCKET,
    LEASE_VARIABLE,
    SERVICES,
    Enforcement,
    Image,
    InstanceSpec,
    Link,
    User,
)
from tabane.runtimes.lookup import find_command, find_user, lead
from tabane.runtimes.volumes import MOUNTED

INIT = "/.tabane/init"
"""Debian's tini-static: it reaps orphans and passes signals on. Static, so any image will do."""
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
IDS = 65536
CPU_PERIOD_US = 100_000
MOST_OPEN_FILES = 65536

DEFAULT_CAPABILITIES = frozenset(
    {
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_FSETID",
        "CAP_KILL",
        "CAP_NET_BIND_SERVICE",
        "CAP_SETFCAP",
        "CAP_SETGID",
        "CAP_SETPCAP",
        "CAP_SETUID",
    }
)
"""The engines' usual set less CAP_MKNOD, CAP_NET_RAW, CAP_SYS_CHROOT and CAP_AUDIT_WRITE."""

OPTIONAL_CAPABILITIES = frozenset(
    {
        "CAP_AUDIT_WRITE",
        "CAP_DAC_READ_SEARCH",
        "CAP_IPC_LOCK",
        "CAP_IPC_OWNER",
        "CAP_LEASE",
        "CAP_LINUX_IMMUTABLE",
        "CAP_NET_ADMIN",
        "CAP_NET_BROADCAST",
        "CAP_NET_RAW",
        "CAP_SYS_ADMIN",
        "CAP_SYS_CHROOT",
        "CAP_SYS_NICE",
        "CAP_SYS_PTRACE",
        "CAP_SYS_RESOURCE",
        "CAP_SYS_TTY_CONFIG",
    }
)
"""What `[security] capabilities` may add. Each counts in the app's own user namespace only; the
others (CAP_SYS_MODULE, CAP_SYS_TIME, ...) mean nothing there and are refused. CAP_SYS_ADMIN lets
the instance unmount what masks `MASKED_PATHS` and makes `READONLY_PATHS` read-only: then only the
user namespace keeps it from what is there."""

MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


class Program(Value, frozen=True):
    """What runs inside: the same for all instances of an app's revision, so worked out once."""

    args: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str
    user: User
    capabilities: frozenset[str]
    stop_signal: int


class Host(Value, frozen=True):
    """What the configuration must know of the machine and the engine."""

    open_files: int
    """The hard limit found: without CAP_SYS_RESOURCE nobody may raise it."""
    limits_swap: bool
    takes_bpf: bool
    """The engine takes a compiled filter (crun), and need not compile one at each start."""


def make_program(app: App, image: Image, mounts: dict[str, Path]) -> Program:
    """What to run and as whom. `mounts` lie over the image's tree, as `{"usr": Path("/usr")}`.

    Raises `UsageError` when the image lacks the command or the user, or when a capability is
    unknown.
    """
    args = app.command or (*image.entrypoint, *image.cmd)
    if not args:
        raise UsageError("it has no command and neither has its image: give it one")
    env = dict(entry.partition("=")[::2] for entry in (f"PATH={DEFAULT_PATH}", *image.env))
    env |= app.env
    if app.services.middlecon:
        env[HUB_VARIABLE] = f"unix://{SERVICES}/{HUB_SOCKET}"
    if app.services.k2i:
        env[K2I_VARIABLE] = f"unix://{SERVICES}/{K2I_SOCKET}"
    if app.services.lease:
        env[LEASE_VARIABLE] = f"unix://{SERVICES}/{LEASE_SOCKET}"
    cwd = app.workdir or image.workdir or "/"
    if find_command(image.tree, args[0], env["PATH"], cwd, mounts) is None:
        where = "there" if "/" in args[0] else f"in {env['PATH']}"
        raise UsageError(f"its image has no program {args[0]!r} {where}")
    return Program(
        args,
        tuple(f"{name}={value}" for name, value in env.items()),
        cwd,
        find_user(image.tree, image.user),
        check_capabilities(app.security.capabilities),
        parse_signal(image.stop_signal or "TERM"),
    )


def check_capabilities(added: tuple[str, ...]) -> frozenset[str]:
    """The default set with these added. Raises `UsageError` for a name that cannot be."""
    for name in added:
        if name not in OPTIONAL_CAPABILITIES | DEFAULT_CAPABILITIES:
            known = ", ".join(sorted(OPTIONAL_CAPABILITIES))
            raise UsageError(f"capability {name!r} cannot be given to a container (only: {known})")
    return DEFAULT_CAPABILITIES | set(added)


def parse_signal(text: str) -> int:
    """The number of a stop signal: `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`. Raises `UsageError`."""
    name, _, offset = text.upper().removeprefix("SIG").partition("+")
    try:
        base = int(name) if name.isdigit() else int(signal.Signals[f"SIG{name}"])
        number = base + int(offset or 0)
    except (KeyError, ValueError):
        number = 0
    if number not in signal.valid_signals():
        raise UsageError(f"the image's stop signal {text!r} is not a signal")
    return number


def make_config(spec: InstanceSpec, program: Program, host: Host, usr: Path | None) -> bytes:
    """`config.json` for `spec`; `usr` is bound on /usr when the image is the host's."""
    if spec.link is None:
        raise Unsupported(f"{spec.app.key}: a container needs a network link, even without a port")
    config: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": _process(program, host),
        "root": {"path": str(spec.directory / "rootfs")},
        "hostname": spec.hostname or spec.id,
        "mounts": _mounts(spec, usr),
        "linux": {
            "namespaces": _namespaces(spec.link),
            "uidMappings": [_id_map(spec.app)],
            "gidMappings": [_id_map(spec.app)],
            "cgroupsPath": spec.cgroup,
            "resources": _resources(spec, host),
            "seccomp": seccomp_json(program.capabilities),
            "maskedPaths": MASKED_PATHS,
            "readonlyPaths": READONLY_PATHS,
        },
    }
    annotations = place_in_pod(spec)
    if host.takes_bpf:
        annotations["run.oci.seccomp_bpf_data"] = _bpf(program.capabilities)
    if annotations:
        config["annotations"] = annotations
    return msgspec.json.encode(config)


def place_in_pod(spec: InstanceSpec) -> dict[str, str]:
    """What a container is in its pod, in the words of Kubernetes' CRI, which engines know."""
    if spec.pod is None:
        return {}
    kind = "sandbox" if spec.id == spec.pod.leader else "container"
    return {
        "io.kubernetes.cri.container-type": kind,
        "io.kubernetes.cri.sandbox-id": spec.pod.leader,
    }


def seccomp_json(capabilities: frozenset[str]) -> msgspec.Raw:
    """The profile, encoded once: it is most of the file."""
    if capabilities not in _encoded:
        _encoded[capabilities] = msgspec.Raw(msgspec.json.encode(seccomp.profile(capabilities)))
    return _encoded[capabilities]


_encoded: dict[frozenset[str], msgspec.Raw] = {}


def _bpf(capabilities: frozenset[str]) -> str:
    return base64.b64encode(seccomp.compile_filter(capabilities)).decode()


def _process(program: Program, host: Host) -> dict[str, Any]:
    user = program.user
    capabilities = sorted(program.capabilities)
    files = min(host.open_files, MOST_OPEN_FILES)
    return {
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups},
        "args": (INIT, "--", *program.args),
        "env": program.env,
        "cwd": program.cwd,
        "noNewPrivileges": True,
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
        "rlimits": [
            {"type": "RLIMIT_NOFILE", "soft": files, "hard": files},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        ],
    }


def _namespaces(link: Link) -> list[dict[str, str]]:
    own = [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "cgroup")]
    return [
        {"type": "user", "path": link.user_namespace},
        {"type": "network", "path": link.network_namespace},
        *own,
    ]


def _id_map(app: App) -> dict[str, int]:
    return {"containerID": 0, "hostID": app.id_base, "size": IDS}


def _mounts(spec: InstanceSpec, usr: Path | None) -> list[dict[str, Any]]:
    """`/dev` is made ahead in the instance's own tmpfs (see rootfs): one bind, not a dozen mounts.

    /dev/shm is a directory of it, and POSIX queues work without /dev/mqueue. What else is bound
    goes where the image's links lead: crun follows none to what is not there.
    """
    tree = spec.image.tree
    terminals = ("newinstance", "ptmxmode=0666", "mode=0620", "gid=5")
    mounts = [
        _mount("/proc", "proc", "nosuid", "noexec", "nodev"),
        _bind("/dev", spec.layer / "dev", "nosuid", "noexec"),
        _mount("/dev/pts", "devpts", "nosuid", "noexec", *terminals),
        _mount("/sys", "sysfs", "nosuid", "noexec", "nodev", "ro"),
    ]
    if usr is not None:
        mounts.append(_bind("/usr", usr, "ro", "nosuid", "nodev"))
    volumes = (spec.directory if spec.pod is None else spec.pod.directory) / MOUNTED
    mounts += (
        _bind(lead(tree, storage.path), volumes / storage.name, "nosuid", "nodev")
        for storage in spec.volumes
    )
    if spec.services is not None:
        services = lead(tree, SERVICES)
        mounts.append(_bind(services, spec.services, "ro", "nosuid", "nodev", "noexec"))
    return mounts


def _mount(target: str, kind: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": kind, "options": options}


def _bind(target: str, source: Path, *options: str) -> dict[str, Any]:
    options = ("bind", *options)
    return {"destination": target, "type": "bind", "source": str(source), "options": options}


def make_limits(limits: Resources, *, limits_swap: bool) -> dict[str, Any]:
    """`linux.resources` for what may change while an instance runs."""
    memory = {"limit": limits.memory_bytes}
    if limits_swap:
        memory["swap"] = limits.memory_bytes
    return {
        "pids": {"limit": limits.pids},
        "memory": memory,
        "cpu": {"quota": max(1000, int(limits.cpu * CPU_PERIOD_US)), "period": CPU_PERIOD_US},
    }


def _resources(spec: InstanceSpec, host: Host) -> dict[str, Any]:
    """The limits of a pod are those of the cgroup above its containers'."""
    devices = {"devices": [{"allow": False, "access": "rwm"}]}
    if spec.pod is not None:
        return devices
    return devices | make_limits(spec.app.resources.with_layer(), limits_swap=host.limits_swap)


ENFORCEMENTS = tuple(
    Enforcement(default, True, how)
    for default, how in (
        ("no_new_privileges", "prctl(PR_SET_NO_NEW_PRIVS) by the engine, and a nosuid root"),
        (
            "capabilities",
            "bounding set: 10 defaults and what the app declares; none ambient. With CAP_SYS_ADMIN "
            "an instance can undo the masks over /proc and /sys",
        ),
        ("seccomp", "allow list of about 300 calls, native architecture only, ENOSYS otherwise"),
        ("user_namespace", "own range of 65,536 ids per app; the image is id-mapped, not chowned"),
        ("low_ports", "net.ipv4.ip_unprivileged_port_start=0 in the link's network namespace"),
        ("read_only_image", "the image is overlay's lower layer, in a read-only mount"),
        (
            "disk_quota",
            "size and inodes of the tmpfs that holds upper layer and /dev",
        ),
        ("pids", "pids.max of its cgroup"),
        (
            "memory",
            "memory limit of its cgroup, with the disk quota, which is in memory; swap included "
            "where the kernel counts it",
        ),
        ("cpu", "CFS quota of its cgroup over 100 ms"),
        ("egress", "by the node's firewall on the link; the driver joins the link's namespace"),
        ("dns", "/etc/resolv.conf names the node's resolver only; others are outside (egress)"),
        (
            "node_services",
            "by the node's firewall on the link; of the node's sockets it sees those made for it "
            "alone that its app asks for",
        ),
        ("engine", "none is there: the engine ends as soon as the program runs"),
    )
)
