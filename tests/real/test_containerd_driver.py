"""containerd with runc's shim keeps to the interface, whatever of it is killed meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from tabane.errors import TabaneError
from tabane.model import ExitStatus
from tabane.runtimes.api import Execution, Image, TerminalSize
from tabane.runtimes.containerd.client import Client
from tabane.runtimes.containerd.shims import socket_of
from tabane.testing.container_bench import make_app
from tabane.testing.containerd import ContainerdBench, engine_of, make_bench, make_driver
from tabane.testing.containers import (
    make_instance,
)
from tabane.testing.drivers import (
    DRIVER_CHECKS,
    SAID,
    Check,
    until,
    wait_until_said,
)
from tabane.testing.talks import hear, run_inside

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("no_hybrid")]


@pytest.fixture
async def bench(ground: Path, image: Image) -> AsyncIterator[ContainerdBench]:
    made = make_bench(ground, image)
    yield made
    await made.aclose()


@pytest.mark.parametrize("check", DRIVER_CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check: Check, bench: ContainerdBench) -> None:
    await check(bench)


async def test_containerd_killed_while_an_instance_runs(bench: ContainerdBench) -> None:
    """The instance goes on, whoever waits for its end learns it, and all verbs work."""
    script = "trap 'echo bye; exit 5' TERM; echo hello from inside; while :; do sleep 0.01; done"
    async with bench.running(make_app(("sh", "-c", script))) as (_, spec, handle):
        await wait_until_said(spec)
        ended = asyncio.ensure_future(bench.driver.wait(handle))
        await asyncio.sleep(0)
        bench.kill_containerd()
        assert await run_inside(bench.driver, handle, ("echo", "on")) == (0, b"on\n", b"")
        await bench.driver.freeze(handle)
        bench.kill_containerd()
        await bench.driver.thaw(handle)
        await bench.driver.freeze(handle)
        await bench.driver.stop(handle, 20)
        assert await ended == ExitStatus(5)
        assert spec.log.read_text() == "hello from inside\nbye\n"


@pytest.mark.parametrize("call", ["create_container", "create", "start"])
async def test_containerd_killed_while_one_starts(
    bench: ContainerdBench, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it had done by then is cleared away."""
    await bench.driver.probe()
    seen = asyncio.Event()
    ask = Client.call

    async def tell(self: Client, name: str, /, **fields: object) -> object:
        asking = asyncio.ensure_future(ask(self, name, **fields))
        if name == call and not seen.is_set():
            seen.set()
            await until(is_under_way)
            bench.kill_containerd()
        return await asking

    async def is_under_way() -> bool:
        return call != "create" or bench.pid_of("containerd-shim-runc-v2", spec.id) > 0

    monkeypatch.setattr(Client, "call", tell)
    async with make_instance(bench.ground, bench.image, make_app()) as spec:
        handle = await bench.driver.prepare(spec)
        with suppress(TabaneError):  # the call may have been through by then
            handle = await bench.driver.start(spec, handle)
        assert seen.is_set()
        await bench.driver.destroy(handle)
        assert bench.left_of(spec) == []
        assert bench.pid_of("containerd-shim-runc-v2", spec.id) == 0


async def test_a_killed_shim_ends_its_instance(bench: ContainerdBench) -> None:
    async with bench.running(make_app()) as (_, spec, handle):
        address = bench.ground / "containerd/daemon/containerd.sock"
        left = socket_of(address, "tabane", spec.id)
        assert left.is_socket()
        os.kill(bench.pid_of("containerd-shim-runc-v2", spec.id), signal.SIGKILL)
        assert await bench.driver.wait(handle) == ExitStatus(signal=signal.SIGKILL)
    assert not left.exists()


async def test_no_containerd_can_be_had_any_more(
    bench: ContainerdBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs can still be destroyed."""
    async with bench.running(make_app()) as (_, spec, handle):
        bench.kill_containerd()
        with monkeypatch.context() as patched:
            patched.setenv("PATH", "/nonexistent")
            await bench.driver.destroy(handle)
        assert bench.pid_of("containerd-shim-runc-v2", spec.id) == 0
        assert await bench.driver.processes(handle) == []


async def test_commands_of_an_agent_that_was_killed_end(bench: ContainerdBench) -> None:
    command = ("sh", "-c", f"echo {SAID.decode()}; exec sleep 1000")
    async with bench.running(make_app(command)) as (_, spec, handle):
        await wait_until_said(spec)
        before = sorted(await bench.driver.processes(handle))
        talks = []
        for terminal in (None, TerminalSize(24, 80)):
            execution = Execution(("cat",), stdin=True, terminal=terminal)
            talks.append(await bench.driver.exec(handle, execution))
            await talks[-1].write(b"hi\n")
            await hear(talks[-1], b"hi")
        again = bench.restarted()
        assert await again.recover(spec, handle) == handle

        async def none_is_left() -> bool:  # its parent reaps it in a moment
            return sorted(await again.processes(handle)) == before

        await until(none_is_left)
        for talk in talks:
            await talk.aclose()


async def test_an_existing_containerd_is_used(
    bench: ContainerdBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.daemon_up()
    monkeypatch.setenv(
        "CONTAINERD_ADDRESS", str(bench.ground / "containerd/daemon/containerd.sock")
    )
    place = bench.ground / "other"
    place.mkdir()
    other = ContainerdBench(
        make_driver(bench.spawner, place), bench.spawner, bench.ground, bench.image
    )
    assert (await other.driver.probe()).works
    async with other.running(make_app(("sh", "-c", "exit 3"))) as (_, _, handle):
        assert await other.driver.wait(handle) == ExitStatus(3)
    await engine_of(other.driver).end()
    bench.kill_containerd()
    probe = await bench.restarted().probe()
    assert not probe.works and "no containerd answers at" in probe.reason


async def test_a_containerd_elsewhere_is_refused(
    bench: ContainerdBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in another mount namespace would not see the instances' root file systems."""
    path = bench.ground / "elsewhere.sock"
    script = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen();"
        "print(flush=True); sys.stdin.read()"
    )
    elsewhere = await asyncio.create_subprocess_exec(
        *("unshare", "--mount", sys.executable, "-c", script, str(path)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert elsewhere.stdout is not None
    await elsewhere.stdout.readline()
    monkeypatch.setenv("CONTAINERD_ADDRESS", str(path))
    probe = await bench.restarted().probe()
    elsewhere.kill()
    await elsewhere.communicate()
    assert (probe.works, "another mount namespace" in probe.reason) == (False, True)


async def test_what_is_missing_is_said(
    bench: ContainerdBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    probe = await bench.restarted().probe()
    assert not probe.works and probe.reason.startswith("containerd is not installed")


async def test_a_containerd_that_cannot_start_says_where_to_look(
    bench: ContainerdBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "containerd"
    broken.write_text("#!/bin/sh\necho no way >&2; exit 4\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    probe = await bench.driver.probe()
    assert not probe.works
    assert probe.reason.startswith("containerd exited with code 4 at its start: see ")
    assert "no way" in (bench.ground / "containerd/containerd.log").read_text()
