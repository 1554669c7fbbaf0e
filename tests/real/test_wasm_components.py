"""The examples of WebAssembly, built and run for real, and what components lack."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from wasmtime import wat2wasm

from tabane.errors import UsageError
from tabane.model import ExitStatus, Reactive, Resources
from tabane.runtimes.api import Image
from tabane.runtimes.unikernel import calls
from tabane.runtimes.unikernel.host import INNER_ID
from tabane.runtimes.unikernel.wasmtime import COMPONENT_HOST_BYTES
from tabane.spec import load_app
from tabane.testing.containers import ID_BASE, make_instance
from tabane.testing.drivers import until
from tabane.testing.tracing import read_filter
from tabane.testing.wasm import make_program_image
from tabane.testing.wasm_bench import PORT, WasmBench, listening, make_app, make_images, open_bench

pytestmark = pytest.mark.real

EXAMPLES = Path(__file__).parents[2] / "examples"
SOURCES = Path(__file__).parent / "wasm"
BUILD_S = 100
ROOMY = Resources(memory_bytes=128 << 20, pids=32)


def build(example: str, ground: Path) -> Path:
    """Its program, made by its Makefile in a copy."""
    place = ground / example
    shutil.copytree(EXAMPLES / example, place)
    tools = f"PATH={Path(sys.executable).parent}:/usr/bin:/bin"
    argv = ("env", tools, "make", "-s", "-C", str(place))
    subprocess.run(argv, check=True, timeout=BUILD_S, capture_output=True)
    return place / "hello.wasm"


@pytest.fixture(scope="module")
def component(ground: Path) -> Image:
    return make_program_image(build("wasm-python", ground), ground)


@pytest.fixture
async def bench(ground: Path) -> AsyncIterator[WasmBench]:
    place = ground / "modules"
    place.mkdir(exist_ok=True, mode=0o711)
    for old in place.glob("*-tree"):
        shutil.rmtree(old)
    async with open_bench(ground, make_images(place, SOURCES)) as bench:
        yield bench


async def test_what_a_component_lacks_is_refused(bench: WasmBench, component: Image) -> None:
    for app, problem in (
        (make_app(resources=ROOMY), "its app has no port, and it exports no wasi:cli/run"),
        (
            make_app(port=PORT, resources=replace(ROOMY, memory_bytes=COMPONENT_HOST_BYTES)),
            "memory must be more than 32 MiB",
        ),
    ):
        async with make_instance(bench.ground, component, app) as spec:
            with pytest.raises(UsageError, match=problem):
                await bench.driver.prepare(spec)
            assert bench.left_of(spec) == []


async def test_the_example_in_python(bench: WasmBench, component: Image) -> None:
    """Built, compiled, confined, and asked; each request is a fresh instance."""
    declared = load_app(EXAMPLES / "wasm-python/app.toml")
    app = replace(declared, id_base=ID_BASE, port=PORT)
    async with bench.running(app, component) as inside:
        await listening(inside.link)
        for _ in range(2):
            reply = await inside.get("/some/path?x=1")
            assert reply.status == 200
            assert reply.body.startswith(b"hello from Python 3.")
            assert reply.body.endswith(b": /some/path?x=1, request 1 of mine\n")
        status = Path(f"/proc/{inside.pid}/status").read_text()
        assert "NoNewPrivs:\t1\n" in status and "Seccomp:\t2\n" in status
        assert f"Uid:\t{ID_BASE + INNER_ID}\t" in status
        assert "CapBnd:\t0000000000000000\n" in status
        assert read_filter(inside.pid) == calls.compile_lenient(calls.COMPONENT)
        seen = {path.name for path in Path(f"/proc/{inside.pid}/root").iterdir()}
        assert seen <= {"bin", "lib", "lib64", "usr", "program.cwasm"}
        await inside.driver.stop(inside.handle, 20)
        assert await inside.driver.wait(inside.handle) == ExitStatus()


async def test_a_component_that_loops_for_ever(bench: WasmBench) -> None:
    """Its time is up, as a module's: it uses no processor any more, and the next one is heard."""
    program = bench.ground / "loops.wasm"
    program.write_bytes(wat2wasm((SOURCES / "loops.wat").read_text()))
    reactive = Reactive(concurrency=1, response_timeout_s=0.5)
    app = make_app(port=PORT, resources=ROOMY, reactive=reactive)
    async with bench.running(app, make_program_image(program, bench.ground)) as inside:
        await listening(inside.link)
        for _ in range(2):
            assert (await inside.get("/")).status == 500

        async def is_at_rest() -> bool:
            before = (await inside.driver.stats(inside.handle)).cpu_us
            await asyncio.sleep(0.1)
            return (await inside.driver.stats(inside.handle)).cpu_us - before < 10_000

        await until(is_at_rest)
        await inside.driver.stop(inside.handle, 20)


async def test_a_component_is_killed_like_others(bench: WasmBench, component: Image) -> None:
    app = make_app(port=PORT, resources=ROOMY, reactive=Reactive(concurrency=1))
    async with bench.running(app, component) as inside:
        await listening(inside.link)
        await inside.driver.freeze(inside.handle)
        await inside.driver.thaw(inside.handle)
        await inside.driver.stop(inside.handle, 0)
        status = await inside.driver.wait(inside.handle)
        asked, killed = ExitStatus(signal=signal.SIGINT), ExitStatus(signal=signal.SIGKILL)
        assert status in (ExitStatus(), asked, killed)


async def test_the_example_in_c(bench: WasmBench, ground: Path) -> None:
    image = make_program_image(build("wasm-c", ground), ground, name="hello-c")
    app = replace(load_app(EXAMPLES / "wasm-c/app.toml"), id_base=ID_BASE, port=PORT)
    async with bench.running(app, image) as inside:
        for _ in range(2):
            reply = await inside.get("/there?x=y")
            assert reply.body == b"hello from C: GET /there?x=y, request 1 of mine\n"
