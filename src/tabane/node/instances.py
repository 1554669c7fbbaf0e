"""The executor: starts and stops the instances of this node, and never loses one.

What it must remember of an instance is in `ID/record.json` before the engine is told anything, so
that after a restart `recover()` finds what still runs and clears away what does not. That directory
is in memory, like the instance itself: neither outlives the node. Logs are on disk.
An instance's network link is kept until the home says that no gateway can reach it any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from msgspec.structs import replace

from tabane.clock import Clock
from tabane.errors import TabaneError
from tabane.gateway.activation import InstanceEnded, InstanceReady, StillStarting
from tabane.gateway.messages import StartTrace
from tabane.images.checkpoint import Kept
from tabane.lifecycle import Event
from tabane.model import App, Generation, Instance, InstanceId, NodeName, State
from tabane.node.admission import Admission, NoTurn
from tabane.node.ends import (
    describe_ready,
    explain_end,
    explain_failure,
    explain_timeout,
    with_last_line,
    would_repeat,
)
from tabane.node.fetching import Fetching, open_services, ready_volumes
from tabane.node.freezing import Freezer
from tabane.node.putting_away import PuttingAway
from tabane.node.records import Record
from tabane.node.recovery import Recovery
from tabane.node.register import Register
from tabane.node.restoring import Restorer
from tabane.node.running import (
    Beginning,
    Checkpoints,
    Fetched,
    Images,
    Links,
    Notify,
    Running,
    Services,
    Transition,
)
from tabane.node.saving import Saver
from tabane.runtimes import mounts
from tabane.runtimes.api import EPOCH, Driver, InstanceSpec
from tabane.runtimes.pods import log_of
from tabane.runtimes.volumes import VolumeFiles
from tabane.scheduler.quotas import Quotas
from tabane.supervise import Supervisor, harmless
from tabane.units import micros

T = TypeVar("T")

NEW = Kept(counter=0)
FAILED_AGAIN_S = 1.0
"""Of one that is put away, and could not even be prepared."""

STILL_S = 1.0
"""How often a home hears of a start that is not done yet."""


class Executor(Register):
    """`directory` is for records and bundles, `logs` for output. `notify` is told what became ready
    or ended, `on_change` every transition, `on_over` what runs no more before it is cleared away;
    whatever they raise, instances start and end."""

    def __init__(
        self,
        node: NodeName,
        incarnation: str,
        directory: Path,
        logs: Path,
        cgroup: str,
        *,
        links: Links,
        services: Services,
        volumes: VolumeFiles,
        images: Images,
        checkpoints: Checkpoints,
        driver_for: Callable[[App], Driver],
        driver_named: Callable[[str], Driver],
        clock: Clock,
        tasks: Supervisor,
        notify: Notify,
        on_change: Callable[[Transition], None],
        on_begin: Callable[[], None] = lambda: None,
        on_over: Callable[[Running], None] = lambda running: None,
        kernel: str = "",
        quotas: Callable[[], Quotas] = Quotas,
    ) -> None:
        super().__init__(node, directory, clock, on_change)
        self._incarnation = incarnation
        self._logs = logs
        self.cgroup = cgroup
        self.links = links
        self.services = services
        self.volumes = volumes
        self._images = images
        self._fetching = Fetching(images, driver_for, driver_named, clock)
        self.driver_named = driver_named
        self.tasks = tasks
        self.notify = harmless("notify", notify)
        self._on_begin = on_begin
        self._on_over = harmless("over", on_over)
        self._kernel = kernel
        self._loop = asyncio.get_running_loop()
        self.freezer = Freezer(self, tasks, self.notify, self.fail)
        self.saver = Saver(self, checkpoints, tasks, self.notify)
        ends = partial(self._end, failed=False), self.fail
        self.putting_away = PuttingAway(self, checkpoints, tasks, self.notify, *ends)
        self.checkpoints = checkpoints
        self.restorer = Restorer(self, checkpoints)
        self.admission = Admission(clock, self.used, quotas)
        self.find_room = room_for_all
        """Waits for a start's room in memory; raises `NoTurn`. Replaced by who watches that."""

    def spec(self, record: Record) -> InstanceSpec:
        instance = record.instance
        directory = self.directory / instance.id
        return InstanceSpec(
            id=instance.id,
            app=record.app,
            image=record.image,
            link=record.link,
            directory=directory,
            log=self._logs / instance.id / "log",
            cgroup=f"{self.cgroup}/{instance.id}",
            hostname=f"{record.app.name}-{instance.id}",
            volumes=self.volumes.of(record.app),
            services=directory / "services" if record.app.services.needs_directory else None,
            sidecars=record.sidecars,
        )

    # Start

    def start(
        self, app: App, instance_id: InstanceId, decided: float, *, resume: bool = False
    ) -> None:
        """Begin to start an instance; `decided` is when its home did. The outcome is notified, and
        every second that it is still starting. `resume`: it is put away here, and goes on."""
        kept = self.checkpoints.kept(instance_id) if resume else None
        life = kept.about.kept if kept is not None and kept.about.kept else NEW
        instance = Instance(
            id=instance_id,
            app=app.key,
            revision=app.revision,
            node=self.node,
            generation=Generation(self._incarnation, instance_id, life.counter + 1),
            state=State.PREPARING,
            cgroup=f"{self.cgroup}/{instance_id}",
            kernel=self._kernel,
            created_at=life.created_at or self.clock.wall(),
            trust=app.trust,
        )
        begun = Beginning(instance, app, kept=kept)
        if resume and kept is None:
            self._fail_early(begun, "what it was put away as is not there any more")
            return
        self.beginning[instance_id] = begun
        self._on_begin()
        self.tasks.start(f"start {instance_id}", self._start(begun, decided))
        self._tell_later(begun)

    def _tell_later(self, begun: Beginning) -> None:
        self.clock.call_at(self.clock.now() + STILL_S, lambda: self._tell_still(begun))

    def _tell_still(self, begun: Beginning) -> None:
        """A start that takes long: what it is at."""
        instance = begun.instance
        if self.beginning.get(instance.id) is begun and not begun.unwanted:
            doing = self.admission.describe(instance.id) or begun.doing
            doing = doing or self._images.describe(begun.app)
            self.notify(StillStarting(begun.app.cohort, instance.id, self.node, doing))
            self._tell_later(begun)

    async def _start(self, begun: Beginning, decided: float) -> None:
        came = await self._try(begun, self._fetching.fetch(begun))
        if came is None:
            return
        try:
            self.admission.admit(begun.app, begun.instance.id)
            begun.doing = "it waits for room in the memory of its node"
            await self.find_room(begun.instance.id, begun.app, came.driver)
            begun.doing = "it waits for its turn among the starts of its node"
            async with self.admission.turn(begun.app, begun.instance.id) as turn:
                turn.kind = await self._begin(begun, came, decided)
        except NoTurn as no:
            self._forget(begun, State.ABSENT, no)

    async def _begin(self, begun: Beginning, came: Fetched, decided: float) -> str:
        """In its turn. What was done in it, as of `Turn`."""
        phases = {"decide": micros(self.clock.now() - decided - came.took_s)}
        if begun.unwanted:
            self._fail_early(begun, begun.unwanted)
            return ""
        begun.is_made = True
        running = await self._try(begun, self._prepare(begun, came, phases))
        if running is None:
            return ""
        if begun.unwanted:
            await self._end(running, begun.unwanted, failed=False)
            return ""
        await self._launch(running)
        if not (running.stopping or running.was_ready):
            self.admission.begin_boot(begun.instance.id, begun.app)
        what = "a copy" if running.record.restored else "cold"
        return "" if running.stopping or running.note else f"{running.driver.name}, {what}"

    async def _try(self, begun: Beginning, work: Awaitable[T]) -> T | None:
        """What it gives; None when it fails, which is told then."""
        try:
            return await work
        except Exception as error:
            reason = explain_failure(f"prepare {begun.instance.id}", error)
            self._fail_early(begun, reason, failed=True, retry=not would_repeat(error))
            return None

    async def _prepare(self, begun: Beginning, came: Fetched, phases: dict[str, int]) -> Running:
        app, driver, began = begun.app, came.driver, self.clock.now()
        begun.doing = "it waits for a link to the network"
        link = await self.links.claim(app.id_base, egress=app.network.egress)
        phases["network"] = micros(self.clock.now() - began)
        instance = replace(
            begun.instance,
            isolation=driver.isolation,
            driver=driver.name,
            address=link.address,
            freezable=driver.capabilities.freeze,
        )
        image, *others = came.images
        away = begun.kept is not None
        record = Record(instance, app, image, link, sidecar_images=tuple(others), resumed=away)
        running = Running(record, driver, phases, began - came.took_s)
        self.running[instance.id] = running
        spec = self.spec(running.record)
        spec.directory.mkdir(parents=True)
        self.save(running)
        try:
            begun.doing = "its volumes are being made"
            await ready_volumes(self, self.volumes, running)
            await open_services(self.services, driver, spec)
            begun.doing = driver.capabilities.preparation
            handle = await driver.prepare(spec)
        except BaseException:
            await self.clean_up(running)
            del self.running[instance.id]
            await self._release(running)
            raise
        running.record = replace(running.record, handle=handle)
        phases["filesystem"] = micros(self.clock.now() - running.began) - phases["network"]
        self.step(running, Event.START)
        self.save(running)
        return running

    def _fail_early(
        self, begun: Beginning, reason: str, *, failed: bool = False, retry: bool = True
    ) -> None:
        """Nothing was started: say so, and forget it."""
        self._forget(begun, State.FAILED if failed else State.ABSENT, NoTurn(reason, failed, retry))
        if failed:
            held = self.admission.hold(begun.app)
            self.admission.tell_untried(held, reason, retry=retry)

    def _forget(self, begun: Beginning, state: State, why: NoTurn) -> None:
        app, instance_id = begun.app, begun.instance.id
        self.beginning.pop(instance_id, None)
        self.say(instance_id, app.key, state, why.reason)
        told = why.reason, why.failed, why.retry, why.again_s
        ended = InstanceEnded(app.cohort, instance_id, self.node, *told)
        later_s = why.again_s or (FAILED_AGAIN_S if why.failed else 0.0)
        kept_after_s = self.putting_away.kept_after_s(instance_id, later_s)
        self.notify(replace(ended, kept_after_s=kept_after_s))

    async def prepare_anew(self, running: Running) -> None:
        """In place of what did not begin, which is cleared away. Raises as `Driver.prepare`."""
        assert running.record.handle is not None
        await running.driver.destroy(running.record.handle)
        running.let_go_of_checkpoint()
        instance = replace(running.instance, pid=0)
        running.record = replace(running.record, instance=instance, handle=None, restored="")
        spec = self.spec(running.record)
        if spec.services is not None:
            (spec.services / EPOCH).unlink(missing_ok=True)
        handle = await running.driver.prepare(spec)
        running.record = replace(running.record, handle=handle)
        self.save(running)

    async def _launch(self, running: Running) -> None:
        """Have it begin, as a copy if there is something to copy. Returns when its engine has."""
        if (stored := self.restorer.choose(running)) is None:
            await self.launch_cold(running)
            return
        if (begun := self.beginning.get(running.instance.id)) is not None:
            begun.doing = "it begins from a checkpoint"
        await self.restorer.start(running, stored)

    async def launch_cold(self, running: Running) -> None:
        """Start the engine and, beside it, watch for readiness: whichever way it goes first.
        Returns when the engine has, so that a program that is slow keeps no other from starting."""
        app, spec = running.record.app, self.spec(running.record)
        if (begun := self.beginning.get(spec.id)) is not None:
            begun.doing = f"it is not ready yet ({describe_ready(app)})"
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        life = self.tasks.start(f"life {spec.id}", self._live(running, spec, started))
        ready: asyncio.Future[None] = started
        if app.reactive.ready != "started":
            ready = self.tasks.start(f"ready {spec.id}", running.wait_ready())
        told = spec.id, app.key, State.STARTING, running.note
        asyncio.get_running_loop().call_soon(self.say, *told)
        self.tasks.start(f"verdict {spec.id}", self.await_verdict(running, ready, life))
        await asyncio.wait({started, life}, return_when=asyncio.FIRST_COMPLETED)

    async def await_verdict(
        self, running: Running, ready: asyncio.Future[None], life: asyncio.Task[None]
    ) -> None:
        """Wait for the first of: it is ready, it has ended, the time is up."""
        began = self.clock.now()
        timeout_s = running.record.app.reactive.start_timeout_s
        first = asyncio.FIRST_COMPLETED
        done, _ = await asyncio.wait({ready, life}, timeout=timeout_s, return_when=first)
        if ready not in done:
            ready.cancel()
        if running.stopping or life in done:
            return
        if not done:
            await self._give_up(running)
            return
        if (error := ready.exception()) is not None:
            await self._end(running, f"its readiness cannot be watched: {error}", failed=True)
            return
        running.split_start(micros(self.clock.now() - began))
        self.become_ready(running)

    async def _live(
        self, running: Running, spec: InstanceSpec, started: asyncio.Future[None]
    ) -> None:
        """The engine's start and the instance's life, to its end."""
        handle = running.record.handle
        assert handle is not None
        began = self.clock.now()
        try:
            handle = await running.driver.start(spec, handle)
        except Exception as error:
            await self._end(running, explain_failure(f"start {spec.id}", error), failed=True)
            return
        running.phases_us.setdefault("engine", micros(self.clock.now() - began))
        instance = replace(running.instance, pid=int(str(handle.data["pid"])))
        running.record = replace(running.record, handle=handle, instance=instance)
        self.save(running)
        if not started.done():
            started.set_result(None)
        if not running.stopping:
            await self.watch(running)

    def become_ready(self, running: Running) -> None:
        """Tell first, and write when that is on its way: sessions wait. A record that was not
        written says `starting`, and `recover` looks again whether such an instance is ready."""
        self.step(running, Event.READY)
        self.saver.tell_wishes(running, self.putting_away.is_possible(running))
        instance = running.instance
        self.beginning.pop(instance.id, None)
        self.admission.end_boot(instance.id)
        total_us = micros(self.clock.now() - running.began) + running.phases_us["decide"]
        trace = StartTrace(dict(running.phases_us), total_us, running.option, running.note)
        self.notify(InstanceReady(running.instance, trace))
        asyncio.get_running_loop().call_soon(self._write_ready, running)

    def _write_ready(self, running: Running) -> None:
        if running.instance.state is State.READY:
            self.save(running)
            self.say(running.instance.id, running.instance.app, State.READY)

    async def _give_up(self, running: Running) -> None:
        said = explain_timeout(running.record.app, await running.describe_unready())
        reason = with_last_line(said, self.spec(running.record).log)
        await self._end(running, reason, failed=True, retry=False)

    # End

    async def watch(self, running: Running) -> None:
        handle = running.record.handle
        assert handle is not None
        status = await running.driver.wait(handle)
        if not running.stopping:
            app, was_ready = running.record.app, running.was_ready
            running.ordered = self.clock.now() <= running.expected_until
            reason = explain_end(app, status, was_ready=was_ready, ordered=running.ordered)
            if not status.reason:
                log = log_of(self.spec(running.record).log, status.container)
                reason = with_last_line(reason, log)
            await self._end(running, reason, failed=True)

    def on_signal(self, instance_id: InstanceId) -> None:
        """By somebody's order it gets one: that it ends within its `stop_timeout` is meant, and it
        is not frozen meanwhile. In any thread."""
        if (running := self.running.get(instance_id)) is not None:
            running.expected_until = self.clock.now() + running.record.app.reactive.stop_timeout_s
            self._loop.call_soon_threadsafe(self.freezer.hold, running)

    def stop(self, instance_id: InstanceId, reason: str) -> None:
        """Begin to stop an instance: TERM, `stop_timeout`, KILL. Of one that is gone: nothing."""
        running, begun = self.running.get(instance_id), self.beginning.get(instance_id)
        if begun is not None and (running is None or running.is_preparing):
            begun.unwanted = reason
            self.admission.withdraw(instance_id, reason)
        elif running is not None and not running.stopping and not running.ended:
            self.tasks.start(f"stop {instance_id}", self._end(running, reason, failed=False))
        elif (kept := self.checkpoints.kept(instance_id)) is not None:
            self.putting_away.drop(kept, reason)

    def fail(self, running: Running, reason: str) -> None:
        """Begin to end one that is of no use."""
        self.tasks.start(f"end {running.instance.id}", self._end(running, reason, failed=True))

    async def _end(
        self, running: Running, reason: str, *, failed: bool, retry: bool = True
    ) -> None:
        """Whatever it was doing, end it, clear it away, and say why."""
        if running.stopping:
            return
        running.stopping = True
        self.beginning.pop(running.instance.id, None)
        handle, app = running.record.handle, running.record.app
        held = self.admission.hold(app) if failed and not running.was_ready else []
        self.admission.end_boot(running.instance.id)
        self.become(running, Event.FAIL if failed else Event.STOP, reason=reason)
        await self.restorer.let_go(running)
        await self.saver.let_go(running)
        await self.putting_away.kill(running)
        await self.freezer.let_go(running)
        if handle is not None and (not failed or running.is_hung or app.containers):
            try:
                await running.driver.stop(handle, app.reactive.stop_timeout_s)
            except (TabaneError, OSError) as error:
                reason += f"; it was killed, as stopping it failed: {error}"
        running.is_over = True
        self._on_over(running)
        await self.clean_up(running)
        self.become(running, Event.GONE, reason=reason)
        running.ended = True
        self.notify_ended(running, failed and not running.ordered, retry)
        self.admission.tell_untried(held, reason, retry=retry)

    def notify_ended(self, running: Running, failed: bool, retry: bool = True) -> None:
        instance = running.instance
        event = InstanceEnded(
            instance.cohort, instance.id, self.node, instance.reason, failed, retry
        )
        kept_after_s = self.putting_away.kept_after_s(instance.id)
        self.notify(replace(event, kept_after_s=kept_after_s))

    async def clean_up(self, running: Running) -> None:
        """Remove what the driver left; the log stays, the link until it is released."""
        if running.record.handle is not None:
            await running.driver.destroy(running.record.handle)
        else:
            await running.driver.discard(self.spec(running.record))
        running.let_go_of_checkpoint()
        if running.record.app.services.needs_directory:
            await self.services.close(self.spec(running.record))

    async def recover(self, told: Sequence[Transition] = ()) -> None:
        """As `Recovery.recover`."""
        await Recovery(self).recover(told)

    def release(self, instance_id: InstanceId) -> None:
        """No gateway can reach the ended instance any more: its address may be used again."""
        running = self.running.get(instance_id)
        if running is not None and running.ended:
            del self.running[instance_id]
            releasing = self.tasks.start(f"release {instance_id}", self._release(running))
            self._fetching.after(instance_id, releasing)

    async def _release(self, running: Running) -> None:
        if running.record.link is not None:
            await self.links.release(running.record.link)
        mounts.remove_tree(self.directory / running.instance.id)

    async def stop_all(self) -> None:
        """Stop everything, for the end of the node."""
        ending = [
            self._end(running, "its node is going down", failed=False)
            for running in self.running.values()
            if not running.stopping and not running.is_preparing
        ]
        await asyncio.gather(*ending)


async def room_for_all(instance: InstanceId, app: App, driver: Driver) -> None:
    """No node is short of memory that nobody watches."""
