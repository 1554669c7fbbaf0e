"""The instances that a node answers for: in memory, on disk, and in what is told of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace

from tabane.clock import Clock
from tabane.errors import NotFound
from tabane.lifecycle import Event, follow
from tabane.model import AppName, Generation, Instance, InstanceId, NodeName, State
from tabane.node.records import write_record
from tabane.node.running import Beginning, Running, Transition
from tabane.scheduler.quotas import Usage
from tabane.supervise import harmless


class Register:
    """`directory` has an `ID/record.json` of each; `on_change` is told every transition."""

    def __init__(
        self,
        node: NodeName,
        directory: Path,
        clock: Clock,
        on_change: Callable[[Transition], None],
    ) -> None:
        self.node = node
        self.directory = directory
        self.clock = clock
        self._on_change = harmless("transition", on_change)
        self.running: dict[InstanceId, Running] = {}
        self.beginning: dict[InstanceId, Beginning] = {}
        """Those that are not ready yet; at first there is nothing of one to remember on disk."""

    def __len__(self) -> int:
        return len(self.running.keys() | self.beginning.keys())

    def instances(self) -> list[Instance]:
        """All that this node answers for, also those ended whose address is still kept."""
        preparing = (
            replace(begun.instance, reason=begun.doing)
            for one, begun in self.beginning.items()
            if one not in self.running
        )
        return [*preparing, *(running.instance for running in self.running.values())]

    def get(self, instance: InstanceId) -> Running:
        """Raises `NotFound`."""
        try:
            return self.running[instance]
        except KeyError:
            raise NotFound(f"there is no instance {instance} on {self.node}") from None

    def runs(self, instance: InstanceId) -> bool:
        running = self.running.get(instance)
        return running is not None and not running.ended

    def used(self, but: InstanceId) -> dict[int, Usage]:
        """What each user has here, of what runs or begins, besides that instance."""
        apps = {one: begun.app for one, begun in self.beginning.items()}
        apps |= {one: each.record.app for one, each in self.running.items() if not each.ended}
        apps.pop(but, None)
        found: dict[int, Usage] = {}
        for app in apps.values():
            had = found.get(app.owner, Usage())
            memory_bytes = had.memory_bytes + app.resources.memory_bytes
            found[app.owner] = Usage(had.instances + 1, memory_bytes)
        return found

    def silent(self) -> list[Generation]:
        """Of those that ended with their network stacks, and whose address is still kept."""
        return [one.instance.generation for one in self.running.values() if one.is_silent]

    def images(self) -> dict[InstanceId, set[str]]:
        """Of the instances, what they run from: digests."""
        return {one: running.record.digests for one, running in self.running.items()}

    def volume_holder(self, key: AppName, but: Running | None = None) -> str:
        """The instance that has the app's volumes now (or another one); empty: none."""
        holding = (
            running.instance.id
            for running in self.running.values()
            if running is not but
            and not running.ended
            and running.record.app.volumes
            and running.instance.app == key
        )
        return next(holding, "")

    def volume_user(self, key: AppName) -> str:
        """The instance that has the app's volumes, or will have them soon; empty: none."""
        coming = (
            one
            for one, begun in self.beginning.items()
            if begun.app.key == key and begun.app.volumes and (begun.is_made or not begun.unwanted)
        )
        return self.volume_holder(key) or next(coming, "")

    def become(self, running: Running, event: Event, reason: str = "") -> None:
        """Follow the transition table, on disk too, and tell."""
        self.step(running, event, reason)
        harmless("record", self.save)(running)
        instance = running.instance
        self.say(instance.id, instance.app, instance.state, reason)

    def step(self, running: Running, event: Event, reason: str = "") -> None:
        """Follow the transition table in memory."""
        instance = running.instance
        state = follow(instance.state, event)
        ready_at = self.clock.wall() if state is State.READY else instance.ready_at
        instance = replace(instance, state=state, reason=reason, ready_at=ready_at)
        running.record = replace(running.record, instance=instance)

    def say(self, instance: InstanceId, app: str, state: State, reason: str = "") -> None:
        at = self.clock.wall()
        self._on_change(Transition(at, instance, app, self.node, state, reason))

    def save(self, running: Running) -> None:
        """For the next agent. Raises `OSError`."""
        write_record(self.directory / running.instance.id, running.record)
