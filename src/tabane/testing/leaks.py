"""Finds what a test left behind: tasks, descriptors, processes, mounts, interfaces, cgroups.

A machine is shared, so each finding must be the test's own. Descriptors and children belong to this
process. Other processes are known by `TABANE_TEST_ID`, which a test's offspring inherits
(`/proc/PID/environ`), and containers, whose environment is their image's, by mounts that lead into
the run's directory (`/proc/PID/mountinfo`). Mounts and interfaces are compared inside namespaces
that the test run made for itself (`enter_own_namespaces`). Cgroups cannot be had privately: those
that tests name themselves say whose they are (`name_cgroup`); another new one below `tabane*` is
the test's if no other test run is on this machine (`Presence`) and nobody else's process lives in
its tree; one of a node's, only if the test starts nodes and nobody else runs some here, as a node's
are there before any process is in them. Runs that `scripts/test` starts together count as one: only
one of them starts nodes.

What is still going away (a child being reaped, a transport closing) gets `SETTLE_S` to do so.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import gc
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabane.clock import SYSTEM

TEST_ID = "TABANE_TEST_ID"
PRESENCE = Path("/run/lock/tabane-tests")
SETTLE_S = 2.0
POLL_S = 0.01
LOOP_ROUNDS = 10
"""Turns of the event loop that tasks get to end by themselves."""

CGROUPS = Path("/sys/fs/cgroup")
OF_NODES = "tabane"
"""The cgroup above those of all nodes."""
OF_TESTS = "tabane-test"
SHARED_PRESENCE = "TABANE_TEST_PRESENCE"
"""The descriptor of the lock of several runs that are one."""
NETNS_DIRECTORY = "/run/netns"
"""`ip netns add` mounts it when it is first used, for good."""
CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
MS_REC, MS_PRIVATE = 0x4000, 1 << 18
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1


def enter_own_namespaces() -> str:
    """Give this process its own network and mount namespaces. Returns why not, or nothing.

    Call it early, while the process has one thread.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() != 0:
        return "they need root"
    if libc.unshare(CLONE_NEWNS | CLONE_NEWNET) != 0:
        return f"making namespaces is refused here ({os.strerror(ctypes.get_errno())})"
    if libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) != 0:
        return f"making mounts private is refused here ({os.strerror(ctypes.get_errno())})"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
    return ""


def take_shared_presence() -> int | None:
    """What `Presence` wants, if it was handed to this process; no child gets it any more."""
    if (given := os.environ.pop(SHARED_PRESENCE, None)) is None:
        return None
    os.set_inheritable(int(given), False)
    return int(given)


class Presence:
    """That a test run is on this machine: a shared lock, by which each can tell if it is alone.

    `shared`: a descriptor of the lock's file that was inherited. All who have it are as one.
    """

    def __init__(self, shared: int | None = None) -> None:
        self._file = PRESENCE.open("w") if shared is None else os.fdopen(shared, "w")
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def is_alone(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            fcntl.flock(self._file, fcntl.LOCK_SH)
        return True

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Belongings:
    """What this process, and with `machine` its namespaces and the cgroup trees, hold now."""

    descriptors: frozenset[tuple[int, str]]
    children: frozenset[int]
    processes: frozenset[int]
    mounts: frozenset[str]
    interfaces: frozenset[str]
    cgroups: frozenset[str]

    @classmethod
    def now(cls, *, machine: bool) -> Belongings:
        return cls(
            frozenset(open_descriptors()),
            frozenset(child_pids()),
            frozenset(all_pids()),
            frozenset(mount_points()) if machine else frozenset(),
            frozenset(name for _, name in socket.if_nameindex()) if machine else frozenset(),
            frozenset(tabane_cgroups()) if machine else frozenset(),
        )


def open_descriptors() -> list[tuple[int, str]]:
    """Number and target of each open descriptor."""
    found = []
    for name in names_in("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            found.append((int(name), str(Path("/proc/self/fd", name).readlink())))
    return found


def names_in(directory: str) -> list[str]:
    with os.scandir(directory) as entries:
        return [entry.name for entry in entries]


def all_pids() -> set[int]:
    return {int(name) for name in names_in("/proc") if name.isdigit()}


def child_pids() -> list[int]:
    found: list[int] = []
    for thread in names_in("/proc/self/task"):
        with suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, Path("/proc/self/task", thread, "children").read_text().split())
    return found


def mount_points() -> list[str]:
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if point != NETNS_DIRECTORY]


def name_cgroup(identity: str) -> str:
    """Of an instance that a test makes without a node."""
    return f"/{OF_TESTS}-{run_of(os.environ.get(TEST_ID, ''))}-{identity}"


def run_of(test_id: str) -> str:
    return test_id.partition("-")[0]


def tabane_cgroups() -> set[str]:
    tops = {
        path.resolve() for pattern in ("tabane*", "*/tabane*") for path in CGROUPS.glob(pattern)
    }
    found = list(map(str, tops))
    for directory in found:  # which grows meanwhile
        with suppress(FileNotFoundError), os.scandir(directory) as entries:
            found += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    return set(found)


def starter_of(pid: int) -> str:
    """The `TABANE_TEST_ID` that a process was started with; empty when there is none to be read."""
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return ""
    prefix = f"{TEST_ID}=".encode()
    found = (entry for entry in environ.split(b"\0") if entry.startswith(prefix))
    return next(found, b"").removeprefix(prefix).decode()


def uses_files_of(pid: int, directory: Path) -> bool:
    """Whether a process has mounts of its own that lead into `directory`."""
    try:
        if Path(f"/proc/{pid}/ns/mnt").readlink() == Path("/proc/self/ns/mnt").readlink():
            return False
        return f"{directory}/" in Path(f"/proc/{pid}/mountinfo").read_text()
    except OSError:
        return False


def runs_a_node(pid: int) -> bool:
    """Whether a process is one of a node's own."""
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(word.startswith(b"tabane.node.") for word in argv)


def describe(pid: int) -> str:
    try:
        argv = (
            Path(f"/proc/{pid}/cmdline")
            .read_bytes()
            .replace(b"\0", b" ")
            .decode(errors="replace")
            .strip()
        )
    except OSError:
        argv = ""
    return f"process {pid} ({argv or 'ended, but nobody waited for it'})"


class Guard:
    """Looks when it is made, and says what is new and the test's own when asked.

    While it is current, `TABANE_TEST_ID` is in the environment. `machine` also compares mounts and
    interfaces, a `presence` cgroups, with `nodes` those of nodes, too, and `files` is a directory
    of the test's: processes with mounts from it are its own. A guard of `ID` also answers for those
    of `ID-1` and so on.
    """

    def __init__(
        self,
        test_id: str,
        *,
        machine: bool,
        presence: Presence | None = None,
        nodes: bool = False,
        files: Path | None = None,
    ) -> None:
        self.test_id = test_id
        self.machine = machine
        self.presence = presence
        self.nodes = nodes
        self.files = files
        self._outer_id = os.environ.get(TEST_ID)
        os.environ[TEST_ID] = test_id
        self._before = Belongings.now(machine=machine)

    def close(self) -> list[str]:
        """What was left, as one phrase each. Processes among it are killed, children reaped."""
        if self._outer_id is None:
            os.environ.pop(TEST_ID, None)
        else:
            os.environ[TEST_ID] = self._outer_id
        found = settled(self._find)
        if found:
            self._end_processes()
        return found

    def _end_processes(self) -> None:
        children = set(child_pids()) - self._before.children
        for pid in self._own_among(all_pids()) | children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in children:
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)

    def _find(self) -> list[str]:
        before, now = self._before, Belongings.now(machine=self.machine)
        descriptors = sorted(now.descriptors - before.descriptors)
        cgroups = sorted(filter(self._owns, map(Path, now.cgroups - before.cgroups)))
        left = self._own_among(now.processes) | (now.children - before.children)
        return [
            *(f"descriptor {number} ({target})" for number, target in descriptors),
            *(describe(pid) for pid in sorted(left)),
            *(f"mount {point}" for point in sorted(now.mounts - before.mounts)),
            *(f"interface {name}" for name in sorted(now.interfaces - before.interfaces)),
            *(f"cgroup {path}" for path in cgroups),
        ]

    def _own_among(self, pids: Set[int]) -> set[int]:
        return {pid for pid in pids - self._before.processes if self._started(pid)}

    def _started(self, pid: int) -> bool:
        starter = starter_of(pid)
        if starter == self.test_id or starter.startswith(f"{self.test_id}-"):
            return True
        return self.files is not None and uses_files_of(pid, self.files)

    def _owns(self, cgroup: Path) -> bool:
        """Whether nobody else made it: no other run, nor one whose process is in its tree."""
        if self.presence is None:
            return False
        top = next(path for path in (cgroup, *cgroup.parents) if path.name.startswith("tabane"))
        if top.name.startswith(f"{OF_TESTS}-"):
            return top.name.startswith(f"{OF_TESTS}-{run_of(self.test_id)}-")
        if not self.presence.is_alone():
            return False
        if top.name == OF_NODES and (not self.nodes or self._others_run_nodes()):
            return False
        tree = top.joinpath(*cgroup.relative_to(top).parts[:1])
        try:
            files = list(tree.rglob("cgroup.procs"))
        except FileNotFoundError:
            return False  # somebody removes it just now
        for procs in files:
            with suppress(OSError):
                if not all(self._started(int(pid)) for pid in procs.read_text().split()):
                    return False
        return True

    def _others_run_nodes(self) -> bool:
        """Whether somebody does who is none of the whole run's."""
        run = run_of(self.test_id)
        return any(runs_a_node(pid) and run_of(starter_of(pid)) != run for pid in all_pids())


def settled(find: Callable[[], list[str]]) -> list[str]:
    """What `find` still finds after `SETTLE_S`; at once when it finds nothing."""
    found = find()
    if found:
        gc.collect()
    deadline = SYSTEM.now() + SETTLE_S
    while found and SYSTEM.now() < deadline:
        time.sleep(POLL_S)
        found = find()
    return found


async def leaked_tasks(before: set[asyncio.Task[Any]]) -> list[str]:
    """The tasks that were not there before and do not end within a few turns of the loop."""
    expected = before | {asyncio.current_task()}
    for _ in range(LOOP_ROUNDS):
        if not asyncio.all_tasks() - expected:
            break
        await asyncio.sleep(0)
    return sorted(f"task {task.get_name()}" for task in asyncio.all_tasks() - expected)
