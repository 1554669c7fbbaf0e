"""What every `Driver` must do: the conformance suite.

Each check is a coroutine that takes a `DriverBench` (a driver, and instances of given behaviour for
it) and asserts; those of checkpoints are in `tabane.testing.checkpoints`. `check_driver` there runs
all; a test runner takes them one by one:

    @pytest.mark.parametrize("check", DRIVER_CHECKS, ids=lambda check: check.__name__)
    async def test_fake(check):
        await check(FakeBench())
"""

from __future__ import annotations

import asyncio
import errno
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import msgspec
from msgspec.structs import replace

from tabane.errors import EngineError, NotFound, Unsupported
from tabane.model import ExitStatus
from tabane.runtimes.api import (
    DEFAULTS,
    Driver,
    Execution,
    Handle,
    InstanceSpec,
    TerminalSize,
    Transfer,
)
from tabane.testing.talks import fetch, hear, make_archive, put, read_archive, run_inside

PATIENCE_S = 60.0
REFUSED = ExitStatus(errno.ENOMEM)
"""How the behaviour `EATS` ends where it gets no more memory."""
SAID = b"hello from inside"
"""What the behaviour `SAYS` writes to its log."""


class Behaviour(StrEnum):
    """What an instance's program does."""

    WAITS = "waits"
    """until it is stopped, which the stop signal does"""
    SAYS = "says"
    """a line (`SAID`), and ends with 0"""
    EXITS = "exits"
    """at once, with 3"""
    STAYS = "stays"
    """whatever the stop signal says; writes `SAID` when it is deaf to it"""
    COUNTS = "counts"
    """from 1 into its log, several lines a second, until it is stopped (see `checkpoints`)"""
    EATS = "eats"
    """memory, until it is killed for it; where it is told that there is no more, it ends with
    `REFUSED`"""
    BREAKS = "breaks"
    """its start: `prepare` works, `start` raises `EngineError`"""


class DriverBench(Protocol):
    driver: Driver

    def restarted(self) -> Driver:
        """The driver as a new agent would have it, which knows only what the engines know."""

    def instance(self, behaviour: Behaviour) -> AbstractAsyncContextManager[InstanceSpec]:
        """What is needed to start one; it is given back with the block."""

    def left_of(self, spec: InstanceSpec) -> list[str]:
        """What is there of an instance: processes, mounts, cgroups, files other than its log."""


Check = Callable[[DriverBench], Awaitable[None]]


@asynccontextmanager
async def prepared(
    bench: DriverBench, behaviour: Behaviour
) -> AsyncIterator[tuple[InstanceSpec, Handle]]:
    """An instance before its start; afterwards it is destroyed, and nothing may be left."""
    async with bench.instance(behaviour) as spec:
        handle = await bench.driver.prepare(spec)
        try:
            yield spec, handle
        finally:
            await bench.driver.destroy(handle)
        assert bench.left_of(spec) == []


@asynccontextmanager
async def started(
    bench: DriverBench, behaviour: Behaviour
) -> AsyncIterator[tuple[InstanceSpec, Handle]]:
    """An instance whose program runs."""
    async with prepared(bench, behaviour) as (spec, handle):
        yield spec, await bench.driver.start(spec, handle)


async def check_probe(bench: DriverBench) -> None:
    """A driver that works says so, with its version or the like, and tells how it protects."""
    probe = await bench.driver.probe()
    assert probe.works, probe.reason
    assert probe.reason
    assert [row.default for row in bench.driver.enforcements()] == list(DEFAULTS)


async def check_life(bench: DriverBench) -> None:
    """Prepare, start, run, stop: the stop signal ends it, and its end is told."""
    async with started(bench, Behaviour.WAITS) as (_, handle):
        assert isinstance(handle.data["pid"], int) and handle.data["pid"] > 0
        ended = asyncio.ensure_future(bench.driver.wait(handle))
        await asyncio.sleep(0)
        assert not ended.done()
        await bench.driver.stop(handle, PATIENCE_S)
        assert await ended == ExitStatus(signal=signal.SIGTERM)


async def check_handle(bench: DriverBench) -> None:
    """A handle is a value: written down and read again it is the same."""
    async with started(bench, Behaviour.WAITS) as (spec, handle):
        assert handle.driver == bench.driver.name
        assert handle.id == spec.id
        assert msgspec.json.decode(msgspec.json.encode(handle), type=Handle) == handle


async def check_exit_status(bench: DriverBench) -> None:
    """The program's own code, asked before or after its end, once or more often."""
    async with started(bench, Behaviour.EXITS) as (_, handle):
        driver = bench.driver
        both = await asyncio.gather(driver.wait(handle), driver.wait(handle))
        assert [*both, await driver.wait(handle)] == [ExitStatus(3)] * 3


async def check_log(bench: DriverBench) -> None:
    """What the program writes is in its log when it has ended, and stays after `destroy`."""
    async with started(bench, Behaviour.SAYS) as (spec, handle):
        assert await bench.driver.wait(handle) == ExitStatus()
        await bench.driver.destroy(handle)
        assert SAID in spec.log.read_bytes()


async def check_stubborn(bench: DriverBench) -> None:
    """Who does not follow the stop signal is killed after the time-out."""
    async with started(bench, Behaviour.STAYS) as (spec, handle):
        await wait_until_said(spec)
        await bench.driver.stop(handle, 0.3)
        assert await bench.driver.wait(handle) == ExitStatus(signal=signal.SIGKILL)


async def check_out_of_memory(bench: DriverBench) -> None:
    """Who takes more memory than it may is killed, and the reason is told; or it gets no more."""
    async with started(bench, Behaviour.EATS) as (_, handle):
        status = await bench.driver.wait(handle)
        assert status in (ExitStatus(signal=signal.SIGKILL, oom=True), REFUSED)


async def check_repeats(bench: DriverBench) -> None:
    """Stop, thaw and destroy of what is stopped, running or gone do nothing."""
    async with started(bench, Behaviour.WAITS) as (_, handle):
        driver = bench.driver
        if driver.capabilities.freeze:
            await driver.thaw(handle)
        for _ in range(2):
            await driver.stop(handle, PATIENCE_S)
        for _ in range(2):
            await driver.destroy(handle)
        await driver.stop(handle, PATIENCE_S)


async def check_never_started(bench: DriverBench) -> None:
    """What was prepared and then given up leaves nothing."""
    async with prepared(bench, Behaviour.WAITS) as (_, handle):
        await bench.driver.stop(handle, PATIENCE_S)
        assert await bench.driver.processes(handle) == []


async def check_interrupted_prepare(bench: DriverBench) -> None:
    """What was prepared and nobody has the handle of can be removed all the same, once or more
    often; so can what was not even begun."""
    async with bench.instance(Behaviour.WAITS) as spec:
        await bench.restarted().discard(spec)
        await bench.driver.prepare(spec)
        again = bench.restarted()
        for _ in range(2):
            await again.discard(spec)
        assert bench.left_of(spec) == []


async def check_broken_start(bench: DriverBench) -> None:
    """A start that the engine refuses raises with the engine's words, and leaves nothing."""
    async with prepared(bench, Behaviour.BREAKS) as (spec, handle):
        try:
            await bench.driver.start(spec, handle)
        except EngineError as error:
            assert error.output and error.status
        else:
            raise AssertionError("the start did not fail")


async def check_cancelled_start(bench: DriverBench) -> None:
    """A start that is given up at any point leaves nothing after `destroy`."""
    for turns in (0, 1, 3):
        async with prepared(bench, Behaviour.WAITS) as (spec, handle):
            start = asyncio.ensure_future(bench.driver.start(spec, handle))
            for _ in range(turns):
                await asyncio.sleep(0)
            start.cancel()
            with suppress(asyncio.CancelledError):
                await start


async def check_destroy_running(bench: DriverBench) -> None:
    """Destroying what runs ends it."""
    async with started(bench, Behaviour.STAYS) as (_, handle):
        await bench.driver.destroy(handle)
        assert await bench.driver.processes(handle) == []


async def check_many(bench: DriverBench) -> None:
    """Several at once do not disturb each other."""

    async def live() -> None:
        async with started(bench, Behaviour.EXITS) as (_, handle):
            assert await bench.driver.wait(handle) == ExitStatus(3)

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(live())


async def check_freeze(bench: DriverBench) -> None:
    """Frozen and thawed it is the same process; what is frozen can be stopped."""
    driver = bench.driver
    async with started(bench, Behaviour.WAITS) as (_, handle):
        if not driver.capabilities.freeze:
            await refused(driver.freeze(handle))
            return
        await driver.freeze(handle)
        await driver.freeze(handle)
        assert handle.data["pid"] in await driver.processes(handle)
        await driver.thaw(handle)
        await driver.freeze(handle)
        await driver.stop(handle, PATIENCE_S)
        assert await driver.wait(handle) == ExitStatus(signal=signal.SIGTERM)


async def check_exec(bench: DriverBench) -> None:
    """A command runs inside, its output comes back, and it reads what it is given."""
    driver = bench.driver
    async with started(bench, Behaviour.WAITS) as (_, handle):
        if not driver.capabilities.exec:
            await refused(driver.exec(handle, Execution(("echo",))))
            return
        result = await run_inside(driver, handle, ("echo", "it", "works"))
        assert result == (0, b"it works\n", b"")
        again = await run_inside(driver, handle, ("cat",), given=[b"give", b"n"])
        assert again == (0, b"given", b"")
        assert (await run_inside(driver, handle, ("cat",))).stdout == b""
        missing = await run_inside(driver, handle, ("no-such-program",))
        assert missing.code == 127
        assert b"no-such-program" in missing.stderr


async def check_left_holding(bench: DriverBench) -> None:
    """A command has ended when its program has, whoever of those it leaves behind still has its
    output, and all that the program said is there."""
    driver = bench.driver
    async with started(bench, Behaviour.WAITS) as (_, handle):
        if not driver.capabilities.exec:
            return
        script = "sleep 1008 & echo said; exit 3"
        ended = await run_inside(driver, handle, ("sh", "-c", script), given=[])
        assert ended == (3, b"said\n", b"")


async def check_terminal(bench: DriverBench) -> None:
    """A command has a terminal of its own: its size, its echo, its keys."""
    driver, size = bench.driver, TerminalSize(33, 77)
    async with started(bench, Behaviour.WAITS) as (_, handle):
        if not driver.capabilities.terminal:
            await refused(driver.exec(handle, Execution(("cat",), terminal=size)))
            return
        measure = ("sh", "-c", "read -r word; stty size")
        shown = await run_inside(driver, handle, measure, given=[b"\n"], terminal=size)
        assert shown == (0, b"\r\n33 77\r\n", b""), shown
        typed = await run_inside(driver, handle, ("cat",), given=[b"hi\n"], terminal=size)
        assert typed == (0, b"hi\r\nhi\r\n", b""), typed
        talk = await driver.exec(handle, Execution(("cat",), stdin=True, terminal=size))
        try:
            await talk.write(b"go on\n")
            await hear(talk, b"go on\r\ngo on\r\n")
            await talk.write(b"\x03")
            assert await talk.wait() == 128 + signal.SIGINT
        finally:
            await talk.aclose()


async def check_left(bench: DriverBench) -> None:
    """A command that nobody wants any more ends, and leaves nothing; signals end it, too."""
    driver = bench.driver
    size = TerminalSize(24, 80) if driver.capabilities.terminal else None
    async with started(bench, Behaviour.STAYS) as (spec, handle):
        if not driver.capabilities.exec:
            return
        await wait_until_said(spec)
        before = await processes_of(driver, handle)
        for terminal in {None, size}:
            for _ in range(2):
                talk = await driver.exec(handle, Execution(("cat",), stdin=True, terminal=terminal))
                await talk.write(b"hi\n")
                await hear(talk, b"hi")
                await talk.aclose()
                await talk.aclose()
            assert await processes_of(driver, handle) == before
            talk = await driver.exec(handle, Execution(("cat",), stdin=True, terminal=terminal))
            await talk.write(b"hi\n")
            await hear(talk, b"hi")
            await talk.signal(signal.SIGTERM)
            assert await talk.wait() == 128 + signal.SIGTERM
            await talk.aclose()


async def processes_of(driver: Driver, handle: Handle) -> list[int]:
    """Pids of what runs: as inside, where a kernel of its own runs it, else as on the node."""
    if driver.capabilities.guest_processes:
        return sorted(process.pid for process in await driver.guest_processes(handle))
    return sorted(await driver.processes(handle))


async def check_copy(bench: DriverBench) -> None:
    """Files come in with their modes, and out again."""
    driver = bench.driver
    async with started(bench, Behaviour.WAITS) as (_, handle):
        if not driver.capabilities.copy:
            await refused(driver.copy(handle, Transfer("/tmp", inward=False)))
            return
        archive = make_archive({"copied": b"some words"})
        assert await put(driver, handle, "/tmp/copied", archive, as_named=True) == (0, b"", b"")
        out = await fetch(driver, handle, "/tmp/copied")
        assert (out.code, out.stderr) == (0, b"")
        assert read_archive(out.stdout) == {"copied": (b"some words", 0o640)}
        missing = await fetch(driver, handle, "/tmp/nowhere")
        assert (missing.code, missing.stdout) == (1, b"")
        assert b"/tmp/nowhere" in missing.stderr


async def check_stats(bench: DriverBench) -> None:
    """What it uses, and its processes, among them the one of the handle."""
    driver = bench.driver
    async with started(bench, Behaviour.WAITS) as (_, handle):
        assert handle.data["pid"] in await driver.processes(handle)
        if not driver.capabilities.stats:
            await refused(driver.stats(handle))
            return
        stats = await driver.stats(handle)
        assert stats.memory_bytes > 0 and stats.pids > 0 and stats.cpu_us >= 0
        assert stats.oom_kills == 0


async def check_limit(bench: DriverBench) -> None:
    """Limits change while it runs, and back again: the processor's, and each of the others, unless
    it is refused as one that cannot."""
    driver = bench.driver
    async with started(bench, Behaviour.WAITS) as (spec, handle):
        limits = spec.app.resources
        if not driver.capabilities.limit:
            await refused(driver.limit(handle, limits))
            return
        await driver.limit(handle, replace(limits, cpu=2 * limits.cpu))
        more_memory = replace(limits, memory_bytes=2 * limits.memory_bytes)
        for more in (more_memory, replace(limits, pids=2 * limits.pids)):
            with suppress(Unsupported):
                await driver.limit(handle, more)
        await driver.limit(handle, limits)


async def check_guest_processes(bench: DriverBench) -> None:
    """What runs inside, where the node cannot see it."""
    driver = bench.driver
    async with started(bench, Behaviour.WAITS) as (_, handle):
        if not driver.capabilities.guest_processes:
            await refused(driver.guest_processes(handle))
            return
        found = await driver.guest_processes(handle)
        assert found
        pids = [process.pid for process in found]
        assert all(pid > 0 for pid in pids) and len(set(pids)) == len(pids)
        assert all(process.inside in ("sandbox", "guest", "wasm") for process in found)


async def check_ended(bench: DriverBench) -> None:
    """What has ended can be neither frozen, measured nor entered."""
    driver = bench.driver
    async with started(bench, Behaviour.EXITS) as (spec, handle):
        await driver.wait(handle)
        for able, verb in (
            (driver.capabilities.freeze, driver.freeze(handle)),
            (driver.capabilities.stats, driver.stats(handle)),
            (driver.capabilities.exec, driver.exec(handle, Execution(("true",)))),
            (driver.capabilities.copy, driver.copy(handle, Transfer("/", inward=False))),
            (driver.capabilities.limit, driver.limit(handle, spec.app.resources)),
        ):
            await refused(verb, NotFound if able else Unsupported)


async def check_unsupported(bench: DriverBench) -> None:
    """Verbs that are not among the capabilities are refused with a reason, and harm nothing."""
    driver = bench.driver
    async with started(bench, Behaviour.WAITS) as (spec, handle):
        if not driver.capabilities.checkpoint:
            await refused(driver.checkpoint(handle, Path("/nonexistent"), leave_running=True))
        if not driver.capabilities.restore:
            await refused(driver.restore(spec, handle, Path("/nonexistent")))
        assert await driver.processes(handle)


async def check_recover(bench: DriverBench) -> None:
    """After a restart of the agent the same instance is found, and can be led to its end."""
    async with started(bench, Behaviour.WAITS) as (spec, handle):
        again = bench.restarted()
        found = await again.recover(spec, handle)
        assert found is not None and found.data["pid"] == handle.data["pid"]
        await again.stop(found, PATIENCE_S)
        assert await again.wait(found) == ExitStatus(signal=signal.SIGTERM)
        assert await again.recover(spec, handle) is None
        await again.destroy(found)


async def check_recover_early(bench: DriverBench) -> None:
    """Also if the agent ended before it wrote down that the start was done, or had begun."""
    async with prepared(bench, Behaviour.WAITS) as (spec, handle):
        assert await bench.restarted().recover(spec, handle) is None
        done = await bench.driver.start(spec, handle)
        found = await bench.restarted().recover(spec, handle)
        assert found is not None and found.data["pid"] == done.data["pid"]


async def wait_until_said(spec: InstanceSpec, words: bytes = SAID) -> None:
    """Wait for `words` in the log."""

    async def said() -> bool:
        return spec.log.exists() and words in spec.log.read_bytes()

    await until(said)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Ask again and again, `PATIENCE_S` at most, for what nobody tells by itself."""
    async with asyncio.timeout(PATIENCE_S):
        while not await condition():  # noqa: ASYNC110 - a log or a /proc file has no event
            await asyncio.sleep(0.002)


async def refused(verb: Coroutine[Any, Any, object], error: type[Exception] = Unsupported) -> None:
    """Assert that `verb` raises `error` with a text."""
    try:
        await verb
    except error as refusal:
        assert str(refusal)
    else:
        raise AssertionError(f"it was not refused with {error.__name__}")


DRIVER_CHECKS: tuple[Check, ...] = (
    check_probe,
    check_life,
    check_handle,
    check_exit_status,
    check_log,
    check_stubborn,
    check_out_of_memory,
    check_repeats,
    check_never_started,
    check_interrupted_prepare,
    check_broken_start,
    check_cancelled_start,
    check_destroy_running,
    check_many,
    check_freeze,
    check_exec,
    check_terminal,
    check_left,
    check_left_holding,
    check_copy,
    check_stats,
    check_limit,
    check_guest_processes,
    check_ended,
    check_unsupported,
    check_recover,
    check_recover_early,
)
