"""Checkpoints for executors without a node: a real store, in which everything fits every app of its
own revision and ids."""

from __future__ import annotations

import os
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from msgspec.structs import replace

from tabane.images.checkpoint import About, CheckpointStore, Dump, Kept, Lease, Stored
from tabane.model import App, Class, InstanceId
from tabane.scheduler.attempts import Attempts


class PretendCheckpoints:
    """See `tabane.node.running.Checkpoints`. `load` its `store` first; `is_pending`: nobody knows
    yet what engines can."""

    def __init__(self, directory: Path) -> None:
        memory = directory / "memory"
        memory.mkdir(parents=True)
        self.store = CheckpointStore(directory / "disk", memory, directory / "key")
        self.is_pending = False
        self.refused: tuple[str, ...] = ()
        self.discarded: list[str] = []
        self._attempts: dict[tuple[str, int], Attempts] = {}
        self._kept_attempts: dict[str, Attempts] = {}

    def attempts(self, app: App, driver: str) -> Attempts:
        return self._attempts.setdefault((app.cohort, app.revision), Attempts())

    def choose(self, app: App, driver: str) -> tuple[Stored | None, tuple[str, ...]]:
        found = self.store.find(app.key, app.revision)
        found = [each for each in found if each.about.id_base == app.id_base]
        if found and self.refused:
            return None, self.refused
        return (found[0], ()) if found else (None, ())

    def is_tried(self, driver: str) -> bool:
        return not self.is_pending

    def about(self, app: App, driver: str, instance: InstanceId, kept: Kept | None = None) -> About:
        made = About(app.key, app.revision, driver, Class.CONTAINER, id_base=app.id_base)
        return replace(made, instance=instance, kept=kept)

    def refusals(self, checkpoint: Stored, app: App) -> tuple[str, ...]:
        return self.refused

    def kept(self, instance: InstanceId) -> Stored | None:
        return self.store.kept(instance)

    def kept_attempts(self, digest: str) -> Attempts:
        return self._kept_attempts.setdefault(digest, Attempts())

    async def use_up(self, digest: str) -> None:
        await self.store.use_up(digest)
        await self.store.remove(digest)

    def dump(self, app: App, expected_bytes: int) -> AbstractAsyncContextManager[Dump]:
        return self.store.dump(os.getgid(), expected_bytes)

    async def open(self, digest: str) -> Lease:
        return await self.store.open(digest)

    async def discard(self, digest: str) -> None:
        self.discarded.append(digest)
        await self.store.remove(digest)
