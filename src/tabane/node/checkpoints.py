"""Checkpoints on this node: its own store, and what a restore here would need.

A checkpoint stays on the node that made it. Of use is the latest of an app's revision that is
deployed; what is of no use goes when it is collected, or when there is no room for another.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tabane.errors import Conflict, NotFound, TabaneError
from tabane.gateway.events import PutAway, SavedThere
from tabane.images.checkpoint import (
    About,
    CheckpointStore,
    Dump,
    Here,
    Kept,
    Lease,
    Manifest,
    Stored,
    preflight,
)
from tabane.images.checkpoint.preflight import parse_processor
from tabane.images.store import HOST
from tabane.model import App, AppName, InstanceId, NodeName, Value, name_cohort
from tabane.node.messages import Removed
from tabane.runtimes import mounts
from tabane.scheduler.attempts import Attempts

if TYPE_CHECKING:
    from tabane.node.agent import Agent

log = logging.getLogger(__name__)


class CheckpointRow(Value, frozen=True):
    """A checkpoint on a node. `users`: for how many starts it is open now; `is_warm`: its files are
    in memory; `is_wanted`: an app as it is deployed would use it."""

    node: NodeName
    checkpoint: Stored
    users: int
    is_warm: bool
    is_wanted: bool


class VaultRow(Value, frozen=True):
    """What a node's checkpoints take, on disk and in memory, and may take. `quarantined`: how many
    files were found damaged; `problem`: why there can be none."""

    node: NodeName
    used_bytes: int
    limit_bytes: int
    memory_used_bytes: int
    memory_limit_bytes: int
    quarantined: int
    problem: str


class OwnCheckpoints(Value, frozen=True):
    store: VaultRow
    checkpoints: tuple[CheckpointRow, ...]


class Described(Value, frozen=True):
    """A checkpoint as it is shown: its manifest without the digests of its chunks, as these tell of
    what is in it. `refusals`: why this node would not restore it."""

    node: NodeName
    digest: str
    manifest: Manifest
    chunks: int
    holes: int
    disk_bytes: int
    used_at: float
    users: int
    is_warm: bool
    is_wanted: bool
    refusals: tuple[str, ...]


class NodeCheckpoints:
    """See the module's text. `load` it before anything else."""

    def __init__(self, agent: Agent, mount: Callable[[Path, int], None] | None = None) -> None:
        self._agent = agent
        self._mount = mount or mount_memory
        config, paths = agent.config, agent.config.paths
        self.store = CheckpointStore(
            paths.checkpoints,
            paths.run / "checkpoints",
            paths.checkpoint_key,
            quota_bytes=config.checkpoint_quota_bytes,
            memory_bytes=config.checkpoint_memory_bytes,
            wants=self._wants,
            clock=agent.clock,
        )
        self._vendor, self._flags = "", ""
        self._attempts: dict[tuple[AppName, str], tuple[int, Attempts]] = {}
        """By cohort and driver, of the latest revision that was asked for."""
        self._kept_attempts: dict[str, Attempts] = {}
        self._useless: set[str] = set()
        """Those that are to be removed as soon as they are not open."""

    async def load(self) -> None:
        """Whatever is wrong with checkpoints, a node runs without."""
        memory = self.store.memory
        try:
            text = await asyncio.to_thread(Path("/proc/cpuinfo").read_text)
            self._vendor, self._flags = parse_processor(text)
            await asyncio.to_thread(self._mount, memory.directory, memory.limit_bytes)
            await self.store.load()
        except (TabaneError, OSError) as error:
            self.store.give_up(str(error))
            log.error("this node makes no checkpoints and restores none: %s", error)

    # For instances

    def about(self, app: App, driver: str, instance: InstanceId, kept: Kept | None = None) -> About:
        """What is to be remembered of an instance of `app` that is dumped here by that driver."""
        engines = self._agent.engines
        able = engines.drivers[driver].capabilities
        return About(
            app=app.key,
            revision=app.revision,
            driver=driver,
            isolation=engines.drivers[driver].isolation,
            images=tuple(dict.fromkeys(image for image, _ in app.images())),
            id_base=app.id_base,
            machine=os.uname().machine,
            cpu_vendor=self._vendor if able.saves_processor_state else "",
            cpu_flags=self._flags if able.saves_processor_state else "",
            kernel=os.uname().release if able.saves_kernel_state else "",
            versions=engines.probes[driver].versions,
            instance=instance,
            kept=kept,
        )

    def told(self) -> SavedThere:
        """For homes."""
        now, away = self._agent.clock.wall(), []
        copies = []
        for stored in self.store.all():
            about = stored.about
            if about.kept is None:
                copies.append((about.app, about.revision))
                continue
            cohort = name_cohort(about.app, about.kept.trust)
            age_s = max(0.0, now - stored.made_at)
            away.append(PutAway(cohort, about.instance, about.revision, age_s))
        return SavedThere(tuple(away), tuple(dict.fromkeys(copies)))

    def kept(self, instance: InstanceId) -> Stored | None:
        """As which an instance was put away, if it was."""
        return self.store.kept(instance)

    def kept_attempts(self, digest: str) -> Attempts:
        """How restores of one that is put away went so far."""
        return self._kept_attempts.setdefault(digest, Attempts())

    async def use_up(self, digest: str) -> None:
        """As `CheckpointStore.use_up`; its room comes free later."""
        await self.store.use_up(digest)
        self._kept_attempts.pop(digest, None)
        self._agent.tasks.start(f"remove {digest[:19]}", self.discard(digest))

    def choose(self, app: App, driver: str) -> tuple[Stored | None, tuple[str, ...]]:
        """What an instance of `app` by that driver can begin from: the latest checkpoint of its
        revision that this node does not refuse. If all are refused, why the latest is; else
        nothing."""
        first: tuple[str, ...] = ()
        for stored in self.store.find(app.key, app.revision):
            if stored.about.driver != driver or stored.digest in self._useless:
                continue
            if not (refused := self.refusals(stored, app)):
                return stored, ()
            first = first or refused
        return None, first

    def attempts(self, app: App, driver: str) -> Attempts:
        """How checkpoints of its revision by that driver went so far on this node."""
        key = app.cohort, driver
        revision, attempts = self._attempts.get(key, (0, Attempts()))
        if revision != app.revision:
            attempts = Attempts()
            self._attempts[key] = app.revision, attempts
        return attempts

    def is_tried(self, driver: str) -> bool:
        """Whether it is known by which versions its engines save."""
        return not self._agent.engines.probes[driver].pending

    def dump(self, app: App, expected_bytes: int) -> AbstractAsyncContextManager[Dump]:
        """As `CheckpointStore.dump`."""
        return self.store.dump(app.id_base, expected_bytes)

    async def open(self, digest: str) -> Lease:
        """As `CheckpointStore.open`. The last to leave what was discarded has it removed."""
        lease = await self.store.open(digest)
        return Lease(lease.directory, lambda: self._leave(digest, lease))

    def _leave(self, digest: str, lease: Lease) -> None:
        lease.close()
        tasks = self._agent.tasks
        if digest in self._useless and not self.store.is_used(digest) and not tasks.is_closing:
            tasks.start(f"remove {digest[:19]}", self.discard(digest))

    async def discard(self, digest: str) -> None:
        """It cannot be restored: it is not chosen any more, and removed once nobody has it open."""
        self._useless.add(digest)
        for useless in [*self._useless]:
            with suppress(Conflict):
                await self.store.remove(useless)
                self._useless.discard(useless)

    def refusals(self, checkpoint: Stored | Manifest, app: App | None) -> tuple[str, ...]:
        """Why it cannot be restored here for `app` as it is deployed, a sentence each."""
        if app is None:
            return (f"{checkpoint.about.app} is not deployed",)
        return preflight(checkpoint, self._here(app, checkpoint.about.driver))

    def _here(self, app: App, driver: str) -> Here:
        engines, images = self._agent.engines, self._agent.images.store
        can = (name for name, one in engines.drivers.items() if one.capabilities.restore)
        system = os.uname()
        probe = engines.probes.get(driver)
        return Here(
            machine=system.machine,
            kernel=system.release,
            cpu_vendor=self._vendor,
            cpu_flags=frozenset(self._flags.split()),
            drivers=frozenset(name for name in can if engines.probes[name].works),
            versions=probe.versions if probe is not None else {},
            images=frozenset(one for one, _ in app.images() if one == HOST or images.has(one)),
            revision=app.revision,
            id_base=app.id_base,
            memory_bytes=self.store.memory.limit_bytes,
        )

    def _wants(self, about: About) -> bool:
        if not self._agent.replica.revision:  # what is deployed was lost here, and comes again
            return True
        app = self._agent.app(about.app)
        if app is None or app.revision != about.revision:
            return False
        return about.kept is None or app.reactive.checkpoint_after_s is not None

    # For those who look after them

    def list_own(self) -> OwnCheckpoints:
        """What is here, the one unused for longest first."""
        store, room, memory = self.store, self.store.room, self.store.memory
        unwanted = set(store.unwanted())
        rows = (
            CheckpointRow(
                self._agent.config.key,
                _without_flags(stored),
                memory.users(stored.digest),
                memory.is_warm(stored.digest),
                stored.digest not in unwanted,
            )
            for stored in store.all()
        )
        sizes = room.used_bytes, room.limit_bytes, memory.used_bytes, memory.limit_bytes
        kept = VaultRow(self._agent.config.key, *sizes, store.quarantined(), store.problem)
        return OwnCheckpoints(kept, tuple(rows))

    async def describe(self, digest: str) -> Described:
        """Raises `NotFound`, `Corrupt`."""
        store, memory = self.store, self.store.memory
        stored = store.describe(digest)
        manifest = await store.manifest(digest)
        holes = sum(not chunk for chunk in manifest.chunks)
        return Described(
            self._agent.config.key,
            digest,
            msgspec.structs.replace(manifest, chunks=()),
            len(manifest.chunks) - holes,
            holes,
            stored.disk_bytes,
            stored.used_at,
            memory.users(digest),
            memory.is_warm(digest),
            digest not in store.unwanted(),
            self.refusals(manifest, self._agent.app(manifest.about.app)),
        )

    async def remove_own(self, digest: str) -> Removed:
        """Remove a checkpoint from this node; nothing, when it is not here. Raises `Conflict` for
        one that is open. An app whose checkpoint is gone starts without."""
        try:
            self.store.describe(digest)
        except NotFound:
            return Removed()
        return Removed((digest,), await self.store.remove(digest))

    async def collect_own(self, *, dry: bool = False) -> Removed:
        """Remove what no app would use; `dry`: only say what that is, and what it takes with what
        it shares."""
        unwanted = self.store.unwanted()
        if dry:
            size = sum(self.store.describe(digest).disk_bytes for digest in unwanted)
            return Removed(tuple(unwanted), size)
        freed: dict[str, int] = {}
        for digest in unwanted:
            with suppress(Conflict):  # somebody has begun to open it meanwhile
                freed[digest] = await self.store.remove(digest)
        return Removed(tuple(freed), sum(freed.values()))


def _without_flags(stored: Stored) -> Stored:
    """A list need not have them for each."""
    about = msgspec.structs.replace(stored.about, cpu_flags="")
    return msgspec.structs.replace(stored, about=about)


def mount_memory(directory: Path, size_bytes: int) -> None:
    """A file system in memory, empty, of that size: never on a disk where the kernel can promise
    that (`noswap`, Linux 6.4). What an earlier agent had there stays for those who have it open."""
    directory.mkdir(exist_ok=True)
    while mounts.unmount(directory):
        pass
    options = f"mode=0711,size={size_bytes}"
    flags = mounts.MS_NOSUID | mounts.MS_NODEV
    try:
        mounts.mount("tmpfs", directory, f"{options},noswap", flags)
    except OSError:
        mounts.mount("tmpfs", directory, options, flags)
