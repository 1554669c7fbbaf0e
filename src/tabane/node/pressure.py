"""Has idle instances of this node go down the ladder when its memory runs out: the coldest first.

Once a second it looks at what is available (`Gauge`). How long instances are idle is told by the
gateways, which are asked only then; what they hold, by their cgroups; `tabane.scheduler.pressure`
picks. Each one picked is named to its app's home, which has it frozen or stopped as when it is idle
for long: the gateways give their slots back first, so a session wins. What was asked counts as
coming for a moment; what stays all the same is left alone for a while, and others are picked.

A start that finds no room (`find_room`) has the coldest leave first, and waits for that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple, Protocol

from tabane.clock import Clock, sleep_until
from tabane.gateway.lowering import LOWER_S, LowerAsked
from tabane.gateway.uses import InUse
from tabane.lifecycle import AT_REST
from tabane.model import App, InstanceId, State
from tabane.node.admission import AGAIN_S, NoTurn
from tabane.node.instances import Executor
from tabane.node.running import Running, Transition
from tabane.runtimes.api import Driver
from tabane.runtimes.cgroups import MemoryUse
from tabane.scheduler.pressure import Gauge, Rung, Standing, Step, kept_bytes, plan, plan_room
from tabane.supervise import Supervisor

log = logging.getLogger(__name__)

LOOK_S = 1.0
ASKED_S = LOWER_S + 1.0
"""So long what a home was asked for counts as coming, if nothing is seen of it."""
SPARED_S = 5.0
"""What stayed, as a session came or its app is to keep it, is not picked again for so long."""
ROOM_S = 5.0
"""So long a start waits for room, longer than most programs take to stop."""
ROOM_LOOK_S = 0.1
MARGIN = 1.5
"""What starts may come to hold a bit more than its like."""
MOST_KINDS = 1_000
SCARCE_SHARE = 0.5
"""When less of its memory is available a node measures what its idle instances would free,"""
SCARCE_LOOK_S = 5.0
"""so often."""


class Memory(NamedTuple):
    """Of a node."""

    capacity_bytes: int
    available_bytes: int
    swap_bytes: int = 0
    """Free."""


class Around(Protocol):
    """What of the node the pressure policy needs; see `tabane.node.memory`."""

    def memory(self) -> Memory: ...

    def stalled_percent(self) -> float:
        """See `STALLED_PERCENT`."""

    async def uses(self) -> list[InUse]:
        """What gateways hold slots of here; one that does not answer is left out."""

    def measure(self, running: Running) -> MemoryUse:
        """May block for a moment."""

    def reclaim(self, running: Running) -> None:
        """Have the kernel take what it can of its memory. Blocks as long as that takes."""

    def lower(self, asked: LowerAsked) -> None:
        """Tell its app's home."""


class Claim(NamedTuple):
    """Of a start, in bytes. `known`: its like were seen; else it is what it may take."""

    size: int
    known: bool


class Seeking(NamedTuple):
    """A start that looks for room."""

    app: App
    driver: Driver


class Vain(NamedTuple):
    """So many bytes, or more, are not looked for before."""

    size: int
    until: float

    def says_no(self, size: int, now: float) -> bool:
        return size >= self.size and now < self.until


Kind = tuple[str, str, tuple[str, ...]]
"""Instances that hold about the same: driver, image and command."""


@dataclass
class Asked:
    """A step that is on its way."""

    step: Step
    until: float


class Pressure:
    """See the module's text."""

    def __init__(self, executor: Executor, around: Around, clock: Clock, tasks: Supervisor) -> None:
        self._executor, self._around = executor, around
        self._clock, self._tasks = clock, tasks
        self._gauge = Gauge()
        self._used: dict[InstanceId, float] = {}
        """When a session was last known in it."""
        self._asked: dict[InstanceId, Asked] = {}
        self._spared: dict[InstanceId, float] = {}
        """Until when it is left alone."""
        self._claims: dict[InstanceId, Claim] = {}
        """Of starts that were let in."""
        self._seeking: dict[InstanceId, Seeking] = {}
        """In the order in which they came."""
        self._vain = Vain(0, 0.0)
        self._seen: dict[Kind, int] = {}
        """The most that one of a kind held, the latest seen last."""
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()
        self._found_none = False
        self._frees: dict[InstanceId, int] = {}
        """What each would free, when that was last looked at."""
        self._looked_at = -SCARCE_LOOK_S
        self._idle_bytes, self._idle_until = 0, 0.0

    # What is known

    def memory(self) -> Memory:
        """As it is now."""
        return self._around.memory()

    def free_bytes(self) -> int:
        """What more instances may have: of what is available, without what is kept free, and what
        those that are starting are known to take. What others may take is waited for here."""
        return max(0, _open_bytes(self._around.memory()) - self._claimed_bytes(known=True))

    def idle_bytes(self) -> int:
        """What idle instances would free for a start, at the most. Those that were not looked at
        yet count with all that they may hold: the start finds out. It is asked for with each
        decision, and counted once a second."""
        now = self._clock.now()
        if now >= self._idle_until:
            self._idle_until = now + LOOK_S
            memory = self._around.memory()
            there = (one for one in self._executor.running.values() if _stands(one))
            leave = (one for one in there if not one.record.app.reactive.min)
            freed = sum(self._frees.get(one.instance.id, _may_hold(one)) for one in leave)
            self._idle_bytes = min(freed, memory.capacity_bytes - memory.available_bytes)
        return self._idle_bytes

    def _claimed_bytes(self, *, known: bool = False) -> int:
        beginning = self._executor.beginning
        for instance in self._claims.keys() - beginning.keys():
            del self._claims[instance]
        return sum(claim.size for claim in self._claims.values() if claim.known or not known)

    def _claim_of(self, app: App, driver: Driver) -> Claim:
        """What its like hold, with a margin, if that was seen; else all that it may."""
        most, seen = _wanted(app, driver), self._seen.get(_kind(app, driver))
        return Claim(most, False) if seen is None else Claim(min(most, int(seen * MARGIN)), True)

    def _learn(self, running: Running, held_bytes: int) -> None:
        kind = _kind(running.record.app, running.driver)
        self._seen[kind] = max(held_bytes, self._seen.pop(kind, 0))
        if len(self._seen) > MOST_KINDS:
            del self._seen[next(iter(self._seen))]

    def follow(self, transition: Transition) -> None:
        """An instance is in that state now."""
        instance, now = transition.instance, self._clock.now()
        running = self._executor.running.get(instance)
        if transition.state is State.READY:
            self._used[instance] = now
            if running is not None:
                running.lowered = ""
        elif transition.state is State.FREEZING and running is not None:
            idle_s = running.record.app.reactive.freeze_after_s or 0.0
            self._used[instance] = max(self._used.get(instance, 0.0), now - idle_s)
        elif transition.state is State.FROZEN and running is not None:
            self._have_back(running)
        elif transition.state is State.ABSENT:
            for books in (self._used, self._asked, self._spared, self._frees):
                books.pop(instance, None)
        self._changed.set()

    def _have_back(self, running: Running) -> None:
        """It rests because of us: have the kernel take what it can of it."""
        asked = self._asked.get(running.instance.id)
        if asked is not None and asked.step.rung is Rung.REST:
            name = f"reclaim {running.instance.id}"
            self._tasks.start(name, asyncio.to_thread(self._around.reclaim, running))

    async def _standing(self) -> list[Standing]:
        """What runs here, with what it would free; what is on its way already left out."""
        now = self._looked_at = self._clock.now()
        sessions: dict[InstanceId, int] = {}
        for use in await self._around.uses():
            sessions[use.instance] = sessions.get(use.instance, 0) + use.sessions
            used = self._used.get(use.instance, 0.0)
            self._used[use.instance] = max(used, now - use.unused_s)
        there = [one for one in self._executor.running.values() if self._may_go(one)]
        measured = await asyncio.to_thread(lambda: list(map(self._around.measure, there)))
        found, swap_left = [], self._around.memory().swap_bytes
        for running, held in sorted(zip(there, measured, strict=True), key=self._coldness):
            rests = min(held.swappable_bytes, swap_left) if _can_rest(running) else 0
            swap_left -= rests
            is_used = bool(sessions.get(running.instance.id)) or self._is_held(running)
            found.append(self._describe(running, held, rests, is_used=is_used))
        self._idle_until = now
        return found

    def _coldness(self, pair: tuple[Running, MemoryUse]) -> float:
        return self._used.get(pair[0].instance.id, 0.0)

    def _may_go(self, running: Running) -> bool:
        instance = running.instance.id
        is_spared = self._clock.now() < self._spared.get(instance, 0.0)
        return _stands(running) and instance not in self._asked and not is_spared

    def _is_held(self, running: Running) -> bool:
        """Somebody uses it beside its sessions, or something is being done to it."""
        held = running.paused or self._clock.now() < running.held_until
        return held or running.saving is not None or running.resting is not None

    def _describe(
        self, running: Running, memory: MemoryUse, rests: int, *, is_used: bool
    ) -> Standing:
        instance = running.instance
        idle_s = self._clock.now() - self._used.setdefault(instance.id, self._clock.now())
        self._frees[instance.id] = 0 if is_used else memory.held_bytes
        self._learn(running, memory.held_bytes)
        return Standing(
            instance.id,
            instance.cohort,
            None if is_used else idle_s,
            memory.held_bytes,
            rests,
            running.record.app.reactive.min > 0,
        )

    # What is done

    async def watch(self) -> None:
        """Look once a second; for ever."""
        while True:
            await self.look()
            await sleep_until(self._clock, self._clock.now() + LOOK_S)

    async def look(self) -> None:
        """Have as many go down as are needed now."""
        memory = self._around.memory()
        kept = kept_bytes(memory.capacity_bytes)
        was_short = self._gauge.is_short
        told = memory.available_bytes, kept, self._around.stalled_percent(), self._clock.now()
        need = self._gauge.need(*told)
        if self._gauge.is_short != was_short:
            self._say(memory, kept)
        if need:
            goal = memory.available_bytes + need
            why = f"its node is short of memory ({_mib(memory.available_bytes)} MiB available, "
            why = f"{why}{_mib(kept)} are kept free)"
            await self._lower(plan, lambda: goal - self._around.memory().available_bytes, why)
        elif _is_scarce(memory) and self._clock.now() >= self._looked_at + SCARCE_LOOK_S:
            await self._standing()

    def _say(self, memory: Memory, kept: int) -> None:
        there = f"{_mib(memory.available_bytes)} MiB available, {_mib(kept)} are kept free"
        self._found_none = False
        if self._gauge.is_short:
            log.warning("short of memory: %s; idle instances go down, the coldest first", there)
        else:
            log.info("short of memory no more: %s", there)

    async def _lower(
        self,
        pick: Callable[[list[Standing], int], tuple[Step, ...]],
        need: Callable[[], int],
        why: str,
    ) -> bool:
        """Ask for what frees `need()` bytes, with what is on its way: at the moment when it is
        asked for, as some may have come free meanwhile. Whether that will be enough. What was
        looked for in vain just now is not looked for again by the other starts of a herd."""
        async with self._turn:
            missing = need() - self._coming_bytes()
            if missing <= 0:
                return True
            if pick is plan_room and self._vain.says_no(missing, self._clock.now()):
                return False
            standing = await self._standing()
            missing = need() - self._coming_bytes()
            steps = pick(standing, missing)
            for step in steps:
                self._ask(step, why)
            enough = sum(step.frees_bytes for step in steps) >= missing
            if not enough and pick is plan_room:
                self._vain = Vain(missing, self._clock.now() + ROOM_LOOK_S)
            elif not enough and not self._found_none:
                self._found_none = True
                log.warning("%s MiB more are needed, but nothing idle is left", _mib(missing))
            return enough

    def _ask(self, step: Step, why: str) -> None:
        running = self._executor.running.get(step.instance)
        if running is None or running.stopping:
            return
        self._asked[step.instance] = Asked(step, self._clock.now() + ASKED_S)
        reason = f"{why}: it was idle for {step.idle_s:.0f} s"
        if step.last:
            reason += ", and nothing else that is idle is left, so its app's min is not kept"
        if step.rung is Rung.REST and running.instance.state in AT_REST:
            self._have_back(running)
        else:
            running.lowered = reason
            asked = LowerAsked(step.app, step.instance, step.rung, reason, step.last)
            self._around.lower(asked)

    def _coming_bytes(self) -> int:
        """What was asked for and is still to be seen. What stayed is spared for a while."""
        now, coming = self._clock.now(), 0
        for instance, asked in list(self._asked.items()):
            running = self._executor.running.get(instance)
            if running is not None and running.is_over:
                continue
            is_going = running is not None and (running.stopping or running.saving is not None)
            if is_going or now < asked.until:
                coming += asked.step.frees_bytes
            else:
                del self._asked[instance]
                self._spared[instance] = now + SPARED_S
        return coming

    # Starts

    async def find_room(self, instance: InstanceId, app: App, driver: Driver) -> None:
        """Return when a start may have its app's memory, after who is coldest has left if need be.
        What it is to take is claimed until the instance is ready, or is no more; what is short only
        for what others may take is waited for. Raises `NoTurn` without room, and when the start is
        not wanted any more."""
        self._seeking[instance] = Seeking(app, driver)
        try:
            await self._find_room(instance, f"its node needs its memory for {app.key}")
        finally:
            del self._seeking[instance]
        self._claims[instance] = self._claim_of(app, driver)

    async def _find_room(self, instance: InstanceId, why: str) -> None:
        wanted_bytes = _wanted(*self._seeking[instance])
        deadline = self._clock.now() + ROOM_S
        while wanted_bytes > _open_bytes(self._around.memory()) - self._claimed_bytes():
            begun = self._executor.beginning.get(instance)
            if begun is not None and begun.unwanted:
                raise NoTurn(begun.unwanted)
            is_coming = await self._make_room(instance, why)
            is_first = next(iter(self._seeking)) == instance
            now = self._clock.now()
            if now >= deadline or not (is_coming or self._claims or not is_first):
                raise NoTurn(self._explain(wanted_bytes), again_s=AGAIN_S)
            await self._wait_changed(min(deadline, now + ROOM_LOOK_S))

    async def _make_room(self, instance: InstanceId, why: str) -> bool:
        """Whether there will be enough for this start, and for those before it."""

        def missing() -> int:
            return self._ahead_bytes(instance) - _open_bytes(self._around.memory())

        return missing() <= 0 or await self._lower(plan_room, missing, why)

    def _ahead_bytes(self, instance: InstanceId) -> int:
        """What it wants beside what others are known to take that have room, or look for it and
        came before."""
        before = takewhile(lambda each: each != instance, self._seeking)
        claims = (self._claim_of(*self._seeking[each]) for each in before)
        known = sum(claim.size for claim in claims if claim.known)
        return _wanted(*self._seeking[instance]) + known + self._claimed_bytes(known=True)

    def _explain(self, wanted_bytes: int) -> str:
        name, free = self._executor.node, _mib(self.free_bytes())
        used = "what runs there is in use, or is kept"
        return f"{name} has {free} MiB for it, {_mib(wanted_bytes)} are needed: {used}"

    async def _wait_changed(self, until: float) -> None:
        self._changed.clear()
        timer = self._clock.call_at(until, self._changed.set)
        try:
            await self._changed.wait()
        finally:
            timer.cancel()


def _kind(app: App, driver: Driver) -> Kind:
    return driver.name, app.image, app.command


def _open_bytes(memory: Memory) -> int:
    """Available beside what is kept free; negative when that is touched."""
    return memory.available_bytes - kept_bytes(memory.capacity_bytes)


def _is_scarce(memory: Memory) -> bool:
    return memory.available_bytes < memory.capacity_bytes * SCARCE_SHARE


def _wanted(app: App, driver: Driver) -> int:
    in_memory = driver.capabilities.layer_in_memory
    return (app.resources.with_layer() if in_memory else app.resources).memory_bytes


def _may_hold(running: Running) -> int:
    return _wanted(running.record.app, running.driver)


def _stands(running: Running) -> bool:
    return not running.stopping and running.instance.state in (State.READY, State.FROZEN)


def _can_rest(running: Running) -> bool:
    """By freezing it, or as it is frozen and its memory was left to it."""
    frozen = running.instance.state is State.FROZEN
    return frozen or running.driver.capabilities.freeze


def _mib(size: int) -> int:
    return size >> 20
