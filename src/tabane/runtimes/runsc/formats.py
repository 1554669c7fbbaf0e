"""What runsc is given and what it says: configuration, version, tables. All of it is pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from tabane.errors import EngineError
from tabane.model import App, ExitStatus, GuestProcess, Resources
from tabane.runtimes.api import Enforcement

OLDEST_RELEASE = 20240729
"""Earlier ones lack a platform that is fast without KVM, or options that are used."""
OVERHEAD_BYTES = 64 << 20
"""What the sandbox's own kernel and file server, and the engine while it starts them, may take of
memory beside the program: about 40 MiB as a rule."""
OVERHEAD_THREADS = 192
SIDECAR_BYTES, SIDECAR_THREADS = 24 << 20, 64
"""Of that, for each container after the first: a file server, and the engine that starts it."""
HOST_THREADS_EACH = 4
"""Threads of the node that one inside may need: it has a stub, and system calls that block."""
PLATFORMS = ("systrap", "ptrace")
"""Best first: how the program's system calls are caught."""
REFUSES = {
    name: f"cannot hold the number of processes in a sandbox with {name}: leave it out, or choose "
    "a virtual machine"
    for name in ("CAP_SYS_ADMIN", "CAP_SYS_RESOURCE")
}
"""Who has one of these is not held by a limit on the number of processes."""

KERNELS_OWN = ("/proc", "/sys", "/dev")
"""File systems of the sandbox's kernel, which nobody outside sees."""

_RELEASE = re.compile(r"\b(20\d{6})\b")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(h|ms|m|µs|us|ns|s)")
_UNITS_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "µs": 1e-6, "us": 1e-6, "ns": 1e-9}


def parse_release(words: str) -> int:
    """The date in what `runsc --version` says, as 20240729; 0 when there is none."""
    found = _RELEASE.search(words)
    return int(found[1]) if found else 0


def for_sandbox(config: bytes, app: App, *, own_tmp: str) -> bytes:
    """The `config.json` of a container, as the sandbox needs it.

    /proc, /sys and /dev are the sandbox's kernel's own, so nothing is mounted or masked there; the
    user namespace is entered before the engine starts, and the cgroup, too. `own_tmp`: a directory
    to show as /tmp, which would be in memory otherwise; empty: the image has none.
    """
    whole: dict[str, Any] = msgspec.json.decode(config)
    made_by_it = (*KERNELS_OWN, "/dev/pts")
    mounts = [mount for mount in whole["mounts"] if mount["destination"] not in made_by_it]
    if own_tmp:  # the first: a volume may be below it
        options = ("bind", "nosuid", "nodev")
        tmp = {"destination": "/tmp", "type": "bind", "source": own_tmp, "options": options}
        mounts.insert(0, tmp)
    size = f"size={app.resources.disk_bytes}"
    shared = {"destination": "/dev/shm", "type": "tmpfs", "source": "tmpfs"}
    mounts.append(shared | {"options": ("nosuid", "nodev", "mode=1777", size)})
    pids = app.resources.pids
    whole["process"]["rlimits"].append({"type": "RLIMIT_NPROC", "soft": pids, "hard": pids})
    namespaces = whole["linux"]["namespaces"]
    kept = [entry for entry in namespaces if entry["type"] not in ("user", "cgroup")]
    whole |= {"mounts": mounts, "linux": {"namespaces": kept}}
    return msgspec.json.encode(whole)


def outer_limits(limits: Resources, sidecars: int = 0) -> dict[str, float]:
    """Of the whole sandbox's cgroup, for what the programs inside may have."""
    overhead_bytes = OVERHEAD_BYTES + sidecars * SIDECAR_BYTES
    return {
        "cpu": limits.cpu,
        "memory_bytes": limits.with_layer().memory_bytes + overhead_bytes,
        "pids": limits.pids * HOST_THREADS_EACH + OVERHEAD_THREADS + sidecars * SIDECAR_THREADS,
    }


def parse_processes(table: str) -> Sequence[GuestProcess]:
    """The processes in what `runsc ps -format table` says. Raises `EngineError` for other text."""
    first, *lines = table.splitlines() or [""]
    if first.split() != ["UID", "PID", "PPID", "C", "TTY", "STIME", "TIME", "CMD"]:
        raise EngineError(f"runsc ps gave no table but {first[:200]!r}", output=table[:1000])
    return [_parse_process(line) for line in lines if line.strip()]


def _parse_process(line: str) -> GuestProcess:
    try:
        uid, pid, ppid, _, tty, _, time, *rest = line.split(maxsplit=7)
        numbers = int(pid), int(ppid), int(uid)
    except ValueError:
        raise EngineError(f"runsc ps gave no table but {line[:200]!r}", output=line) from None
    name = "".join(rest).rstrip()
    return GuestProcess(
        inside="sandbox",
        pid=numbers[0],
        ppid=numbers[1],
        name=name,
        command=name,
        uid=numbers[2],
        tty=tty,
        cpu_s=parse_duration(time),
    )


def parse_duration(text: str) -> float:
    """Seconds of Go's notation, as `1h2m3.5s` or `40ms`."""
    return sum(float(number) * _UNITS_S[unit] for number, unit in _DURATION.findall(text))


class Usage(NamedTuple):
    """What the program takes, of what the sandbox's kernel counts."""

    threads: int
    memory_bytes: int


def parse_usage(event: str) -> Usage:
    """Of what `runsc events -stats` says. Raises `EngineError` for other text."""
    try:
        data = msgspec.json.decode(event)["data"]
        return Usage(int(data["pids"]["current"]), int(data["memory"]["usage"].get("usage", 0)))
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise EngineError(f"runsc events gave no statistics: {error}", output=event) from error


def parse_wait(answer: str) -> ExitStatus:
    """How a container ended, of what `runsc wait` says. Raises `EngineError` for other text."""
    try:
        return ExitStatus(int(msgspec.json.decode(answer)["exitStatus"]))
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise EngineError(f"runsc wait gave no status: {error}", output=answer) from error


ENFORCEMENTS = tuple(
    Enforcement(default, True, how)
    for default, how in (
        ("no_new_privileges", "by the sandbox's kernel, and by the node's for the sandbox itself"),
        ("capabilities", "10 defaults and what the app declares, which its own kernel checks"),
        (
            "seccomp",
            "no call of the program reaches the node's kernel: the sandbox's answers them, under "
            "gVisor's own list of what that may call",
        ),
        (
            "user_namespace",
            "the whole engine runs in the app's own range of 65,536 ids, root of the machine in no "
            "part; the image is id-mapped, not chowned",
        ),
        ("low_ports", "the sandbox's own network stack has no reserved ports"),
        ("read_only_image", "the image is overlay's lower layer, in a read-only mount"),
        (
            "disk_quota",
            "size and inodes of the tmpfs that holds the upper layer; /dev/shm has its own, of "
            "that size; /dev, where only root inside can write, is bounded by memory",
        ),
        (
            "pids",
            "RLIMIT_NPROC for each user inside; pids.max of its cgroup bounds what all of them "
            "take of the node",
        ),
        (
            "memory",
            "memory limit of its cgroup, with the disk quota, which is in memory, and "
            f"{OVERHEAD_BYTES >> 20} MiB for the sandbox's kernel",
        ),
        (
            "cpu",
            "CFS quota of its cgroup over 100 ms, the sandbox's kernel included, from the moment "
            "that the engine has started it",
        ),
        ("egress", "by the node's firewall on the link, which the sandbox's stack has taken over"),
        ("dns", "/etc/resolv.conf names the node's resolver only; others are outside (egress)"),
        (
            "node_services",
            "by the node's firewall on the link; of the node's sockets it sees those made for it "
            "alone that its app asks for",
        ),
        (
            "engine",
            "sandbox and file server have user, mount, ipc and uts namespaces of their own, rights "
            "in these only, gVisor's lists of system calls, and in their root no file of the "
            "node's but the instance's",
        ),
    )
)
