"""Virtual time, connections that keep order and may break, and nodes that run what they are told
to: the ground that `tabane.testing.wakes` stands on."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from msgspec.structs import replace

from tabane.gateway import activation
from tabane.gateway.events import PutAway, SavedThere
from tabane.lifecycle import STANDING
from tabane.model import App, AppName, Generation, Instance, InstanceId, NodeName, State

if TYPE_CHECKING:
    from tabane.testing.wakes import VirtualDatacenter

Handler = Callable[[object], None]


class World:
    """Virtual time."""

    def __init__(self, seed: int) -> None:
        self.now = 1_000.0
        self.random = Random(seed)
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._calls, (self.now + delay_s, next(self._order), call))

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self._calls and self._calls[0][0] <= end:
            self.now, _, call = heapq.heappop(self._calls)
            call()
        self.now = end


class Channel:
    """One direction between two parties: in order, each message late by up to `late_s`."""

    def __init__(self, world: World, deliver: Handler, late_s: float) -> None:
        self._world = world
        self._deliver = deliver
        self._late_s = late_s
        self._last = 0.0
        self._sent: list[object] = []

    def send(self, message: object) -> None:
        delay_s = self._world.random.uniform(0.0001, self._late_s)
        self._last = max(self._last, self._world.now + delay_s)
        self._sent.append(message)
        self._world.after(self._last - self._world.now, self._arrive)

    def cut(self) -> None:
        """What is on its way is lost, from a random message on."""
        kept = self._world.random.randint(0, len(self._sent))
        self._sent[kept:] = [None] * (len(self._sent) - kept)

    def _arrive(self) -> None:
        message = self._sent.pop(0)
        if message is not None:
            self._deliver(message)


@dataclass(eq=False)
class Running:
    """An instance on its node. `state` as the node has it."""

    app: App
    instance: InstanceId
    node: NodeName
    state: State = State.STARTING
    told_to_stop: str = ""
    last_used: float = 0.0
    ready_at: float = 0.0
    freezes: int = 0
    savable: bool = False
    is_going: bool = False
    """It is being put away."""
    is_wanted: bool = False
    """Sessions came to it since."""
    held_until: float = 0.0
    """Until then a person uses it, and it refuses to be frozen."""

    def view(self) -> Instance:
        return Instance(
            id=self.instance,
            app=self.app.key,
            revision=self.app.revision,
            node=self.node,
            generation=Generation("incarnation", self.instance, 1),
            state=self.state,
            address=f"address-of-{self.instance}",
            freezable=True,
            freezes=self.freezes,
            savable=self.savable,
            puttable=self.app.reactive.checkpoint_after_s is not None,
        )


class VirtualNode:
    """Starts what it is told to, as its data center's `start_takes` and `fails` say."""

    def __init__(self, dc: VirtualDatacenter, name: NodeName) -> None:
        self.name = name
        self.running: dict[InstanceId, Running] = {}
        self.saved: set[tuple[AppName, int]] = set()
        """The revisions of which it has a checkpoint."""
        self.away: dict[InstanceId, Running] = {}
        """What is put away here."""
        self.up = True
        self._dc = dc
        self.inbox = Channel(dc.world, self._on_message, dc.late_s)
        self.to_home = Channel(dc.world, lambda event: dc.home.on_event(event), dc.late_s)

    def restart_agent(self, down_s: float) -> None:
        """Its instances live on, but for those whose start was not written down yet."""
        self.up = False
        self.inbox.cut()
        self.to_home.cut()
        for running in list(self.running.values()):
            if running.state is State.STARTING and self._dc.world.random.random() < 0.5:
                del self.running[running.instance]
            elif running.state is State.CHECKPOINTING:
                running.state, running.is_going = State.READY, False
        self._dc.world.after(down_s, self._come_back)

    def _come_back(self) -> None:
        self.up = True
        self.to_home.send(self)

    def _on_message(self, message: object) -> None:
        if not self.up:
            return
        match message:
            case activation.Start(app=app, instance=instance, resume=resume):
                if resume and instance not in self.away:
                    gone = activation.InstanceEnded(app.key, instance, self.name, "gone", False)
                    self._tell(gone)
                    return
                self._dc.check_only(instance)
                running = self.running[instance] = Running(app, instance, self.name)
                self._dc.world.after(self._dc.start_takes(app), lambda: self._started(running))
            case activation.Stop(instance=instance, reason=reason):
                found = self.running.get(instance)
                if found and found.state in (State.STARTING, *STANDING):
                    found.told_to_stop = reason
                    found.state = State.STOPPING
                    self._dc.world.after(self._dc.stop_takes_s, lambda: self.end(found, reason))
                elif found is None:
                    self.away.pop(instance, None)
            case activation.Freeze(instance=instance, number=number):
                self._freeze(instance, number)
            case activation.Save(instance=instance, number=number, ends=ends):
                (self._put_away if ends else self._save)(instance, number)
            case activation.Thaw(instance=instance):
                if (frozen := self.running.get(instance)) and frozen.state is State.FROZEN:
                    frozen.state = State.READY
                elif frozen:
                    frozen.is_wanted = True
            case activation.Release(instance=instance):
                if (ended := self.running.get(instance)) and ended.state is State.ABSENT:
                    del self.running[instance]
            case float(asked_at):
                views = tuple(running.view() for running in self.running.values())
                self.to_home.send(activation.NodeReport(self.name, views, asked_at, self._kept()))

    def _kept(self) -> SavedThere:
        now = self._dc.world.now
        away = (
            PutAway(one.app.key, one.instance, one.app.revision, now - one.last_used)
            for one in self.away.values()
        )
        return SavedThere(tuple(away), tuple(self.saved))

    def _put_away(self, instance: InstanceId, number: int) -> None:
        """It takes a moment, goes wrong now and then, and sessions win."""
        running, dice = self.running.get(instance), self._dc.world.random
        if running is None or running.state not in (State.READY, State.FROZEN):
            return
        running.freezes, running.is_going, running.is_wanted = number, True, False
        self._dc.check_freeze(running)
        running.state = State.CHECKPOINTING
        self._dc.world.after(dice.choice([0.0, 0.1, 0.7]), lambda: self._gone(running))

    def _gone(self, running: Running) -> None:
        if running.state is not State.CHECKPOINTING or not running.is_going:
            return
        fails = self._dc.world.random.random() < 0.2
        if fails or running.is_wanted or self._dc.world.now < running.held_until:
            running.state, running.is_going = State.READY, False
            told = running.app.key, running.instance, running.freezes
            again_s = 0.2 if fails else 0.0
            self._tell(activation.InstanceAwake(*told, used=False, again_s=again_s, ends=True))
            return
        self._dc.check_going(running)
        self.away[running.instance] = running
        self.end(running, "put away")

    def _freeze(self, instance: InstanceId, number: int) -> None:
        running = self.running.get(instance)
        if running is None or running.state not in (State.READY, State.FROZEN):
            return
        running.freezes = number
        self._dc.check_freeze(running)
        if self._dc.world.now < running.held_until:
            self._tell(activation.InstanceAwake(running.app.key, instance, number))
        else:
            running.state = State.FROZEN

    def _save(self, instance: InstanceId, number: int) -> None:
        """It takes a moment, and goes wrong now and then."""
        running, dice = self.running.get(instance), self._dc.world.random
        if running is None or running.state is not State.READY:
            return
        running.freezes = number
        if self._dc.world.now < running.held_until:
            self._go_on(running, again_s=0.5)
            return
        self._dc.check_freeze(running)
        running.state = State.CHECKPOINTING
        self._dc.world.after(dice.choice([0.0, 0.1, 0.7]), lambda: self._saved(running))

    def _saved(self, running: Running) -> None:
        if running.state is not State.CHECKPOINTING:
            return
        running.state, running.savable = State.READY, False
        if works := self._dc.world.random.random() < 0.7:
            self.saved.add((running.app.key, running.app.revision))
        self._go_on(running, again_s=None if works else 0.2)

    def _go_on(self, running: Running, again_s: float | None) -> None:
        told = running.app.key, running.instance, running.freezes
        self._tell(activation.InstanceAwake(*told, used=False, again_s=again_s))

    def use(self, running: Running, for_s: float) -> None:
        """A person does something inside."""
        running.held_until = self._dc.world.now + for_s
        if running.state is State.FROZEN:
            running.state = State.READY
            key = running.app.key
            self._tell(activation.InstanceAwake(key, running.instance, running.freezes))

    def _started(self, running: Running) -> None:
        if self.running.get(running.instance) is not running:
            return
        if running.state is not State.STARTING:
            return
        if self._dc.fails(running.app):
            is_away = running.instance in self.away
            self.end(running, "the program exited with code 1", failed=not is_away)
            return
        self.away.pop(running.instance, None)
        running.state, running.ready_at = State.READY, self._dc.world.now
        running.last_used = running.ready_at
        is_saved = (running.app.key, running.app.revision) in self.saved
        running.savable = running.app.reactive.checkpoint and not is_saved
        self._tell(activation.InstanceReady(running.view()))
        if (life_s := self._dc.dies_after(running.app)) is not None:
            died = "the program was killed by SIGSEGV"
            self._dc.world.after(life_s, lambda: self.end(running, died, failed=True))

    def end(self, running: Running, reason: str, *, failed: bool = False) -> None:
        """It stopped or crashed."""
        if running.state is State.ABSENT or running.instance not in self.running:
            return
        running.state = State.ABSENT
        app = running.app.key
        ended = activation.InstanceEnded(app, running.instance, self.name, reason, failed=failed)
        kept_after_s = 0.3 if reason != "put away" else 0.0
        is_away = running.instance in self.away
        self._tell(replace(ended, kept_after_s=kept_after_s if is_away else None))

    def _tell(self, event: activation.Event) -> None:
        if self.up:
            self.to_home.send(event)
