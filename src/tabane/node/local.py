"""Nodes of a local cluster: processes with network, pid and mount namespaces of their own.

A node starts in three steps that wait for each other through pipes, so nothing is guessed: the
first process enters its namespaces, mounts its own /proc and /sys, and says its pid; the starter
gives the network namespace its uplink; then the first process becomes the node's program. It is
nobody's child but the machine's init's, and so outlives the command that started it.

All functions block, for some milliseconds (`stop_node`: until the node has ended).
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from tabane.errors import EngineError
from tabane.model import Value
from tabane.network.processes import end_process
from tabane.network.uplink import ClusterNetwork, attach_node, detach_node
from tabane.node.cgroups import (
    find_hierarchies,
    make_cgroups,
    remove_cgroups,
    thaw_cgroups,
)
from tabane.runtimes.process import handles, is_running, start_ticks

HERE = Path("/mnt")
"""Where a node sees its own directory. Instances have users of their own, who may not be let
through to it otherwise: /root, where a cluster of root's is by default, is closed to all others."""

_TOOLS = {
    "bash": "bash",
    "unshare": "util-linux",
    "setsid": "util-linux",
    "mount": "mount",
    "nft": "nftables",
}
_LAST_WORDS_BYTES = 2000


class NodeSpec(Value, frozen=True):
    """What to start as the first process of a node."""

    name: str
    number: int
    """1 to 253, unique in the cluster: its address follows from it."""
    argv: tuple[str, ...]
    log: Path
    """Gets what it writes to stdout and stderr."""
    cgroup: str
    """Path of the node's cgroups below each hierarchy's root, as `/tabane/CLUSTER/NODE`."""
    env: dict[str, str] | None = None
    """Instead of the starter's own."""
    directory: Path | None = None
    """The node's files; the node sees them at `HERE`, too."""


class NodeProcess(Value, frozen=True):
    """A node that was started: enough to stop it, and to remove what it leaves behind."""

    name: str
    number: int
    pid: int
    """Of its first process, as the machine sees it."""
    start_ticks: int
    cgroup: str

    @property
    def runs(self) -> bool:
        return is_running(self.pid, self.start_ticks)


def missing() -> list[str]:
    """What this machine lacks for a local cluster: a sentence each, none when it has all."""
    lacks = []
    if os.geteuid() != 0:
        lacks.append("local nodes need root, for namespaces and network interfaces: use sudo")
    lacks += [
        f"the program {tool} is not installed: install {package}"
        for tool, package in _TOOLS.items()
        if shutil.which(tool) is None
    ]
    lacks += [
        f"the kernel has no {kind} namespaces (no /proc/self/ns/{kind})"
        for kind in ("net", "pid", "mnt", "user")
        if not Path("/proc/self/ns", kind).exists()
    ]
    limit = Path("/proc/sys/user/max_user_namespaces")
    if limit.exists() and limit.read_text().strip() == "0":
        lacks.append(f"user namespaces are switched off: set {limit} to 10000 or more")
    if not any(find_hierarchies()):
        lacks.append("no cgroup hierarchy is mounted: mount cgroup2 on /sys/fs/cgroup")
    return lacks


def start_node(
    network: ClusterNetwork,
    spec: NodeSpec,
    *,
    remember: Callable[[NodeProcess], None] = lambda node: None,
) -> NodeProcess:
    """Start a node; return when its program is about to run, its uplink up.

    `remember` is called just before its program runs: a node ends by itself when its starter dies
    earlier, so none runs that was not remembered. Raises `EngineError` with the log's last words;
    nothing is left of it then.
    """
    entry = _enter(spec)
    assert entry.stdin is not None
    assert entry.stdout is not None
    with entry.stdin as go, entry.stdout as said:
        entry.wait()  # it forks into the node and ends
        pid = int(said.readline() or 0)
        ticks = start_ticks(pid) if pid else 0
        if not ticks:
            words = spec.log.read_text(errors="replace")[-_LAST_WORDS_BYTES:].strip()
            raise EngineError(f"node {spec.name} cannot enter its namespaces: {words}")
        node = NodeProcess(spec.name, spec.number, pid, ticks, spec.cgroup)
        try:
            make_cgroups(spec.cgroup)
            attach_node(network, spec.number, pid)
            remember(node)
        except BaseException:
            stop_node(network, node, timeout_s=0)
            raise
        go.write(b"go\n")
    return node


def ask_to_end(node: NodeProcess) -> None:
    """TERM to the node's first process, so that it ends while others are waited for."""
    if node.runs:
        with suppress(ProcessLookupError):
            os.kill(node.pid, signal.SIGTERM)


def stop_node(network: ClusterNetwork, node: NodeProcess, *, timeout_s: float = 20.0) -> None:
    """TERM to the node's first process, `timeout_s`, then KILL; then remove all it leaves behind.

    With its first process the kernel ends all others of the node and drops their namespaces and
    mounts. One that has no handler of TERM yet would never get it (pid_namespaces(7)) and has
    started nothing: it is killed at once. Idempotent; works from the values alone, also after a
    crash.
    """
    if not handles(node.pid, signal.SIGTERM):
        timeout_s = 0
    end_process(
        node.pid,
        node.start_ticks,
        term_timeout_s=timeout_s,
        meanwhile=lambda: thaw_cgroups(node.cgroup),
    )
    detach_node(network, node.number)
    remove_cgroups(node.cgroup)


def _enter(spec: NodeSpec) -> subprocess.Popen[bytes]:
    found = find_hierarchies()
    script = entry_script(found.v2 if found.is_hybrid else (), spec.directory)
    enter = ("unshare", "--pid", "--mount", "--net", "--", "setsid", "--fork")
    argv = (*enter, "sh", "-ec", script, "tabane-node", *spec.argv)
    pipe = subprocess.PIPE
    try:
        with spec.log.open("ab") as log:
            return subprocess.Popen(
                argv, stdin=pipe, stdout=pipe, stderr=log, env=spec.env, cwd="/"
            )
    except OSError as error:
        raise EngineError(f"node {spec.name} cannot start: {error}", argv=argv) from error


def _own_directory(directory: Path) -> tuple[str, ...]:
    """The node's files at `HERE`; what need not outlive the node (`run`) in memory."""
    return (
        f"mount --bind {shlex.quote(str(directory))} {HERE}",
        f"mount -t tmpfs -o mode=0755 tabane-run {HERE}/run",
    )


def entry_script(unmount: Iterable[Path], directory: Path | None = None) -> str:
    """What the first process does before it becomes the node's program.

    It takes its pid from the machine's /proc before it mounts its own. The mounted cgroups move
    onto the fresh /sys by way of the working directory, since their path is covered then. `unmount`
    are empty version 2 hierarchies, which confuse engines (crun) that find them.
    """
    lines = [
        "read -r pid rest </proc/self/stat",
        *(f"umount {shlex.quote(str(path))}" for path in unmount),
        *(_own_directory(directory) if directory is not None else ()),
        "cd /sys/fs/cgroup",
        "mount -t proc proc /proc",
        "mount -t sysfs sysfs /sys",
        "mount --no-canonicalize --move /proc/self/cwd /sys/fs/cgroup",
        "cd /",
        'echo "$pid"',
        "read -r go",
        'exec "$@" </dev/null >&2',
    ]
    return "\n".join(lines)
