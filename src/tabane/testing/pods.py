"""What a driver whose instances have several containers must do, beside what every one must.

`InPods` is for `DRIVER_CHECKS`: each of its instances has a sidecar, of which no check is to notice
anything. `POD_CHECKS` are about pods themselves, and `PART_CHECKS` about those whose containers a
driver makes and starts one by one (`tabane.runtimes.pods`).
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Protocol

from msgspec.structs import replace

from tabane.errors import EngineError, NotFound, TabaneError
from tabane.model import Container, ExitStatus
from tabane.runtimes.api import Driver, Execution, Handle, InstanceSpec, Sidecar, Transfer
from tabane.runtimes.pods import Pods, log_of, parts_of, split
from tabane.testing.drivers import (
    PATIENCE_S,
    SAID,
    Behaviour,
    DriverBench,
    refused,
    wait_until_said,
)
from tabane.testing.talks import fetch, make_archive, put, read_archive, run_inside

FIRST, SECOND = "first", "second"
"""The names of sidecars, in order."""
KILLED, TERMINATED = ExitStatus(signal=signal.SIGKILL), ExitStatus(signal=signal.SIGTERM)


class PodBench(DriverBench, Protocol):
    """Its driver runs pods."""

    def pod(
        self, main: Behaviour, *sidecars: Behaviour
    ) -> AbstractAsyncContextManager[InstanceSpec]:
        """What is needed to start an instance with these sidecars."""


Check = Callable[[PodBench], Awaitable[None]]


class InPods:
    """A `DriverBench` whose instances have a sidecar."""

    def __init__(self, bench: PodBench) -> None:
        self._bench = bench
        self.driver: Driver = bench.driver

    def restarted(self) -> Driver:
        return self._bench.restarted()

    def instance(self, behaviour: Behaviour) -> AbstractAsyncContextManager[InstanceSpec]:
        return self._bench.pod(behaviour, Behaviour.WAITS)

    def left_of(self, spec: InstanceSpec) -> list[str]:
        return self._bench.left_of(spec)


def with_sidecars(spec: InstanceSpec, *sidecars: Container) -> InstanceSpec:
    """`spec` with these, of its own image."""
    app = replace(spec.app, containers=sidecars)
    made = (Sidecar(each.name, app.beside(each), spec.image) for each in sidecars)
    return replace(spec, app=app, sidecars=tuple(made))


@asynccontextmanager
async def prepared(
    bench: PodBench, main: Behaviour, *sidecars: Behaviour
) -> AsyncIterator[tuple[InstanceSpec, Handle]]:
    """A pod before its start; afterwards it is destroyed, and nothing may be left."""
    async with bench.pod(main, *sidecars) as spec:
        handle = await bench.driver.prepare(spec)
        try:
            yield spec, handle
        finally:
            await bench.driver.destroy(handle)
        assert bench.left_of(spec) == []


@asynccontextmanager
async def started(
    bench: PodBench, main: Behaviour, *sidecars: Behaviour
) -> AsyncIterator[tuple[InstanceSpec, Handle]]:
    async with prepared(bench, main, *sidecars) as (spec, handle):
        yield spec, await bench.driver.start(spec, handle)


async def check_first_end(bench: PodBench) -> None:
    """The end of any container is the instance's: whose it was is told, as often as it is asked."""
    waits, exits = Behaviour.WAITS, Behaviour.EXITS
    for behaviours, name in (
        ((waits, exits, waits), FIRST),
        ((waits, waits, exits), SECOND),
        ((exits, waits, waits), ""),
    ):
        async with prepared(bench, *behaviours) as (spec, handle):
            with suppress(EngineError):  # it may have ended before all others had started
                handle = await bench.driver.start(spec, handle)
                for _ in range(2):
                    end = await bench.driver.wait(handle)
                    assert end == ExitStatus(3, container=name), end
                await bench.driver.stop(handle, PATIENCE_S)
                end = await bench.driver.wait(handle)
                assert end == ExitStatus(3, container=name), end


async def check_stop(bench: PodBench) -> None:
    """The stop signal ends the main one, then the others; who does not follow it is killed, and
    leaves no time to those that come after."""
    driver = bench.driver
    for behaviours in (
        (Behaviour.WAITS, Behaviour.WAITS, Behaviour.WAITS),
        (Behaviour.WAITS, Behaviour.STAYS, Behaviour.WAITS),
    ):
        async with started(bench, *behaviours) as (spec, handle):
            if Behaviour.STAYS in behaviours:
                await wait_until_said(replace(spec, log=log_of(spec.log, FIRST)))
            ended = asyncio.ensure_future(driver.wait(handle))
            await asyncio.sleep(0)
            await driver.stop(handle, 0.5 if Behaviour.STAYS in behaviours else PATIENCE_S)
            assert await ended == TERMINATED
            await driver.stop(handle, PATIENCE_S)
            for name in ("main", FIRST, SECOND):
                await refused(driver.exec(handle, Execution(("true",), container=name)), NotFound)


async def check_inside(bench: PodBench) -> None:
    """Each container can be entered, by name, and has files of its own, where these can be seen."""
    driver = bench.driver
    async with started(bench, Behaviour.WAITS, Behaviour.WAITS, Behaviour.WAITS) as (_, handle):
        for name in (FIRST, SECOND, "main", ""):
            said = await run_inside(driver, handle, ("cat",), given=[b"x"], container=name)
            assert said == (0, b"x", b"")
        await refused(driver.exec(handle, Execution(("true",), container="third")), NotFound)
        if not driver.capabilities.copy:
            return
        archive = make_archive({"words": b"of the first"})
        done = await put(driver, handle, "/tmp/words", archive, as_named=True, container=FIRST)
        assert done == (0, b"", b"")
        there = await fetch(driver, handle, "/tmp/words", container=FIRST)
        assert read_archive(there.stdout)["words"][0] == b"of the first"
        for name in ("", SECOND):
            assert (await fetch(driver, handle, "/tmp/words", container=name)).code == 1
        transfer = Transfer("/", inward=False, container="third")
        await refused(driver.copy(handle, transfer), NotFound)


async def check_logs(bench: PodBench) -> None:
    """Each container has a log of its own."""
    async with started(bench, Behaviour.STAYS, Behaviour.WAITS, Behaviour.STAYS) as (spec, handle):
        for name in ("", SECOND):
            await wait_until_said(replace(spec, log=log_of(spec.log, name)))
        await bench.driver.destroy(handle)
        quiet = log_of(spec.log, FIRST)
        assert not quiet.exists() or SAID not in quiet.read_bytes()


async def check_frozen(bench: PodBench) -> None:
    """They are frozen and thawed as one, and what is frozen can be stopped."""
    driver = bench.driver
    async with started(bench, Behaviour.WAITS, Behaviour.WAITS) as (_, handle):
        for _ in range(2):
            await driver.freeze(handle)
            assert handle.data["pid"] in await driver.processes(handle)
            await driver.thaw(handle)
            said = await run_inside(driver, handle, ("echo", "x"), container=FIRST)
            assert said == (0, b"x\n", b""), said
        await driver.freeze(handle)
        await driver.stop(handle, PATIENCE_S)
        end = await driver.wait(handle)
        assert end == TERMINATED, end


async def check_broken_sidecar(bench: PodBench) -> None:
    """One that cannot be started is named, and keeps the others from being left."""
    for broken in range(3):
        behaviours = [Behaviour.WAITS] * 3
        behaviours[broken] = Behaviour.BREAKS
        async with prepared(bench, *behaviours) as (spec, handle):
            try:
                await bench.driver.start(spec, handle)
            except EngineError as error:
                assert error.output and error.status
                begins = ("", f"container {FIRST}: ", f"container {SECOND}: ")[broken]
                assert str(error).startswith(f"{begins}{bench.driver.name} could not start")
            else:
                raise AssertionError("the start did not fail")


async def check_cut_short(bench: PodBench) -> None:
    """After the agent's death between the starts of two containers nothing is found to go on with,
    and all of it is removed."""
    assert isinstance(bench.driver, Pods)
    engine = bench.driver.engine
    behaviours = (Behaviour.WAITS, Behaviour.WAITS, Behaviour.WAITS)
    for count in (1, 2):
        async with prepared(bench, *behaviours) as (spec, handle):
            parts = zip(parts_of(spec), split(handle).values(), strict=True)
            for part, known in list(parts)[:count]:
                await engine.start(part, known)
            again = bench.restarted()
            assert await again.recover(spec, handle) is None
            await again.destroy(handle)
            assert bench.left_of(spec) == []


async def check_found_ended(bench: PodBench) -> None:
    """What of a pod ended while there was no agent is told to the next, which does not take it for
    one that runs."""
    driver = bench.driver
    async with started(bench, Behaviour.WAITS, Behaviour.WAITS, Behaviour.WAITS) as (spec, handle):
        again = bench.restarted()
        found = await again.recover(spec, handle)
        assert found is not None
        await end_one(again, found, SECOND)
        again = bench.restarted()
        if await again.recover(spec, handle) is not None:
            assert driver.capabilities.own_stack  # its kernel has to be asked
        assert await again.wait(handle) == replace(TERMINATED, container=SECOND)
        await again.destroy(handle)


async def end_one(driver: Driver, handle: Handle, name: str) -> None:
    """Have the program of one container end."""
    if isinstance(driver, Pods):
        await driver.stop(split(handle)[name], PATIENCE_S)
        return
    with suppress(TabaneError):  # it ends with what it is in
        await run_inside(driver, handle, ("busybox", "killall", "sleep"), container=name)


async def check_discarded(bench: PodBench) -> None:
    """What an interrupted preparation left goes, whichever part it had come to."""
    assert isinstance(bench.driver, Pods)
    engine = bench.driver.engine
    for count in range(4):
        async with bench.pod(Behaviour.WAITS, Behaviour.WAITS, Behaviour.WAITS) as spec:
            await engine.open_pod(spec)
            for part in parts_of(spec)[:count]:
                part.directory.mkdir(parents=True, exist_ok=True)
                await engine.prepare(part)
            await bench.restarted().discard(spec)
            assert bench.left_of(spec) == []


POD_CHECKS: tuple[Check, ...] = (
    check_first_end,
    check_stop,
    check_inside,
    check_logs,
    check_frozen,
    check_broken_sidecar,
    check_found_ended,
)
PART_CHECKS: tuple[Check, ...] = (check_cut_short, check_discarded)
