"""Checkpoints for OCI engines, by CRIU: clones of one container, each an instance for itself.

CRIU is driven by Tabane and not by the engine (docs/decisions/criu.md): runc's own way makes
a user namespace and a network of its own for what it restores, and Debian's crun has none. Once
restored, a container is the engine's like any other: it is given the state that it would have
written itself, for `exec`.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import uuid
from contextlib import suppress
from pathlib import Path

from msgspec.structs import replace

from tabane.errors import Busy, EngineError, NotFound, Unsupported
from tabane.model import ExitStatus
from tabane.runtimes.api import Capabilities, Finished, Handle, InstanceSpec, Probe, Spawner
from tabane.runtimes.cgroups import Cgroup, find_hierarchies
from tabane.runtimes.criu import dump, restore, saved
from tabane.runtimes.criu.engine import FEATURES, Criu, find_criu, learn_features
from tabane.runtimes.oci import Engine, OciDriver
from tabane.runtimes.pods import split
from tabane.runtimes.spawned import cgroup_of, check_running, directory_of, is_running
from tabane.runtimes.threads import to_its_end, to_thread
from tabane.supervise import Supervisor

DUMP_ATTEMPTS = 2
FREEZE_ATTEMPTS = 20
BETWEEN_ATTEMPTS_S = 0.005
"""It runs meanwhile, so that it gets out of what is in the way."""
RESTORE_TIMEOUT_S = 30.0
"""Under 0.2 s as a rule; CRIU waits for ever for memory that its images lack."""


class CriuDriver(OciDriver):
    """An `OciDriver` with checkpoints, where CRIU works."""

    def __init__(self, engine: Engine, spawner: Spawner, directory: Path) -> None:
        super().__init__(engine, spawner, directory)
        self._criu: Criu | None = None
        self._no_criu = ""
        self._restoring: set[str] = set()
        self._epochs: dict[str, str] = {}
        self.capabilities = self._find_capabilities()

    def _find_capabilities(self) -> Capabilities:
        able = self._find_criu() is not None
        return replace(
            OciDriver.capabilities,
            checkpoint=able,
            restore=able,
            saves_kernel_state=able,
            saves_processor_state=able,
        )

    def _find_criu(self) -> Criu | None:
        if self._criu is None and not self._no_criu:
            try:
                self._criu = find_criu()
            except Unsupported as problem:
                self._no_criu = problem.message
        return self._criu

    # What it can do here

    async def probe(self) -> Probe:
        """As `OciDriver.probe`; asked again, with a checkpoint that is made and restored, unless
        that has worked since the machine was started."""
        if self._probe is None:
            self._probe = await super().probe()
            if self._probe.works and self._criu is not None and not self._recall(self._criu):
                told = f"checkpoints by CRIU {self._criu.version}, which is still being tried"
                self._probe = replace(self._probe, detail=told, pending=True)
            elif self._probe.works:
                self._probe = self._tell(self._probe)
        elif self._probe.pending and self._criu is not None:
            from tabane.runtimes.criu.trial import try_checkpoints

            probe = replace(self._probe, pending=False)
            engine, criu = self._probe.reason, self._criu
            self._no_criu = await try_checkpoints(self, criu, engine, self._directory)
            self._probe = self._tell(probe)
        return self._probe

    def _recall(self, criu: Criu) -> bool:
        """Whether the trial is done already, by whichever node of the machine."""
        from tabane.runtimes.criu.trial import recall

        assert self._probe is not None
        self._set_up()
        return recall(criu, self._probe.reason, self._directory)

    def _tell(self, probe: Probe) -> Probe:
        """What became of CRIU, for those who ask."""
        if self._no_criu:
            self._criu = None
        self.capabilities = self._find_capabilities()
        if self._criu is None:
            return replace(probe, detail=f"no checkpoints: {self._no_criu}")
        version = self._criu.version
        found = re.search(r"\d+(\.\d+)+", probe.reason)
        versions = {"criu": version, self.name: found[0] if found else ""}
        return replace(probe, detail=f"checkpoints by CRIU {version}", versions=versions)

    def _able(self) -> Criu:
        """Raises `Unsupported` where CRIU does not work."""
        criu = self._find_criu()
        if criu is None:
            raise Unsupported(f"containers cannot be checkpointed here: {self._no_criu}")
        return criu

    async def _ready_to_restore(self) -> Criu:
        criu = self._able()
        self._set_up()
        (self._directory / restore.EMPTY).mkdir(mode=0o755, exist_ok=True)
        if not (self._directory / FEATURES).exists():
            await to_thread(learn_features, criu, self._directory)
        return criu

    # Checkpoints

    def _make_handle(self, spec: InstanceSpec, stop_signal: int) -> Handle:
        handle = super()._make_handle(spec, stop_signal)
        link_pid = spec.link.parked_pid if spec.link is not None else 0
        own = {"link_pid": link_pid, "layer": str(spec.layer)}
        return replace(handle, data=handle.data | own)

    async def checkpoint(self, handle: Handle, directory: Path, *, leave_running: bool) -> None:
        criu = self._able()
        parts, whole = split(handle), whole_cgroup_of(handle)
        for part in parts.values():
            check_running(part)
            await self._wait_for_init(part)
        frozen_before = whole.is_frozen()
        try:
            async with Supervisor("dump", on_failure=lambda *_: None) as tasks:
                dumping = tasks.start(handle.id, self._dump_all(criu, parts, whole, directory))
                await to_its_end(dumping)
        except BaseException:
            await _settle(parts, whole, frozen=frozen_before)
            raise
        if leave_running:
            await _settle(parts, whole, frozen=frozen_before)
            return
        for part in parts.values():
            self._kill_all(part)
        for part in parts.values():  # only now: nothing more is done that the copies do not know
            cgroup_of(part).thaw()
            await self._exited(part)

    async def _dump_all(
        self, criu: Criu, parts: dict[str, Handle], whole: Cgroup, directory: Path
    ) -> None:
        """Of several containers each has a directory, and none goes on before all are saved."""
        if len(parts) == 1:
            (handle,) = parts.values()
            await self._dump(criu, handle, directory)
            return
        for part in parts.values():
            await cgroup_of(part).freeze()
        whole.thaw()
        for name, part in parts.items():
            (directory / name).mkdir(mode=0o700)
            await self._dump(criu, part, directory / name)

    async def _dump(self, criu: Criu, handle: Handle, directory: Path) -> None:
        cgroup = cgroup_of(handle)
        work = dump.Dump(criu, self._spawner, handle, self._state_of(handle))
        for attempts_left in reversed(range(DUMP_ATTEMPTS)):
            await _freeze_between(cgroup)
            try:
                await work.into(directory, freezer_of(cgroup))
                return
            except Busy:
                if not attempts_left:
                    raise
            cgroup.thaw()

    async def restore(self, spec: InstanceSpec, handle: Handle, directory: Path) -> Handle:
        criu = await self._ready_to_restore()
        work = restore.Restore(criu, spec, directory, self._directory, self._epoch_of(spec))
        usr = await to_thread(self._bundles.refill, spec, work.fill)
        work.let_in()
        os.chown(spec.directory, spec.app.id_base, spec.app.id_base)
        spec.directory.chmod(0o700)
        limits = self._pod_limits(spec) if spec.pod is None else {}
        cgroup = Cgroup(spec.cgroup)
        cgroup.make({name: limit for name, limit in limits.items() if name != "cpu"})
        saved.write_state(work.saved, directory, self._state_of(handle), work.names())
        command = work.command(usr)
        self._starting.add(handle.id)
        self._restoring.add(handle.id)
        await self._spawner.spawn(command)
        finished = await self._wait_restored(handle)
        if finished.status != ExitStatus():
            raise self._restore_failed(handle, command.argv, finished.status, work.find_problem())
        cgroup.limit(limits)
        self._restoring.discard(handle.id)
        return self._adopt(handle)

    async def _wait_restored(self, handle: Handle) -> Finished:
        try:
            async with asyncio.timeout(RESTORE_TIMEOUT_S):
                finished = await self._spawner.finished(handle.id)
        except TimeoutError:
            self._kill_all(handle)
            finished = await self._spawner.finished(handle.id)
        self._starting.discard(handle.id)
        return finished

    def _kill_all(self, handle: Handle) -> None:
        """All in its cgroup, also who restores it."""
        for pid in cgroup_of(handle).pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def destroy(self, handle: Handle) -> None:
        if handle.id in self._restoring:
            self._kill_all(handle)
        await super().destroy(handle)
        self._restoring.discard(handle.id)
        self._epochs.pop(handle.id, None)

    def _epoch_of(self, spec: InstanceSpec) -> str:
        """All containers of an instance have the same."""
        identity = spec.id if spec.pod is None else spec.pod.id
        return self._epochs.setdefault(identity, str(uuid.uuid4()))

    def _restore_failed(
        self, handle: Handle, argv: tuple[str, ...], status: ExitStatus, words: str
    ) -> EngineError:
        words = words or f"CRIU {status.describe()}"
        problem = f"{handle.id} could not be restored: {words}"
        return EngineError(problem, argv=argv, status=-status.signal or status.code, output=words)

    def _adopt(self, handle: Handle) -> Handle:
        adopted = super()._adopt(handle)
        pid, ticks = adopted.data["pid"], adopted.data["pid_start"]
        assert isinstance(pid, int) and isinstance(ticks, int)
        saved.complete_state(self._state_of(handle), pid, ticks)
        return adopted

    # After a restart, and at the end

    async def recover(self, spec: InstanceSpec, handle: Handle) -> Handle | None:
        if is_running(handle):
            await self._await_dump(handle)
        return await super().recover(spec, handle)

    async def _await_dump(self, handle: Handle) -> None:
        """A dump that was begun by an agent that is no more: what it saves nobody uses."""
        key = dump.key_of(handle.id)
        with suppress(NotFound):
            await dump.wait_finished(self._spawner, key)
            cgroup_of(handle).thaw()
        await self._spawner.forget(key)
        shutil.rmtree(directory_of(handle) / dump.WORK, ignore_errors=True)

    def _remove(self, handle: Handle) -> None:
        super()._remove(handle)
        directory = directory_of(handle)
        shutil.rmtree(directory / dump.WORK, ignore_errors=True)
        for name in restore.FILES:
            (directory / name).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            (directory / restore.STAGE).rmdir()


async def _freeze_between(cgroup: Cgroup) -> None:
    """Freeze it where none of its processes is about to start another. Raises `Busy` when it
    always is."""
    for _ in range(FREEZE_ATTEMPTS):
        await cgroup.freeze()
        if (pid := dump.find_vfork(cgroup.pids())) is None:
            return
        cgroup.thaw()
        await asyncio.sleep(BETWEEN_ATTEMPTS_S)
    raise Busy(f"process {pid} in {cgroup.path} starts others all the time: try again")


async def _settle(parts: dict[str, Handle], whole: Cgroup, *, frozen: bool) -> None:
    """Let it go on, or stand still as a whole, as it was before a dump."""
    if frozen:
        await whole.freeze()
    if len(parts) > 1 or not frozen:
        for part in parts.values():
            cgroup_of(part).thaw()


def whole_cgroup_of(handle: Handle) -> Cgroup:
    """Of all containers of an instance together."""
    return Cgroup(str(handle.data.get("pod_cgroup", handle.data["cgroup"])))


def freezer_of(cgroup: Cgroup) -> Path:
    """Directory of the cgroup, where it is frozen."""
    hierarchies = find_hierarchies()
    root = hierarchies[""] if "" in hierarchies else hierarchies["freezer"]
    return root / cgroup.path.lstrip("/")


def crun(spawner: Spawner, directory: Path) -> CriuDriver:
    return CriuDriver(Engine("crun", takes_bpf=True, copies_itself=True), spawner, directory)


def runc(spawner: Spawner, directory: Path) -> CriuDriver:
    return CriuDriver(Engine("runc"), spawner, directory)
