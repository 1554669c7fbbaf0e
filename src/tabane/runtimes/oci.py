"""Class `container`: runc and crun, two engines behind one driver.

A start is: mount the root file system and write `config.json` (`prepare`, under 2 ms, no process),
then `ENGINE run -d` through the spawner (`start`). The engine ends when the program runs; what it
leaves behind is the container's init, which the spawner watches by the engine's pid file. From then
on no engine is needed except for `exec`: signals go to init, everything else through the cgroup's
files, and `destroy` removes the engine's state with the rest, which also works for a start that
broke off half-way.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tabane.errors import Unsupported
from tabane.model import Class, Value
from tabane.runtimes import bundle, bundles, copying, inside, process, terminal
from tabane.runtimes.api import (
    Capabilities,
    Conversation,
    Enforcement,
    Execution,
    Handle,
    InstanceSpec,
    Probe,
    Spawner,
    Transfer,
)
from tabane.runtimes.bundles import Bundles
from tabane.runtimes.ending import end_session, wait_for_init
from tabane.runtimes.spawned import (
    PID,
    PodOfCgroup,
    SpawnedDriver,
    cgroup_of,
    check_running,
    directory_of,
)

HANDLE_VERSION = 1
OUTPUTS = (1, 2)
_DECODER = json.JSONDecoder()


class Engine(Value, frozen=True):
    """What differs between engines."""

    name: str
    takes_bpf: bool = False
    """It takes a compiled seccomp filter from an annotation (crun's `run.oci.seccomp_bpf_data`)."""
    copies_itself: bool = False
    """At each start, unless it lies on a read-only mount (`Bundles.show_engine`)."""


class OciDriver(SpawnedDriver, PodOfCgroup):
    """See the module's text. `directory`: its init layer, kept mounts and the engine's state."""

    isolation = Class.CONTAINER
    capabilities = Capabilities(
        freeze=True,
        exec=True,
        terminal=True,
        copy=True,
        stats=True,
        network=True,
        services=True,
        volumes=True,
        layer_in_memory=True,
        pods=True,
        limit=True,
        images=("linux", "host"),
        needs_root=True,
        works_emulated=True,
    )

    _no_checkpoints = "containers cannot be checkpointed yet: only cold starts"

    def __init__(self, engine: Engine, spawner: Spawner, directory: Path) -> None:
        self.name = engine.name
        self._engine = engine
        super().__init__(spawner)
        self._state = directory / "state"
        self._bundles = Bundles(directory, takes_bpf=engine.takes_bpf)
        self._directory = directory
        self._path = ""
        self._probe: Probe | None = None

    # What it can do here

    async def probe(self) -> Probe:
        """Run a trivial container with every default on; the answer is kept."""
        if self._probe is None:
            from tabane.runtimes.trial import try_driver

            self._probe = await try_driver(self, self.name, self._directory)
        return self._probe

    def enforcements(self) -> tuple[Enforcement, ...]:
        return bundle.ENFORCEMENTS

    def _set_up(self) -> None:
        if not self._path:
            path = shutil.which(self._engine.name)
            if path is None:
                raise Unsupported(f"{self._engine.name} is not installed")
            self._bundles.set_up()
            self._state.mkdir(mode=0o700, exist_ok=True)
            if self._engine.copies_itself:
                path = str(self._bundles.show_engine(Path(path)))
            self._path = path

    # Life

    async def prepare(self, spec: InstanceSpec) -> Handle:
        self._set_up()
        program = self._bundles.build(spec)
        await bundles.mount_volumes(spec)
        return self._make_handle(spec, program.stop_signal)

    def _make_handle(self, spec: InstanceSpec, stop_signal: int) -> Handle:
        """Of what is prepared."""
        data: dict[str, Any] = {
            "pid": 0,
            "pid_start": 0,
            "cgroup": spec.cgroup,
            "directory": str(spec.directory),
            "stop_signal": stop_signal,
        }
        return Handle(self.name, HANDLE_VERSION, spec.id, data)

    async def start(self, spec: InstanceSpec, handle: Handle) -> Handle:
        os.chown(spec.directory, spec.app.id_base, spec.app.id_base)
        spec.directory.chmod(0o700)
        return await self._launch(spec, handle, self._run(spec, handle), self._watched(spec))

    def _on_spawned(self, spec: InstanceSpec, pid: int) -> None:
        """Give the outputs to the program's user, who may open them anew as /dev/stdout: crun does
        so itself. An engine that has ended needs it no more."""
        user, base = self._bundles.user_of(spec), spec.app.id_base
        for output in OUTPUTS:
            with suppress(FileNotFoundError, ProcessLookupError):
                os.chown(f"/proc/{pid}/fd/{output}", base + user.uid, base + user.gid)

    def _watched(self, spec: InstanceSpec) -> Path | None:
        """The file with the pid of the process whose end is the container's."""
        return spec.directory / PID

    def _run(self, spec: InstanceSpec, handle: Handle) -> tuple[str, ...]:
        """The engine's command line that starts the instance and leaves it behind."""
        return (
            *self._command(handle),
            *("run", "--detach", "--bundle", str(spec.directory)),
            *("--pid-file", str(spec.directory / "pid"), handle.id),
        )

    def _command(self, handle: Handle) -> tuple[str, ...]:
        log = directory_of(handle) / "engine.log"
        path = self._path or shutil.which(self._engine.name) or self._engine.name
        return (path, "--root", str(self._state), "--log", str(log), "--log-format", "json")

    def _last_words(self, handle: Handle) -> str:
        log = directory_of(handle) / "engine.log"
        return self._cause(parse_log(log.read_text(errors="replace")) if log.exists() else [])

    def _cause(self, entries: list[dict[str, Any]]) -> str:
        """What a start failed for, of an engine's log; empty when that does not say."""
        return str(entries[-1].get("msg", "")) if entries else ""

    def _engine_processes(self, handle: Handle) -> list[int]:
        """crun does all its work in a child, which goes on when crun itself is killed."""
        return process.running(self._path, handle.id) if self._path else []

    async def _wait_for_init(self, handle: Handle) -> None:
        pid, ticks = handle.data["pid"], handle.data["pid_start"]
        assert isinstance(pid, int) and isinstance(ticks, int)
        await wait_for_init(pid, ticks)

    async def _end_left_behind(self, handle: Handle) -> None:
        """End the commands inside whose agent is no more: nobody hears them."""
        members, directory = cgroup_of(handle).pids, directory_of(handle)
        for name, pid in inside.left_behind(directory):
            if pid in members():
                await end_session(pid, process.start_ticks(pid), members)
            await self._spawner.forget(inside.key_of(handle.id, name))
        inside.clear(directory)

    async def discard(self, spec: InstanceSpec) -> None:
        await self.destroy(self._make_handle(spec, signal.SIGTERM))

    def _remove(self, handle: Handle) -> None:
        directory = directory_of(handle)
        bundles.tear_down(directory)
        shutil.rmtree(self._state_of(handle), ignore_errors=True)
        for name in (PID, "engine.log"):
            (directory / name).unlink(missing_ok=True)
        inside.clear(directory)

    def _state_of(self, handle: Handle) -> Path:
        """Where the engine has what it remembers of the instance."""
        return self._state / handle.id

    def close(self) -> None:
        """Unmount what is kept between instances; they go on. Call it when the node ends."""
        self._bundles.close()

    # Inside

    async def exec(self, handle: Handle, execution: Execution) -> Conversation:
        place = self._place(handle)
        if execution.terminal is None:
            return await inside.converse(place, execution, self._spawner)
        begin = partial(terminal.Leader, members=cgroup_of(handle).pids)
        return await terminal.converse(place, execution, self._spawner, begin)

    def _place(self, handle: Handle) -> inside.Place:
        check_running(handle)
        pid = handle.data["pid"]
        assert isinstance(pid, int)
        return inside.Place(handle.id, pid, directory_of(handle), self._command(handle))

    async def copy(self, handle: Handle, transfer: Transfer) -> Conversation:
        return await copying.converse(self._place(handle), transfer)


def parse_log(text: str) -> list[dict[str, Any]]:
    """The entries of an engine's JSON log. Not every engine ends its lines, and one that was killed
    leaves half an entry."""
    entries, rest = [], text.strip()
    with suppress(ValueError):
        while rest:
            entry, end = _DECODER.raw_decode(rest)
            entries.append(entry)
            rest = rest[end:].lstrip()
    return entries
