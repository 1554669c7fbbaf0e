"""What the executor works with: an instance in memory, and the parts of the node that it needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

from tabane.gateway.activation import (
    InstanceAwake,
    InstanceEnded,
    InstanceReady,
    StillStarting,
)
from tabane.images.checkpoint import About, Dump, Kept, Lease, Stored
from tabane.lifecycle import STANDING
from tabane.model import App, Instance, InstanceId, State, Value
from tabane.node.checking import wait_well
from tabane.node.readiness import describe_unready, wait_ready
from tabane.node.records import Record
from tabane.runtimes.api import Driver, Image, InstanceSpec, Link
from tabane.scheduler.attempts import Attempts


class Images(Protocol):
    """The part of `tabane.node.images.NodeImages` the executor needs."""

    async def prepare_for(self, app: App) -> Image: ...

    def describe(self, app: App) -> str: ...


class Links(Protocol):
    """The part of `tabane.network.NetworkPool` the executor needs."""

    async def claim(self, id_base: int, *, egress: bool) -> Link: ...

    async def release(self, link: Link) -> None: ...

    async def recover(self, in_use: Iterable[Link]) -> None: ...


class Services(Protocol):
    """What of the node an app asks for, as `tabane.node.services.NodeServices`."""

    async def open(self, spec: InstanceSpec) -> None:
        """Have it ready for an instance before its program runs. Raises when it is refused."""

    async def close(self, spec: InstanceSpec) -> None:
        """Take it away. Idempotent."""


class Checkpoints(Protocol):
    """The part of `tabane.node.checkpoints.NodeCheckpoints` the executor needs."""

    def attempts(self, app: App, driver: str) -> Attempts:
        """How its checkpoints went so far."""

    def choose(self, app: App, driver: str) -> tuple[Stored | None, tuple[str, ...]]: ...

    def is_tried(self, driver: str) -> bool:
        """Whether it is known by which versions its engines save."""

    def about(
        self, app: App, driver: str, instance: InstanceId, kept: Kept | None = None
    ) -> About: ...

    def refusals(self, checkpoint: Stored, app: App) -> tuple[str, ...]:
        """Why it cannot be restored here now."""

    def kept(self, instance: InstanceId) -> Stored | None:
        """As which an instance was put away, if it was."""

    def kept_attempts(self, digest: str) -> Attempts:
        """How restores of one that is put away went so far."""

    async def use_up(self, digest: str) -> None:
        """As `CheckpointStore.use_up`; its room comes free later."""

    def dump(self, app: App, expected_bytes: int) -> AbstractAsyncContextManager[Dump]: ...

    async def open(self, digest: str) -> Lease: ...

    async def discard(self, digest: str) -> None:
        """It is of no use. One that is open just now goes later."""


class Transition(Value, frozen=True):
    """An instance changed its state, or (`part`, and no instance) one of the node's own processes
    ended (journal `events.log`, room `events`)."""

    at: float
    instance: InstanceId
    app: str
    node: str
    state: State
    reason: str = ""
    part: str = ""


def without_end(told: Iterable[Transition], known: Container[InstanceId]) -> list[Transition]:
    """What was told last, of `told` (the oldest first), about instances that are neither said to be
    gone nor `known`."""
    latest = {each.instance: each for each in told if not each.part}
    gone = (each for each in latest.values() if each.state is not State.ABSENT)
    return [each for each in gone if each.instance not in known]


class Fetched(NamedTuple):
    """What an instance is to be made from and by, and how long that took to get, s."""

    driver: Driver
    images: list[Image]
    took_s: float


@dataclass
class Beginning:
    """An instance that was told to start, until it is ready."""

    instance: Instance
    """As it was then."""
    app: App
    doing: str = ""
    """What its start is at, as a sentence's end."""
    unwanted: str = ""
    """It was told to stop before it had begun to run, and why."""
    is_made: bool = False
    """What it is to have is being made: its volumes, too."""
    kept: Stored | None = None
    """It was put away as this, and goes on from there."""


@dataclass
class Running:
    """One instance in memory."""

    record: Record
    driver: Driver
    phases_us: dict[str, int] = field(default_factory=dict)
    began: float = 0.0
    stopping: bool = False
    ended: bool = False
    is_over: bool = False
    """Nothing of it runs any more; what it left may not be cleared away yet."""
    expected_until: float = 0.0
    """That it ends before is what somebody ordered."""
    ordered: bool = False
    is_hung: bool = False
    """Its checks say so: it fails, and has to be stopped for that."""
    is_frozen: bool = False
    """Its engine froze it, or may have: its state says whether it is to be."""
    freezing: asyncio.Task[None] | None = None
    resting: asyncio.Task[None] | None = None
    """Brings the engine to where the state is."""
    held_until: float = 0.0
    """Somebody uses it beside its sessions, so it is not frozen."""
    paused: bool = False
    """By somebody's order, which stands until another."""
    lowered: str = ""
    """Why its node, short of memory, asked its home to have it go down the ladder."""
    is_wanted: bool = False
    """Sessions come to it, since it was last told that there are none."""
    saving: asyncio.Task[None] | None = None
    """Has it dumped, while it stands still for that."""
    put_away: Attempts = field(default_factory=Attempts)
    """How it went when it was to be put away."""
    goes_on: asyncio.Event = field(default_factory=asyncio.Event)
    """It does not stand still for a dump."""
    restoring: asyncio.Task[None] | None = None
    """Has it begin as a copy, until it is ready or begins cold."""
    checkpoint: Lease | None = None
    """That it has in use (`Capabilities.maps_checkpoints`)."""
    unwell: str = ""
    """What the last check found that was to pass for it to be ready."""
    option: str = "cold"
    note: str = ""
    """As of `StartTrace`."""

    @property
    def was_ready(self) -> bool:
        return self.instance.state in STANDING

    @property
    def instance(self) -> Instance:
        return self.record.instance

    @property
    def is_preparing(self) -> bool:
        """Its driver prepares it: nothing else can be done to it meanwhile."""
        return self.instance.state is State.PREPARING

    @property
    def is_silent(self) -> bool:
        """Its network stack ended with it: neither FIN nor RST tells those it was connected to."""
        return self.is_over and self.driver.capabilities.own_stack

    def let_go_of_checkpoint(self) -> None:
        """Nothing of it runs any more. Idempotent."""
        if self.checkpoint is not None:
            self.checkpoint.close()

    def split_start(self, total_us: int) -> None:
        """Divide the time since the engine was told between it and the program's own boot."""
        engine_us = min(self.phases_us.get("engine", total_us), total_us)
        self.phases_us |= {"engine": engine_us, "boot": total_us - engine_us}

    async def wait_ready(self) -> None:
        """As its app's `ready` says; never by itself otherwise."""
        record, look = self.record, None
        if record.app.reactive.ready == "health":
            await wait_well(self)
            return
        if self.driver.capabilities.own_stack and record.handle is not None:
            look = partial(self.driver.wait_listening, record.handle)
        await wait_ready(record.app, record.instance.address, record.link, look)

    async def describe_unready(self) -> str:
        """What can be seen of one that is not ready."""
        link = None if self.driver.capabilities.own_stack else self.record.link
        seen = await describe_unready(self.record.app, self.instance.address, link)
        return "; ".join(filter(None, (self.unwell, seen)))


Notify = Callable[[InstanceReady | InstanceEnded | InstanceAwake | StillStarting], None]
