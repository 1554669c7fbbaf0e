"""Commands inside a container run as its main process does, and end as a shell would say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from tabane.errors import TimedOut
from tabane.model import App
from tabane.runtimes import inside as inside_module
from tabane.runtimes import load
from tabane.runtimes.api import Driver, Handle, Image, InstanceSpec, User
from tabane.supervise import Supervisor
from tabane.testing.containers import (
    ID_BASE,
    SMALL,
    make_instance,
    make_tree,
    open_directory,
    without_unified,
)
from tabane.testing.drivers import until
from tabane.testing.spawner import PlainSpawner

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def ground() -> Iterator[Path]:
    with without_unified(), open_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def image(ground: Path) -> Image:
    return make_tree(ground)


@dataclass
class Bench:
    driver: Driver
    ground: Path
    image: Image

    @asynccontextmanager
    async def running(self, app: App, image: Image | None = None) -> AsyncIterator[Running]:
        async with make_instance(self.ground, image or self.image, app) as spec:
            handle = await self.driver.prepare(spec)
            try:
                yield Running(self.driver, spec, await self.driver.start(spec, handle))
            finally:
                await self.driver.destroy(handle)
            assert not list(spec.directory.iterdir())


@dataclass
class Running:
    driver: Driver
    spec: InstanceSpec
    handle: Handle


@pytest.fixture(params=["crun", "runc"])
async def bench(request: pytest.FixtureRequest, ground: Path, image: Image) -> AsyncIterator[Bench]:
    spawner = PlainSpawner()
    driver = load(request.param, spawner, ground / request.param)
    yield Bench(driver, ground, image)
    driver.close()
    await spawner.aclose()


def make_app(command: tuple[str, ...] = ()) -> App:
    return App(name="app", image="test", command=command, resources=SMALL, id_base=ID_BASE)


INSIDE = ("sh", "-c", "id -u; id -g; id -G; pwd; echo $A; grep -E '^(Cap|NoNew|Sec)' "
          "/proc/self/status; ulimit -n")  # fmt: skip


async def test_a_command_runs_as_the_main_process_does(bench: Bench) -> None:
    image = replace(
        bench.image, user="web", workdir="/srv", env=("A=image",), digest="sha256:" + "5" * 64
    )
    app = make_app(("sh", "-c", f"({INSIDE[2]}); exec sleep 1000"))
    async with bench.running(app, image) as inside:
        run = partial(inside.driver.exec, inside.handle, timeout_s=20)

        async def has_said() -> bool:
            return inside.spec.log.exists() and inside.spec.log.read_text().count("\n") >= 14

        await until(has_said)
        here = await run(INSIDE)
        said = inside.spec.log.read_text().splitlines()
        assert here.stdout.decode().splitlines() == said
        assert said[:5] == ["33", "34", "34 44", "/srv", "image"]
        assert "Seccomp:\t2" in said
        root = await run(INSIDE, user=User(0, 0), workdir="/tmp")
        lines = root.stdout.decode().splitlines()
        assert lines[:5] == ["0", "0", "0", "/tmp", "image"]
        assert "NoNewPrivs:\t1" in lines
        assert "Seccomp:\t2" in lines
        assert [line for line in lines if "CapBnd" in line] == [
            line for line in said if "CapBnd" in line
        ]


@pytest.mark.parametrize(
    ("program", "code", "words"),
    [
        ("nothing", 127, "nothing: not found (looked in "),
        ("/bin/nothing", 127, "/bin/nothing: not found"),
        ("/etc/passwd", 126, "/etc/passwd: cannot be executed"),
        ("/etc", 126, "/etc: cannot be executed"),
    ],
)
async def test_a_program_that_cannot_run(bench: Bench, program: str, code: int, words: str) -> None:
    async with bench.running(make_app()) as inside:
        ended = await inside.driver.exec(inside.handle, (program,), timeout_s=20)
        assert (ended.code, ended.stdout) == (code, b"")
        assert words in ended.stderr.decode()


async def test_input_that_goes_on_after_the_command(bench: Bench) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b"one\n"
        await asyncio.Event().wait()

    async with bench.running(make_app()) as inside:
        first = ("sh", "-c", "read -r word; echo $word")
        ended = await inside.driver.exec(inside.handle, first, timeout_s=20, stdin=endless())
        assert (ended.code, ended.stdout) == (0, b"one\n")


FAMILY = "setsid sleep 1001 & (sleep 1002 &) ; echo $$; sleep 1003"
"""A process in a session of its own, one whose parent has ended, and one that is waited for."""


async def sleeping(inside: Running) -> set[str]:
    """The commands of those that sleep, the main process left out."""
    lines = set()
    for pid in await inside.driver.processes(inside.handle):
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        lines.add(" ".join(words).strip())
    return {line for line in lines if line.startswith("sleep 100")} - {"sleep 1000"}


async def test_a_timeout_ends_all_that_a_command_started(bench: Bench) -> None:
    async with bench.running(make_app()) as inside:
        with pytest.raises(TimedOut, match="was killed"):
            await inside.driver.exec(inside.handle, ("sh", "-c", FAMILY), timeout_s=0.5)
        assert await sleeping(inside) == set()


async def test_so_does_one_who_does_not_wait_for_it(bench: Bench) -> None:
    async with bench.running(make_app()) as inside:
        command = inside.driver.exec(inside.handle, ("sh", "-c", FAMILY), timeout_s=60)

        async def all_sleep() -> bool:
            return len(await sleeping(inside)) == 3

        async with Supervisor("test") as tasks:
            tasks.start("exec", command)
            await until(all_sleep)
        assert await sleeping(inside) == set()


async def test_output_is_cut_where_it_is_too_much(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inside_module, "MAX_OUTPUT_BYTES", 1000)
    async with bench.running(make_app()) as inside:
        many = ("sh", "-c", "head -c 300000 /dev/zero; echo error >&2; exit 3")
        ended = await inside.driver.exec(inside.handle, many, timeout_s=20)
        assert (ended.code, ended.stdout) == (3, bytes(1000))
        assert ended.stderr == b"error\ntabane: stdout was cut after 1000 bytes\n"


async def test_input_that_breaks_off_ends_the_command(bench: Bench) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"some"
        raise OSError("gone")

    async with bench.running(make_app()) as inside:
        with pytest.raises(OSError, match="gone"):
            await inside.driver.exec(inside.handle, ("cat",), timeout_s=20, stdin=broken())
