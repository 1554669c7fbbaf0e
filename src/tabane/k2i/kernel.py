"""What the kernel is asked to do to one process, so that no other is hit.

A pidfd belongs to one process for ever, but can only be opened by pid. So it is opened first, and
then the start time of whoever has the pid is compared. If that is the one that is meant, then
either the pidfd is its too, or it belongs to a process that had the pid before and is gone: then
a signal through it reaches nobody. Nobody else can be hit.

Nice values, affinity and limits have no form that takes a pidfd. They are set by pid, between the
same check and another one: a process whose pidfd says that it still lives had its pid all the time.
If it has ended meanwhile, whoever has its pid now may have been hit, and that is said (`Conflict`).
The same goes for each of its threads, by start time.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from tabane.errors import Busy, Conflict, Denied, NotFound, TabaneError, Unsupported, UsageError
from tabane.k2i.orders import RESOURCES
from tabane.k2i.permission import Pair, Seen, is_above
from tabane.k2i.procfs import GONE, KERNEL_THREAD, Stat, parse_cgroup, parse_stat, parse_status
from tabane.k2i.table import instance_of

_PERMITTED = re.compile(rb"^CapPrm:\s*([0-9a-f]+)$", re.MULTILINE)
THREAD_ROUNDS = 16
"""New threads inherit from those that start them, so a second look hardly ever finds any."""


class Surroundings(Protocol):
    """What k2i itself cannot know of a process."""

    def owner(self, instance: str) -> int:
        """uid of who deployed the app of an instance; -1 for an unknown one."""

    def protects(self, pid: int, ppid: int, instance: str) -> str:
        """What the process is when the node cannot do without it, else nothing."""

    def on_signal(self, pid: int, number: int) -> None:
        """By an order the process is sent a signal now. Called from any thread."""


class Alone:
    """Outside of a cluster."""

    def owner(self, instance: str) -> int:
        return -1

    def protects(self, pid: int, ppid: int, instance: str) -> str:
        return "the k2i that was asked" if pid == os.getpid() else ""

    def on_signal(self, pid: int, number: int) -> None:
        """Nobody else has to know."""


class Held(NamedTuple):
    """A process held by its pidfd."""

    pid: int
    fd: int

    @property
    def has_ended(self) -> bool:
        """A zombie has."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(0))


@contextmanager
def hold(pid: int) -> Iterator[Held]:
    """Raises `NotFound` when nobody has the pid, `UsageError` when a thread has it."""
    try:
        fd = os.pidfd_open(pid)
    except OSError as error:
        raise _explain_open(pid, error) from None
    try:
        yield Held(pid, fd)
    finally:
        os.close(fd)


def _explain_open(pid: int, error: OSError) -> TabaneError:
    if error.errno in (errno.EINVAL, errno.ENOENT) and (leader := _leader(pid)) not in (0, pid):
        return UsageError(f"{pid} is a thread of process {leader}: name that")
    if error.errno in (errno.ESRCH, errno.EINVAL, errno.ENOENT):
        return NotFound(f"process {pid} is gone")
    kind = Busy if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM) else Unsupported
    return kind(f"process {pid} cannot be held by a pidfd now: {error.strerror}")


def _leader(tid: int) -> int:
    """The pid of the process that a thread belongs to; 0 when it is gone."""
    try:
        return int(parse_status(Path(f"/proc/{tid}/status").read_bytes())[b"Tgid"])
    except GONE:
        return 0


def instance_at(pid: int) -> str:
    """The instance that a process belongs to; empty outside of instances, and when it is gone."""
    try:
        return instance_of(parse_cgroup(Path(f"/proc/{pid}/cgroup").read_bytes()))
    except GONE:
        return ""


def look(held: Held, surroundings: Surroundings) -> Seen:
    """The process that has the pid now. Raises `NotFound`."""
    pid = held.pid
    try:
        stat = parse_stat(Path(f"/proc/{pid}/stat").read_bytes())
        lines = Path(f"/proc/{pid}/status").read_bytes()
        cgroup = parse_cgroup(Path(f"/proc/{pid}/cgroup").read_bytes())
    except GONE:
        raise NotFound(f"process {pid} is gone, or is not shown to this k2i") from None
    status, capabilities = parse_status(lines), _PERMITTED.search(lines)
    instance = instance_of(cgroup)
    return Seen(
        pid=pid,
        start_ticks=stat.starttime,
        name=stat.comm,
        state=stat.state,
        ppid=stat.ppid,
        nice=stat.nice,
        uids=_ids(status[b"Uid"]),
        gids=_ids(status[b"Gid"]),
        has_capabilities=capabilities is not None and int(capabilities[1], 16) != 0,
        owner=surroundings.owner(instance) if instance else -1,
        protected=describe_kernels(stat) or surroundings.protects(pid, stat.ppid, instance),
    )


def _ids(line: bytes) -> tuple[int, int, int]:
    real, effective, saved = map(int, line.split()[:3])
    return real, effective, saved


def describe_kernels(stat: Stat) -> str:
    """What the kernel itself made; nothing for all else."""
    if stat.flags & KERNEL_THREAD:
        return "a kernel thread"
    return "the first process of its node" if stat.pid == 1 else ""


def check_delivered(pid: int, name: str, number: int) -> None:
    """Raises `Unsupported` for a signal that the kernel drops without a word: nobody can kill or
    stop the first process of the pid namespace that we are in (pid_namespaces(7))."""
    if pid == 1 and number in (signal.SIGKILL, signal.SIGSTOP):
        what = signal.Signals(number).name
        who = f"1 ({name!r}) is the first process of its node"
        raise Unsupported(
            f"{who}, and the kernel delivers no {what} to it from within: signal it from outside"
        )


def send_signal(held: Held, number: int) -> None:
    """Raises `NotFound`, `Denied`."""
    with translated(held.pid):
        signal.pidfd_send_signal(held.fd, number)


def nice_of(held: Held) -> int:
    """Of its first thread."""
    with translated(held.pid):
        return os.getpriority(os.PRIO_PROCESS, held.pid)


def set_nice(held: Held, choose: Callable[[int], int]) -> None:
    """Of all threads; `choose` says the new value for an old one, and may refuse."""

    def apply(tid: int) -> None:
        nice = os.getpriority(os.PRIO_PROCESS, tid)
        os.setpriority(os.PRIO_PROCESS, tid, choose(nice))

    for_all_threads(held, apply)


def online_cpus() -> frozenset[int]:
    """Those that threads can run on."""
    return parse_cpus(Path("/sys/devices/system/cpu/online").read_text())


def parse_cpus(text: str) -> frozenset[int]:
    """`0-3,8` as the kernel writes it."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def cpus_of(held: Held) -> list[int]:
    """Those that its first thread may run on."""
    with translated(held.pid):
        return sorted(os.sched_getaffinity(held.pid))


def set_affinity(held: Held, cpus: frozenset[int]) -> None:
    """Of all threads."""
    for_all_threads(held, lambda tid: os.sched_setaffinity(tid, cpus))


def limits_of(held: Held, names: list[str]) -> dict[str, Pair]:
    with translated(held.pid):
        return {name: resource.prlimit(held.pid, RESOURCES[name]) for name in names}


def set_limits(held: Held, names: list[str], choose: Callable[[str, Pair], Pair]) -> None:
    """All or none: `choose` says the new soft and hard limit for an old one, and may refuse. Those
    whose hard limit is raised come first: only they can fail, and they can be lowered again."""
    before = limits_of(held, names)
    wanted = {name: choose(name, limit) for name, limit in before.items()}
    done: list[str] = []
    with translated(held.pid):
        try:
            for name in sorted(
                names, key=lambda name: not is_above(wanted[name][1], before[name][1])
            ):
                resource.prlimit(held.pid, RESOURCES[name], wanted[name])
                done.append(name)
        except (OSError, ValueError):
            for name in done:
                resource.prlimit(held.pid, RESOURCES[name], before[name])
            raise
    check_after(held)


def for_all_threads(held: Held, apply: Callable[[int], None]) -> None:
    """Do it to each thread, those too that start meanwhile. Raises `Conflict` when a thread or the
    process ended just then and its id went to somebody else, `NotFound` when it only ended."""
    done: set[int] = set()
    for _ in range(THREAD_ROUNDS):
        new = [tid for tid in _threads(held.pid) if tid not in done]
        if not new:
            break
        for tid in new:
            _do_to_thread(held, tid, apply)
        done.update(new)
    check_after(held)
    if not done:
        raise NotFound(f"process {held.pid} does not show its threads to this k2i")


def _threads(pid: int) -> list[int]:
    try:
        return [int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()]
    except GONE:
        return []


def _do_to_thread(held: Held, tid: int, apply: Callable[[int], None]) -> None:
    before = _start_of(held.pid, tid)
    if held.has_ended:
        raise NotFound(f"process {held.pid} ended meanwhile")
    if not before:
        return
    try:
        with translated(held.pid):
            apply(tid)
    except NotFound:
        return  # this thread has ended; whether all have is looked at in the end
    if _start_of(held.pid, tid) != before and (leader := _leader(tid)) not in (0, held.pid):
        raise _conflict(tid, leader)


def _start_of(pid: int, tid: int) -> int:
    """0 when the process has no such thread."""
    try:
        return parse_stat(Path(f"/proc/{pid}/task/{tid}/stat").read_bytes()).starttime
    except GONE:
        return 0


def check_after(held: Held) -> None:
    """Whether what was done by pid was done to this process. Raises `Conflict`, `NotFound`."""
    if not held.has_ended:
        return
    pid = held.pid
    try:
        signal.pidfd_send_signal(held.fd, 0)
    except PermissionError:
        pass  # it is still there to be asked for
    except ProcessLookupError:
        if leader := _leader(pid):
            raise _conflict(pid, leader) from None
    raise NotFound(f"process {pid} ended meanwhile")


def _conflict(tid: int, leader: int) -> Conflict:
    whose = f"process {leader}" if leader == tid else f"a thread of process {leader}"
    problem = f"{tid} ended meanwhile, and its number was given to {whose}"
    return Conflict(f"{problem}, which may have been changed instead: look at it")


@contextmanager
def translated(pid: int) -> Iterator[None]:
    """The kernel's refusals as ours."""
    try:
        yield
    except ProcessLookupError:
        raise NotFound(f"process {pid} is gone") from None
    except PermissionError as error:
        reason = error.strerror
        raise Denied(f"the kernel does not let k2i do that to process {pid}: {reason}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"the kernel takes no such change of process {pid}: {error}") from None
