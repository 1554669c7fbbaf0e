"""Making a container of a checkpoint: many at the same time from one.

What an instance has of its own is made for it as for a cold start (bundle, layer, mounts, cgroup,
link). Then `stage.c` enters the user namespace and makes what CRIU shall find already there: the
host name, the clocks, the root of the cgroups. CRIU, which sees only what is shown to it, makes the
rest, joins the link's network namespace, and ends; what it leaves behind is the instance.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tabane.errors import EngineError
from tabane.runtimes import rootfs
from tabane.runtimes.api import EPOCH, SERVICES, Command, InstanceSpec
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.contents import read_contents
from tabane.runtimes.criu import engine, saved, tree
from tabane.runtimes.criu.engine import Criu
from tabane.runtimes.criu.saved import Names

STAGE = "stage"
"""In the instance's directory: where the stage is built."""
FILES = (engine.RESTORE_LOG, engine.SAID, "stats-restore")
"""What a restore leaves in the instance's directory."""
EMPTY = "empty"
"""Directory of the driver's, for what is masked."""
NULL = Path("/dev/null")


class Restore:
    """One container's, of what is in `images`, by a driver with this `directory`."""

    def __init__(
        self, criu: Criu, spec: InstanceSpec, images: Path, directory: Path, epoch: str
    ) -> None:
        self._criu = criu
        self._spec = spec
        self._images = images
        self._directory = directory
        self._epoch = epoch
        self.saved = read_contents(images, saved.Saved, "a container")

    def fill(self, layer: Path) -> None:
        """Put the saved files into the instance's layer, and what tells it from others."""
        saved.unpack(self._images, layer)
        if self._spec.services is None:
            rootfs.write_run(self._spec, Path(SERVICES).name, EPOCH, f"{self._epoch}\n")
            return
        fresh = self._spec.services / f"{EPOCH}.new"
        fresh.write_text(f"{self._epoch}\n")
        fresh.chmod(0o444)
        fresh.replace(self._spec.services / EPOCH)

    def let_in(self) -> None:
        """Let the root of the app's ids, and nobody else, read what is restored."""
        group = self._spec.app.id_base
        for path in (self._images, *self._images.iterdir()):
            found = path.stat()
            if found.st_gid != group or not found.st_mode & stat.S_IRGRP:
                os.chown(path, 0, group)
                path.chmod(0o550 if stat.S_ISDIR(found.st_mode) else 0o440)

    def command(self, usr: Path | None) -> Command:
        """What restores it, and leaves it behind."""
        spec = self._spec
        shown = self._shown(usr)
        argv = (*self._stage_argv(shown), "--", *self._restore_argv(shown))
        environment = {"PATH": os.defpath, "XDG_RUNTIME_DIR": "/tmp"}
        pid_file = spec.directory / "pid"
        return Command(spec.id, argv, env=environment, log=spec.log, pid_file=pid_file)

    def _shown(self, usr: Path | None) -> dict[str, Path]:
        """Mount point inside -> what of the node it is."""
        spec, found = self._spec, {tree.DEV: self._spec.layer / "dev"}
        if usr is not None:
            found[tree.USR] = usr
        if spec.services is not None:
            found[SERVICES] = spec.services
        for point in self.saved.external:
            if point not in tree.SHOWN:
                found[point] = NULL if point in self.saved.files else self._directory / EMPTY
        if unknown := {*self.saved.external} - {*found}:
            raise EngineError(f"{spec.id} has no {', '.join(sorted(unknown))} to restore")
        return {point: found[point] for point in self.saved.external}

    def _stage_argv(self, shown: dict[str, Path]) -> tuple[str, ...]:
        spec, link = self._spec, self._spec.link
        assert link is not None
        stage = spec.directory / STAGE
        stage.mkdir(exist_ok=True)
        cgroups = (str(each / "cgroup.procs") for each in Cgroup(spec.cgroup).own_directories())
        options = [("--cgroup", each) for each in cgroups]
        options += [
            ("--user", link.user_namespace),
            ("--net", link.network_namespace),
            ("--stage", str(stage)),
            ("--show", f"{engine.ROOT}={spec.directory}/rootfs"),
            ("--show", f"{engine.WORK}={spec.directory}"),
            ("--read-only", f"{engine.IMAGES}={self._images}"),
            ("--read-only", f"{engine.FEATURES}={self._directory / engine.FEATURES}"),
            ("--said", str(spec.directory / engine.SAID)),
            ("--owner", str(spec.app.id_base)),
            ("--hostname", spec.hostname or spec.id),
            ("--monotonic", str(self.saved.monotonic_ns)),
            ("--boottime", str(self.saved.boottime_ns)),
        ]
        options += [("--show", f"{_name(n)}={each}") for n, each in enumerate(shown.values())]
        return (str(engine.STAGE), *(word for option in options for word in option))

    def _restore_argv(self, shown: dict[str, Path]) -> tuple[str, ...]:
        external = {point: f"/tmp/{_name(number)}" for number, point in enumerate(shown)}
        out, err = self.saved.outputs
        inherited = {engine.LINK: engine.LINK_FD, err: engine.OUTPUT_FD + 1, out: engine.OUTPUT_FD}
        return engine.restore_argv(self._criu, external, inherited)

    def names(self) -> Names:
        """For the engine's state."""
        spec = self._spec
        assert spec.link is not None
        return Names(spec.id, str(spec.directory), spec.cgroup, spec.link.parked_pid)

    def find_problem(self) -> str:
        """Why it failed, in CRIU's words or those of the stage; empty when nobody says."""
        texts = {}
        for name in (engine.RESTORE_LOG, engine.SAID):
            path = self._spec.directory / name
            texts[name] = path.read_text(errors="replace") if path.exists() else ""
        found = engine.find_problem(texts[engine.RESTORE_LOG])
        return found or texts[engine.SAID].strip().rpartition("\n")[2]


def _name(number: int) -> str:
    """On the stage, of what is shown at a mount point."""
    return f"{engine.EXTERNAL}-{number}"
