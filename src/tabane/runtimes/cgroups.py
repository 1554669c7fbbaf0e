"""An instance's cgroup, read and steered through its files, in cgroup v1 and v2.

An OCI engine makes the cgroup and sets its limits (from `linux.resources`); for other engines
`make` does, and they are started inside with `entering`. Afterwards no engine is needed to freeze,
measure and remove it. `Cgroup` hides which version the machine has; a hybrid machine with
controllers on v1 counts as v1.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import shutil
import signal
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tabane.errors import Busy, Conflict, NotFound, TimedOut
from tabane.runtimes.api import Stats

ROOT = Path("/sys/fs/cgroup")
V1_CONTROLLERS = {"cpu", "cpuacct", "freezer", "memory", "pids"}
V2_CONTROLLERS = {"cpu", "memory", "pids"}
CPU_PERIOD_US = 100_000
LEAST_QUOTA_US = 1000
UNLIMITED = 1 << 62
"""Version 1 says 2**63 less a page."""
POLL_S = 0.0005
"""A v1 freezer needs about 3 ms; it has no way to tell but asking."""
POLLS_UNTIL_THAW = 200
"""What forks, or waits for what stands still, may keep a v1 freezer from getting there for ever:
then all may run for a moment before it is tried again."""
FREEZE_TIMEOUT_S = 5.0
REMOVE_TIMEOUT_S = 5.0
_ENTER = """
while [ "$1" != -- ]; do echo $$ >"$1" || exit 126; shift; done
shift
exec "$@"
"""


class MemoryUse(NamedTuple):
    """`held_bytes` come free when it ends: all but the file cache, which counts as available
    already. Of them the kernel could take `swappable_bytes` to swap, where there is some."""

    held_bytes: int
    swappable_bytes: int


class Cgroup:
    """The cgroup `path` (as `/tabane/c/n/i`) below the roots of `hierarchies`."""

    def __init__(self, path: str, hierarchies: dict[str, Path] | None = None) -> None:
        self.path = path
        self._roots = find_hierarchies() if hierarchies is None else hierarchies
        self._unified = "" in self._roots

    def _file(self, controller: str, name: str) -> Path:
        root = self._roots["" if self._unified else controller]
        return root / self.path.lstrip("/") / name

    def directories(self) -> list[Path]:
        """Where it is, in every hierarchy; some may not exist."""
        return [root / self.path.lstrip("/") for root in set(self._roots.values())]

    def make(self, limits: dict[str, float]) -> None:
        """Make it, with limits named as in `limits()`. One that is there is taken."""
        for directory in self.own_directories():
            directory.mkdir(parents=True, exist_ok=True)
        if self._unified:
            self._delegate()
        self.limit(limits)

    def entering(self, argv: tuple[str, ...]) -> tuple[str, ...]:
        """`argv` run in it, with what it leaves behind: a shell goes in and becomes the program."""
        files = (str(directory / "cgroup.procs") for directory in self.own_directories())
        return ("/bin/sh", "-c", _ENTER, "sh", *files, "--", *argv)

    def own_directories(self) -> list[Path]:
        """Where it has to be, to be measured, limited and frozen."""
        names = {""} if self._unified else V1_CONTROLLERS
        return [root / self.path.lstrip("/") for root in {self._roots[name] for name in names}]

    def _delegate(self) -> None:
        """Version 2: each one above it hands the controllers down."""
        wanted = " ".join(f"+{name}" for name in sorted(V2_CONTROLLERS))
        above = self._roots[""]
        for name in self.path.strip("/").split("/"):
            _write(above / "cgroup.subtree_control", wanted)
            above /= name

    def pids(self) -> list[int]:
        """Its processes and those below it, as this pid namespace sees them; none when the cgroup
        is gone."""
        directories = _tree(self._file("pids", "cgroup.procs").parent)
        lines = (_read(directory / "cgroup.procs").split() for directory in directories)
        return [int(pid) for pid in itertools.chain(*lines) if pid != "0"]

    def oom_kills(self) -> int:
        """How many of its processes, and of those below it, the kernel killed for want of memory.
        Version 1 counts them where they were."""
        if self._unified:
            return _field(self._file("", "memory.events"), "oom_kill")
        directories = _tree(self._file("memory", "memory.oom_control").parent)
        return sum(_field(each / "memory.oom_control", "oom_kill") for each in directories)

    def stats(self) -> Stats:
        """Memory is the working set: what is used less the file cache that can go at once."""
        if self._unified:
            cpu_us = _field(self._file("", "cpu.stat"), "usage_usec")
            used, inactive = "memory.current", "inactive_file"
        else:
            cpu_us = _number(self._file("cpuacct", "cpuacct.usage")) // 1000
            used, inactive = "memory.usage_in_bytes", "total_inactive_file"
        cache_bytes = _field(self._file("memory", "memory.stat"), inactive)
        memory_bytes = max(0, _number(self._file("memory", used)) - cache_bytes)
        pids = _number(self._file("pids", "pids.current"))
        return Stats(cpu_us, memory_bytes, pids, self.oom_kills())

    def memory_use(self) -> MemoryUse:
        """Nothing when it is gone."""
        if self._unified:
            used, prefix = "memory.current", ""
        else:
            used, prefix = "memory.usage_in_bytes", "total_"
        fields = _fields(self._file("memory", "memory.stat"))
        active, inactive = (
            [fields.get(f"{prefix}{activity}_{kind}", 0) for kind in ("file", "anon")]
            for activity in ("active", "inactive")
        )
        held = _number(self._file("memory", used)) - active[0] - inactive[0]
        return MemoryUse(max(0, held), active[1] + inactive[1])

    def limits(self) -> dict[str, float]:
        """`cpu` in whole CPUs, `memory_bytes`, `pids`; what is unlimited, or gone, is left out."""
        if self._unified:
            quota, period = (*_read(self._file("", "cpu.max")).split(), "max", "1")[:2]
            memory = "memory.max"
        else:
            quota = _read(self._file("cpu", "cpu.cfs_quota_us")).strip()
            period = _read(self._file("cpu", "cpu.cfs_period_us")).strip()
            memory = "memory.limit_in_bytes"
        found = {
            "cpu": int(quota) / int(period) if quota.isdecimal() else None,
            "memory_bytes": _limit(self._file("memory", memory)),
            "pids": _limit(self._file("pids", "pids.max")),
        }
        return {name: value for name, value in found.items() if value is not None}

    def limit(self, limits: dict[str, float]) -> None:
        """Set those named as in `limits()`. Memory comes first: only it can fail (`Conflict`, when
        so much is in use). Raises `NotFound` when the cgroup is gone."""
        setters = {
            "memory_bytes": self._limit_memory,
            "pids": lambda pids: _write(self._file("pids", "pids.max"), str(int(pids))),
            "cpu": self._limit_cpu,
        }
        try:
            for name, set_limit in setters.items():
                if name in limits:
                    set_limit(limits[name])
        except FileNotFoundError:
            raise NotFound(f"there is no cgroup {self.path} any more") from None

    def _limit_memory(self, size: float) -> None:
        """Swap counts too, where the kernel counts it: version 1 wants the sum never below."""
        used_bytes, text = self.stats().memory_bytes, str(int(size))
        if size < used_bytes:
            raise Conflict(f"{self.path} uses {used_bytes} bytes now: the kernel would kill for it")
        if self._unified:
            _write(self._file("", "memory.max"), text)
            return
        files = [
            self._file("memory", f"memory.{name}_in_bytes") for name in ("limit", "memsw.limit")
        ]
        if not files[1].exists():
            del files[1]
        if size > _number(files[0]):
            files.reverse()
        try:
            for file in files:
                _write(file, text)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise Conflict(f"{self.path} uses more than {text} bytes, which it needs") from None

    def soften(self, memory_bytes: int) -> None:
        """Have the kernel take back, or make wait, what its processes use beyond so much; it kills
        nothing for that. Raises `NotFound` when the cgroup is gone."""
        soft = "memory.high" if self._unified else "memory.soft_limit_in_bytes"
        try:
            _write(self._file("memory", soft), str(memory_bytes))
        except FileNotFoundError:
            raise NotFound(f"there is no cgroup {self.path} any more") from None

    def _limit_cpu(self, cpus: float) -> None:
        quota = max(LEAST_QUOTA_US, round(cpus * CPU_PERIOD_US))
        if self._unified:
            _write(self._file("", "cpu.max"), f"{quota} {CPU_PERIOD_US}")
        else:
            _write(self._file("cpu", "cpu.cfs_period_us"), str(CPU_PERIOD_US))
            _write(self._file("cpu", "cpu.cfs_quota_us"), str(quota))

    async def freeze(self) -> None:
        """Return when every process has stopped; on a time-out it is thawed again (`TimedOut`)."""
        try:
            async with asyncio.timeout(FREEZE_TIMEOUT_S):
                for attempt in itertools.count(1):
                    if self._ask_frozen():
                        return
                    if attempt % POLLS_UNTIL_THAW == 0 and not self._unified:
                        self.thaw()
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            self.thaw()
            problem = f"{self.path} did not freeze within {FREEZE_TIMEOUT_S:.0f} s"
            raise TimedOut(problem) from None
        except asyncio.CancelledError:
            self.thaw()
            raise

    def _ask_frozen(self) -> bool:
        if self._unified:
            _write(self._file("", "cgroup.freeze"), "1")
        else:
            _write(self._file("freezer", "freezer.state"), "FROZEN")
        return self.is_frozen()

    def is_frozen(self) -> bool:
        """False when it is gone."""
        if self._unified:
            return _field(self._file("", "cgroup.events"), "frozen") == 1
        return _read(self._file("freezer", "freezer.state")).strip() == "FROZEN"

    def thaw(self) -> None:
        """Let it run again; nothing happens when it runs or is gone."""
        name, value = ("cgroup.freeze", "0") if self._unified else ("freezer.state", "THAWED")
        try:
            _write(self._file("freezer", name), value)
        except FileNotFoundError:
            pass

    def reclaim(self) -> None:
        """Have the kernel take what it can of its memory: file pages, and others where there is
        swap. Blocking, for as long as that takes. Raises `OSError`: also when that was not all."""
        if self._unified:
            used = _number(self._file("", "memory.current"))
            _write(self._file("", "memory.reclaim"), str(used))
        else:
            _write(self._file("memory", "memory.force_empty"), "0")

    async def remove(self) -> None:
        """Kill what is in it and below, and remove it from every hierarchy. Idempotent."""
        self.thaw()
        try:
            async with asyncio.timeout(REMOVE_TIMEOUT_S):
                while not self._try_remove():  # noqa: ASYNC110 - the kernel sends no event
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise Busy(f"cgroup {self.path} is still in use: {self.pids()} do not end") from None

    def _try_remove(self) -> bool:
        for pid in self.pids():
            _kill(pid)
        _remove_imitation(self.path)
        trees = itertools.chain(*(reversed(_tree(each)) for each in self.directories()))
        removed = [_remove(directory) for directory in trees]
        return all(removed)


@cache
def find_hierarchies() -> dict[str, Path]:
    """Controller -> mount point; the only key is `""` when everything is on cgroup v2."""
    if (ROOT / "cgroup.controllers").exists():
        return {"": ROOT}
    mountinfo = Path("/proc/self/mountinfo").read_text()
    return parse_hierarchies(mountinfo, Path("/proc/self/cgroup").read_text())


def parse_hierarchies(mountinfo: str, membership: str) -> dict[str, Path]:
    """The mounted v1 hierarchies, from the text of a process's `mountinfo` and `cgroup`.

    `membership` has the names of all controllers and named hierarchies; the mount options that are
    among them tell which hierarchy it is (`cpu` and `cpuacct` may share one).
    """
    names = {name for line in membership.splitlines() for name in line.split(":")[1].split(",")}
    found: dict[str, Path] = {}
    for line in mountinfo.splitlines():
        fields, _, file_system = line.partition(" - ")
        if file_system.startswith("cgroup "):
            options = file_system.rpartition(" ")[2].split(",")
            target = Path(fields.split(" ")[4])
            found |= dict.fromkeys(names.intersection(options), target)
    return found


def missing_controllers() -> list[str]:
    """What this module needs and the machine has not (or not mounted)."""
    hierarchies = find_hierarchies()
    if "" not in hierarchies:
        return sorted(V1_CONTROLLERS - hierarchies.keys())
    return sorted(V2_CONTROLLERS - set(_read(ROOT / "cgroup.controllers").split()))


@cache
def counts_swap() -> bool:
    """Whether swap can be limited with memory; the kernel may have been started without."""
    hierarchies = find_hierarchies()
    if "" in hierarchies:
        return True
    return (hierarchies["memory"] / "memory.memsw.limit_in_bytes").exists()


def _remove_imitation(path: str) -> None:
    """crun makes plain directories where a hybrid machine's cgroup v2 would be, were it mounted."""
    imitation = ROOT / "unified" / path.lstrip("/")
    if imitation.is_dir() and imitation.stat().st_dev == ROOT.stat().st_dev:
        shutil.rmtree(imitation)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _tree(directory: Path) -> list[Path]:
    """A cgroup and all below it, each after the one it is in; empty when it is gone."""
    return [Path(place) for place, _, _ in os.walk(directory)]


def _remove(directory: Path) -> bool:
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _read(path: Path) -> str:
    """Empty when the cgroup is gone, also when it goes while being read."""
    try:
        return path.read_text()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise
        return ""


def _write(path: Path, text: str) -> None:
    """Write to a file that exists: the kernel's are not to be made."""
    file = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def _number(path: Path) -> int:
    return int(_read(path) or 0)


def _limit(path: Path) -> int | None:
    """None for `max`, for a number that means it (version 1), and when the cgroup is gone."""
    text = _read(path).strip()
    return int(text) if text.isdecimal() and int(text) < UNLIMITED else None


def _field(path: Path, name: str) -> int:
    """The value of `name` in a file of `name value` lines; 0 when there is none."""
    return _fields(path).get(name, 0)


def _fields(path: Path) -> dict[str, int]:
    """All of them; none when it is gone."""
    pairs = (line.split() for line in _read(path).splitlines())
    return {key: int(value) for key, value in pairs}
