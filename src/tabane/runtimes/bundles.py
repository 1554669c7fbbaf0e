"""What containers are made of on this node, kept between them by one driver.

    init/       the layer with Tabane's init
    images/     id-mapped images, for an app each
    usr/        the node's /usr likewise, for apps that have `host` as image
    engine/     an engine's program, read-only

An instance has its `config.json`, its layer and its mounted root file system in its own directory.
"""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

from tabane.errors import Unsupported
from tabane.model import AppName
from tabane.runtimes import bundle, mounts, rootfs, volumes
from tabane.runtimes.api import InstanceSpec, Link, User
from tabane.runtimes.cgroups import counts_swap, missing_controllers

INIT_SOURCE = Path("/usr/bin/tini-static")


class Bundles:
    """Makes OCI bundles below `directory`'s shared parts. `takes_bpf` as in `bundle.Host`."""

    def __init__(self, directory: Path, *, takes_bpf: bool = False) -> None:
        self._directory = directory
        self._takes_bpf = takes_bpf
        self.init = directory / "init"
        self._images = rootfs.Lowers(directory / "images")
        self._usr = rootfs.Lowers(directory / "usr")
        self._programs: dict[AppName, tuple[int, str, bundle.Program]] = {}
        self._host: bundle.Host | None = None

    def set_up(self) -> bundle.Host:
        """Make the shared parts, once. Raises `Unsupported` when the machine lacks something."""
        if self._host is None:
            if not INIT_SOURCE.exists():
                raise Unsupported(f"{INIT_SOURCE} is missing: install the package tini")
            if missing := missing_controllers():
                raise Unsupported(f"no cgroup controller {', '.join(missing)}: mount it")
            self._make_directories()
            files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            self._host = bundle.Host(files, counts_swap(), self._takes_bpf)
        return self._host

    def _make_directories(self) -> None:
        for path, mode in (
            (self._directory, 0o711),
            (self._directory / "usr", 0o711),
            (self._directory / "images", 0o700),
        ):
            path.mkdir(exist_ok=True, parents=True)
            path.chmod(mode)
        target = self.init / bundle.INIT.lstrip("/")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = target.with_suffix(f".{os.getpid()}")
            shutil.copyfile(INIT_SOURCE, fresh)
            for path in (self.init, target.parent, fresh):
                path.chmod(0o755)
            fresh.rename(target)

    def show_engine(self, program: Path) -> Path:
        """`program` at a place where nobody can write to it. An engine that finds itself there need
        not copy itself at each start lest a container overwrites it (CVE-2019-5736), which is a
        quarter of its time. One that was replaced is shown anew."""
        target = self._directory / "engine" / program.name
        target.parent.mkdir(mode=0o711, exist_ok=True)
        if target in mounts.targets_below(target.parent):
            if os.path.samestat(target.stat(), program.stat()):
                return target
            mounts.unmount(target)
        target.touch()
        mounts.bind_read_only(program, target)
        return target

    def build(self, spec: InstanceSpec) -> bundle.Program:
        """Mount the root file system of `spec` and write its `config.json`, in under 2 ms and
        without a process. Raises `Unsupported` and `UsageError` when it is refused; then nothing
        is left. `tear_down` removes it."""
        host = self.set_up()
        if spec.link is None:
            raise Unsupported(f"{spec.app.key}: a container needs a network link")
        program = self._program(spec)
        check_reachable(spec.directory)
        usr = self._map_usr(spec, spec.link)
        config = bundle.make_config(spec, program, host, usr)
        try:
            rootfs.build(spec, self._lowers(spec, spec.link), etc_files(spec, spec.link))
            (spec.directory / "config.json").write_bytes(config)
        except BaseException:
            rootfs.tear_down(spec.directory)
            raise
        return program

    def refill(self, spec: InstanceSpec, fill: Callable[[Path], None]) -> Path | None:
        """Have `fill` change the layer of what `build` made and nothing runs in yet. Returns what
        is bound on /usr, if anything."""
        assert spec.link is not None
        rootfs.refill(spec, self._lowers(spec, spec.link), fill)
        return self._map_usr(spec, spec.link)

    def _lowers(self, spec: InstanceSpec, link: Link) -> tuple[Path, ...]:
        image = self._images.get(spec.image.tree, spec.app.id_base, link.user_namespace)
        return (self.init, image)

    def _program(self, spec: InstanceSpec) -> bundle.Program:
        app = spec.app
        known = self._programs.get(app.key)
        if known is None or known[:2] != (app.revision, spec.image.digest):
            mounts = {"usr": Path("/usr")} if spec.image.host_usr else {}
            program = bundle.make_program(app, spec.image, mounts)
            known = self._programs[app.key] = (app.revision, spec.image.digest, program)
        return known[2]

    def user_of(self, spec: InstanceSpec) -> User:
        """Whom its program runs as. Raises as `build`."""
        return self._program(spec).user

    def _map_usr(self, spec: InstanceSpec, link: Link) -> Path | None:
        if not spec.image.host_usr:
            return None
        return self._usr.get(Path("/usr"), spec.app.id_base, link.user_namespace)

    def close(self) -> None:
        """Unmount what is kept between instances; they go on. Call it when the node ends."""
        self._images.drop_all()
        self._usr.drop_all()
        for target in mounts.targets_below(self._directory / "engine"):
            mounts.unmount(target)


async def mount_volumes(spec: InstanceSpec) -> None:
    """After `build`: what `config.json` binds from the instance's volumes. When it fails nothing
    of the bundle is left. Of a pod, its main container mounts them for all."""
    assert spec.link is not None
    if spec.pod is not None and spec.pod.id != spec.id:
        return
    tree, user_namespace = spec.image.tree, spec.link.user_namespace
    try:
        for storage in spec.volumes:
            await asyncio.to_thread(volumes.mount, storage, spec.directory, tree, user_namespace)
    except BaseException:
        tear_down(spec.directory)
        raise


def tear_down(directory: Path) -> None:
    """Remove what was made in an instance's directory. Idempotent; takes milliseconds, and longer
    where a volume is written to its disk."""
    volumes.unmount_all(directory)
    rootfs.tear_down(directory)
    (directory / "config.json").unlink(missing_ok=True)


def etc_files(spec: InstanceSpec, link: Link) -> dict[str, str]:
    """What an instance finds in its /etc of its own name and the network."""
    hostname = spec.hostname or spec.id
    names = f"127.0.0.1 localhost\n::1 localhost\n{link.address} {hostname}\n"
    resolver = f"nameserver {link.gateway}\n"
    return {"hostname": f"{hostname}\n", "hosts": names, "resolv.conf": resolver}


def check_reachable(directory: Path) -> None:
    """The container's root is an ordinary user of the machine, who must get to its own files."""
    for parent in directory.parents:
        if not parent.stat().st_mode & 0o001:
            raise Unsupported(
                f"{parent} lets no other user in, so no container can live in {directory}: "
                f"chmod o+x {parent}, or keep the node's state elsewhere"
            )
