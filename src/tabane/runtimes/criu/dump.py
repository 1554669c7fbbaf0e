"""Dumping a container that runs, with all that a copy of it needs, into a directory.

The container stands still (its cgroup is frozen) from before the first look until the layer is
copied, so that memory and files are of one moment. CRIU, a child of the spawner, thaws it for
itself and freezes it again; when it fails, or is killed, nothing is changed but that.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tabane.clock import read_kernel_clocks_ns
from tabane.errors import Busy, Conflict, EngineError, Unsupported
from tabane.runtimes import inside
from tabane.runtimes.api import Command, Finished, Handle, Spawner
from tabane.runtimes.contents import write_contents
from tabane.runtimes.criu import engine, images, saved, tree
from tabane.runtimes.criu.engine import Criu
from tabane.runtimes.threads import to_thread
from tabane.runtimes.volumes import MOUNTED

TIMEOUT_S = 60.0
"""A dump writes all of an instance's memory, which stands still meanwhile."""
VFORK = ("kernel_clone", "_do_fork")
"""Where in the kernel (of now, before 5.10) such a process waits."""
WORK = "dump"
"""For CRIU's log, in the instance's directory."""


def key_of(identity: str) -> str:
    """In the spawner's books."""
    return f"{identity}.dump"


async def wait_finished(spawner: Spawner, key: str) -> Finished:
    """Wait for a dump's end, which is brought about after `TIMEOUT_S`: to kill CRIU may harm what
    it has stopped."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await spawner.finished(key)
    except TimeoutError:
        await spawner.signal(key, signal.SIGKILL)
        return await spawner.finished(key)


def find_vfork(pids: Iterable[int]) -> int | None:
    """The first process that stands still where it waits for its child to execute a program
    (vfork(2)): it would not stop for CRIU before that, and the child has stopped."""
    for pid in pids:
        for place in Path(f"/proc/{pid}/task").glob("*/wchan"):
            with suppress(OSError):
                if place.read_text().strip("0") in VFORK:
                    return pid
    return None


class Dump:
    """One container's. `state`: what its engine remembers of it."""

    def __init__(self, criu: Criu, spawner: Spawner, handle: Handle, state: Path) -> None:
        self._criu = criu
        self._spawner = spawner
        self._handle = handle
        self._state = state
        self._directory = Path(str(handle.data["directory"]))
        self._pid = int(str(handle.data["pid"]))

    async def into(self, target: Path, freezer: Path) -> None:
        """Raises `Unsupported` or `Conflict` for what cannot be copied, ever or now, `Busy` when
        the next try may succeed, and `EngineError` when it fails; `target` then has what nobody
        can use."""
        self._check()
        mounts = tree.parse_mounts(self._read("mountinfo"))
        record = self._describe(mounts)
        packing = to_thread(saved.pack, Path(str(self._handle.data["layer"])), target)
        dumping = self._run(target, freezer, self._external(record))
        problems = await asyncio.gather(packing, dumping, return_exceptions=True)
        for problem in problems:
            if isinstance(problem, BaseException):
                raise problem
        images.stay(target)
        images.forget_unread(target, record.outputs)
        saved.save_state(self._state, target)
        write_contents(record, target)

    def _read(self, name: str) -> str:
        return Path(f"/proc/{self._pid}/{name}").read_text()

    def _check(self) -> None:
        identity, volumes = self._handle.id, self._directory / MOUNTED
        if "link_pid" not in self._handle.data:
            raise Unsupported(f"{identity} was started by a Tabane that made no checkpoints")
        if volumes.is_dir() and any(volumes.iterdir()):
            raise Unsupported(
                f"{identity} has volumes, whose files would not fit the memory of a copy"
            )
        if any(True for _ in inside.left_behind(self._directory)):
            raise Conflict(f"{identity} cannot be checkpointed while commands run inside")
        if bound := tree.find_bound(self._read("net/tcp"), self._read("net/udp")):
            raise Unsupported(
                f"{identity} has a socket at {bound}, which is its own address, and a copy has "
                "another: have its program listen on 0.0.0.0"
            )

    def _describe(self, mounts: list[tree.Mount]) -> saved.Saved:
        offsets, data = self._read("timens_offsets"), self._handle.data
        external = tree.find_external(mounts)
        monotonic_ns, boottime_ns = read_kernel_clocks_ns()
        return saved.Saved(
            engine=self._handle.driver,
            external=external,
            files=tuple(point for point in external if tree.is_file(point, mounts)),
            outputs=(self._output(1), self._output(2)),
            monotonic_ns=monotonic_ns + tree.parse_offset_ns(offsets, "monotonic"),
            boottime_ns=boottime_ns + tree.parse_offset_ns(offsets, "boottime"),
            names=saved.Names(
                self._handle.id,
                str(self._directory),
                str(data["cgroup"]),
                int(str(data["link_pid"])),
            ),
            sizes={},
        )

    def _output(self, number: int) -> str:
        """What CRIU calls a stream: a pipe's number, or where a file is."""
        link = Path(f"/proc/{self._pid}/fd/{number}")
        target = str(link.readlink())
        if target.startswith("pipe:"):
            return target
        info = dict(
            line.split(":\t", 1)
            for line in self._read(f"fdinfo/{number}").splitlines()
            if ":\t" in line
        )
        return f"file[{int(info['mnt_id']):x}:{link.stat().st_ino:x}]"

    def _external(self, record: saved.Saved) -> list[str]:
        network = Path(f"/proc/{self._pid}/ns/net").stat().st_ino
        files = sorted({name for name in record.outputs if name.startswith("file[")})
        mounts = (f"mnt[{point}]:{point}" for point in record.external)
        return [f"net[{network}]:{engine.LINK}", *files, *mounts]

    async def _run(self, target: Path, freezer: Path, external: list[str]) -> None:
        work, key = self._directory / WORK, key_of(self._handle.id)
        work.mkdir(mode=0o700, exist_ok=True)
        try:
            argv = engine.dump_argv(self._criu, self._pid, target, work, external, freezer)
            await self._spawner.spawn(Command(key, argv))
            finished = await wait_finished(self._spawner, key)
            log = work / engine.DUMP_LOG
            text = log.read_text(errors="replace") if log.exists() else ""
        finally:
            shutil.rmtree(work, ignore_errors=True)
            await self._spawner.forget(key)
        if finished.status.code or finished.status.signal:
            words = engine.find_problem(text) or finished.output.strip()
            words = words or f"CRIU {finished.status.describe()}"
            problem = f"{self._handle.id} could not be checkpointed: {words}"
            if words.startswith(engine.NOT_STOPPED):
                raise Busy(f"{problem} (its processes come and go)")
            code = -finished.status.signal or finished.status.code
            raise EngineError(problem, argv=argv, status=code, output=words)
