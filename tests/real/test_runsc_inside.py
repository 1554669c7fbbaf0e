"""What is done to a sandbox that runs: entered, copied, frozen, asked, and killed in parts."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from tabane.errors import Conflict, NotFound, TimedOut, Unsupported
from tabane.model import ExitStatus
from tabane.runtimes.api import Execution, TerminalSize, Transfer
from tabane.runtimes.runsc import engine
from tabane.testing.container_bench import SAY, ContainerBench, make_app
from tabane.testing.drivers import refused, until, wait_until_said
from tabane.testing.talks import fetch, hear, make_archive, put, read_archive

pytestmark = pytest.mark.real


@pytest.fixture
def bench(sandboxes: ContainerBench) -> ContainerBench:
    return sandboxes


async def test_init_reaps_orphans(bench: ContainerBench) -> None:
    script = f"for i in 1 2 3; do (sleep 0.01 &); done; {SAY}; exec sleep 1000"
    async with bench.running(make_app(("sh", "-c", script))) as inside:
        await wait_until_said(inside.spec)

        async def only_the_program() -> bool:
            found = await inside.driver.guest_processes(inside.handle)
            return [process.name for process in found] == ["init", "sleep"]

        await until(only_the_program)


async def test_processes_are_told_as_inside(bench: ContainerBench) -> None:
    async with bench.running(make_app(("sh", "-c", "sleep 1000 & wait"))) as inside:

        async def all_three() -> bool:
            """The last has a passing name until it is executed."""
            found = await inside.driver.guest_processes(inside.handle)
            return [process.name for process in found] == ["init", "sh", "sleep"]

        await until(all_three)
        found = await inside.driver.guest_processes(inside.handle)
        rows = [(p.inside, p.pid, p.ppid, p.uid, p.name) for p in found]
        assert rows == [
            ("sandbox", 1, 0, 0, "init"),
            ("sandbox", 2, 1, 0, "sh"),
            ("sandbox", 3, 2, 0, "sleep"),
        ]
        assert (await inside.driver.stats(inside.handle)).pids == 3


async def test_copies_are_seen_by_the_program_and_its_files_by_copies(
    bench: ContainerBench,
) -> None:
    """Also those that it has just written, and has open."""
    async with bench.running(make_app()) as inside:
        driver, handle = inside.driver, inside.handle
        assert (
            await inside.run("cat /srv/file")
            == "cat: can't open '/srv/file': No such file or directory\n"
        )
        for words in (b"one", b"twenty-two"):
            assert await put(driver, handle, "/srv", make_archive({"file": words})) == (0, b"", b"")
            assert await inside.run("cat /srv/file") == words.decode()
        talk = await driver.exec(
            handle, Execution(("sh", "-c", "exec >>/srv/file; read a; echo $a; read b"), stdin=True)
        )
        await talk.write(b"more\n")

        async def is_there() -> bool:
            out = await fetch(driver, handle, "/srv/file")
            return read_archive(out.stdout)["file"][0] == b"twenty-twomore\n"

        await until(is_there)
        await talk.aclose()


@pytest.mark.parametrize(
    "path", ["/proc/1/comm", "/dev/shm/x", "/dev", "/run/shm/x", "/dev/../sys"]
)
async def test_what_is_in_its_kernels_memory_is_not_copied(
    bench: ContainerBench, path: str
) -> None:
    async with bench.running(make_app()) as inside:
        await inside.run("mkdir /run; busybox ln -s /dev/shm /run/shm")
        for inward in (True, False):
            transfer = Transfer(path, inward=inward)
            with pytest.raises(Unsupported, match="in the memory of the sandbox's kernel"):
                await inside.driver.copy(inside.handle, transfer)


async def test_what_a_command_leaves_is_ended_with_it(bench: ContainerBench) -> None:
    """Given up, it is hung up on and killed, with all that it has started and that is deaf."""
    script = "trap '' HUP; (trap '' HUP TERM; sleep 1001) & echo here; sleep 1002"
    async with bench.running(make_app()) as inside:
        driver, handle = inside.driver, inside.handle
        for terminal in (None, TerminalSize(24, 80)):
            execution = Execution(("sh", "-c", script), terminal=terminal)
            talk = await driver.exec(handle, execution)
            await hear(talk, b"here")
            assert len(await driver.guest_processes(handle)) > 3
            await talk.aclose()
            found = await driver.guest_processes(handle)
            assert [process.name for process in found] == ["init", "sleep"]
        assert not list(inside.spec.directory.glob("exec-*"))


async def test_who_ends_as_what_left_it_does_is_no_harm(bench: ContainerBench) -> None:
    """gVisor takes it for the end of all when that was left to a subreaper that ends, too."""
    script = "for i in 1 2 3 4 5 6; do busybox sleep 0.0$i & done; busybox sleep 0.03"
    async with bench.running(make_app()) as inside:
        for _ in range(30):
            await inside.run(script)
        found = await inside.driver.guest_processes(inside.handle)
        assert [process.name for process in found][:2] == ["init", "sleep"]


async def test_commands_of_an_agent_that_is_gone_are_ended(bench: ContainerBench) -> None:
    async with bench.running(make_app()) as inside:
        talk = await inside.driver.exec(inside.handle, Execution(("cat",), stdin=True))
        again = bench.restarted()
        assert await again.recover(inside.spec, inside.handle) is not None
        found = await again.guest_processes(inside.handle)
        assert [process.name for process in found] == ["init", "sleep"]
        assert not list(inside.spec.directory.glob("exec-*"))
        await talk.aclose()


async def test_a_frozen_sandbox_stands_still(bench: ContainerBench) -> None:
    script = "while :; do echo tick; done > /dev/null"
    async with bench.running(make_app(("sh", "-c", script))) as inside:
        driver, handle = inside.driver, inside.handle
        await driver.freeze(handle)
        first = (await driver.stats(handle)).cpu_us
        await asyncio.sleep(0.05)
        assert (await driver.stats(handle)).cpu_us == first
        await refused(driver.guest_processes(handle), Conflict)
        await refused(driver.exec(handle, Execution(("true",))), Conflict)
        out = await fetch(driver, handle, "/etc/passwd")
        assert b"root:x" in read_archive(out.stdout)["passwd"][0]
        await driver.thaw(handle)

        async def moves() -> bool:
            return (await driver.stats(handle)).cpu_us > first

        await until(moves)
        assert await driver.guest_processes(handle)


async def test_a_sandbox_that_does_not_answer(
    bench: ContainerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked of it fails in time, and what is not waited for any more is let go."""
    monkeypatch.setattr(engine, "ANSWER_TIMEOUT_S", 0.3)
    monkeypatch.setattr("tabane.runtimes.inside.ENGINE_TIMEOUT_S", 0.3)
    async with bench.running(make_app()) as inside:
        driver, handle, pid = inside.driver, inside.handle, inside.handle.data["pid"]
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGSTOP)
        await refused(driver.guest_processes(handle), TimedOut)
        await refused(driver.stats(handle), TimedOut)
        for terminal in (None, TerminalSize(24, 80)):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await driver.exec(handle, Execution(("true",), terminal=terminal))
        assert not list(inside.spec.directory.glob("exec-*"))
        await driver.stop(handle, 0.1)
        assert await driver.wait(handle) == ExitStatus(signal=signal.SIGKILL)


@pytest.mark.parametrize("who", ["pid", "file_server"])
async def test_a_part_that_is_killed_ends_all_of_it(bench: ContainerBench, who: str) -> None:
    async with bench.running(make_app()) as inside:
        pid = inside.handle.data[who]
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            status = await inside.driver.wait(inside.handle)
        assert status.signal or status.code
        with pytest.raises(NotFound):
            await inside.driver.copy(inside.handle, Transfer("/etc", inward=False))
