"""Commands inside a container run as its main process does, and end as a shell would say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from tabane.errors import EngineError
from tabane.model import App
from tabane.runtimes import ending, load
from tabane.runtimes import inside as inside_module
from tabane.runtimes import terminal as terminal_module
from tabane.runtimes.api import (
    Driver,
    Execution,
    Handle,
    Image,
    InstanceSpec,
    TerminalSize,
    User,
)
from tabane.supervise import Supervisor
from tabane.testing.containers import (
    ID_BASE,
    SMALL,
    make_instance,
)
from tabane.testing.drivers import until
from tabane.testing.spawner import PlainSpawner
from tabane.testing.talks import hear, hear_out, run_inside

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("no_hybrid")]


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
        run = partial(run_inside, inside.driver, inside.handle)

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
        ended = await run_inside(inside.driver, inside.handle, (program,))
        assert (ended.code, ended.stdout) == (code, b"")
        assert words in ended.stderr.decode()


async def test_input_that_goes_on_after_the_command(bench: Bench) -> None:
    async with bench.running(make_app()) as inside:
        first = Execution(("sh", "-c", "read -r word; echo $word"), stdin=True)
        talk = await inside.driver.exec(inside.handle, first)
        await talk.write(b"one\n")
        assert await hear_out(talk) == (0, b"one\n", b"")


async def test_streams_can_be_opened_by_name(bench: Bench) -> None:
    """As programs do that are told to log to /dev/stderr, whoever their user is."""
    async with bench.running(make_app()) as inside:
        script = "echo said >/dev/stdout; echo complained >/dev/stderr; cat /dev/stdin"
        for user in (User(33, 33), User(0, 0)):
            ended = await run_inside(
                inside.driver, inside.handle, ("sh", "-c", script), given=[b"read"], user=user
            )
            assert ended == (0, b"said\nread", b"complained\n")


async def test_what_the_engine_refuses_is_said(bench: Bench) -> None:
    """As a user that the container has no number for."""
    async with bench.running(make_app()) as inside:
        with pytest.raises(
            EngineError, match=r"true could not be run in .*: .*([Ii]nvalid|unmapped user)"
        ):
            await run_inside(inside.driver, inside.handle, ("true",), user=User(70_000, 70_000))
        assert not list(inside.spec.directory.glob("exec-*"))


async def test_what_is_left_of_a_command_that_ended_lives_on(bench: Bench) -> None:
    async with bench.running(make_app()) as inside:
        await run_inside(inside.driver, inside.handle, ("sh", "-c", "sleep 1009 &"))

        async def it_sleeps() -> bool:  # it may still be a shell that is about to be sleep
            return await sleeping(inside) == {"sleep 1009"}

        await until(it_sleeps)
        assert await it_sleeps()


@pytest.mark.parametrize("terminal", [None, TerminalSize(24, 80)])
async def test_a_command_of_a_frozen_instance_ends_once_it_is_thawed(
    bench: Bench, terminal: TerminalSize | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (inside_module, terminal_module):
        monkeypatch.setattr(module, "END_TIMEOUT_S", 0.2)
    monkeypatch.setattr(ending, "HANGUP_S", 0.1)
    async with bench.running(make_app()) as inside:
        command = Execution(("sh", "-c", "echo ready; sleep 1001"), terminal=terminal)
        talk = await inside.driver.exec(inside.handle, command)
        await hear(talk, b"ready")
        await inside.driver.freeze(inside.handle)
        await talk.aclose()
        await inside.driver.thaw(inside.handle)

        async def none_sleep() -> bool:
            return not await sleeping(inside)

        await until(none_sleep)


FAMILY = "setsid sleep 1001 & (sleep 1002 &) ; echo $$; sleep 1003"
"""A process in a session of its own, one whose parent has ended, and one that is waited for."""


async def sleeping(inside: Running) -> set[str]:
    """The commands of those that sleep, the main process left out."""
    lines = set()
    for pid in await inside.driver.processes(inside.handle):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            lines.add(" ".join(words).strip())
    return {line for line in lines if line.startswith("sleep 100")} - {"sleep 1000"}


@pytest.mark.parametrize("terminal", [None, TerminalSize(24, 80)])
async def test_who_does_not_wait_ends_all_that_a_command_started(
    bench: Bench, terminal: TerminalSize | None
) -> None:
    async with bench.running(make_app()) as inside:

        async def all_sleep() -> bool:
            return len(await sleeping(inside)) == 3

        talk = await inside.driver.exec(
            inside.handle, Execution(("sh", "-c", FAMILY), terminal=terminal)
        )
        await until(all_sleep)
        await talk.aclose()
        assert await sleeping(inside) == set()


DEAF = (
    "trap '' HUP; trap 'echo hung up >&2' TERM; (trap '' HUP; sleep 1004) & echo ready; cat; wait"
)


@pytest.mark.parametrize("terminal", [None, TerminalSize(24, 80)])
async def test_who_is_deaf_to_the_hangup_is_killed(
    bench: Bench, terminal: TerminalSize | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "HANGUP_S", 0.1)
    async with bench.running(make_app()) as inside:
        command = Execution(("sh", "-c", DEAF), stdin=True, terminal=terminal)
        talk = await inside.driver.exec(inside.handle, command)
        await hear(talk, b"ready")
        await talk.aclose()
        assert await sleeping(inside) == set()


async def test_a_command_that_never_reads_its_input_ends_with_its_client(bench: Bench) -> None:
    async with bench.running(make_app()) as inside:
        talk = await inside.driver.exec(inside.handle, Execution(("sleep", "1005"), stdin=True))
        async with Supervisor("test") as tasks:
            writing = tasks.start("write", talk.write(bytes(1 << 20)))
            await asyncio.wait([writing], timeout=0.1)
            assert not writing.done()
            await talk.aclose()
            await writing
        assert await sleeping(inside) == set()


async def test_output_waits_for_who_reads_it(bench: Bench) -> None:
    """What nobody asks for is not taken, and all of it comes in the end."""
    async with bench.running(make_app()) as inside:
        argv = ("sh", "-c", "head -c 3000000 /dev/zero; echo error >&2; exit 3")
        talk = await inside.driver.exec(inside.handle, Execution(argv))
        first = await talk.stdout.read()
        ended = asyncio.ensure_future(talk.wait())
        await asyncio.wait([ended], timeout=0.2)
        assert not ended.done()
        code, rest, error = await hear_out(talk)
        assert (code, len(first) + len(rest), error) == (3, 3_000_000, b"error\n")
        assert await ended == 3


async def test_a_terminal_is_the_program_s_own(bench: Bench) -> None:
    """Job control, resizing, raw bytes, and a hang-up when it is closed."""
    async with bench.running(make_app()) as inside:
        size = TerminalSize(24, 80)
        shell = Execution(("sh",), env=("TERM=vt100", "PS1=$ "), stdin=True, terminal=size)
        talk = await inside.driver.exec(inside.handle, shell)
        try:
            await talk.write(b"stty size; echo $TERM; ls -l /proc/self/fd/0\n")
            said = await hear(talk, b"/dev/pts/0")
            assert b"24 80\r\nvt100\r\n" in said
            await talk.resize(TerminalSize(50, 132))
            await talk.write(b"stty size\n")
            await hear(talk, b"50 132\r\n")
            await talk.write(b"sh -c 'echo run''ning; exec sleep 1007'\n")
            await hear(talk, b"running\r\n")
            await talk.write(b"\x1a")
            await hear(talk, b"Stopped")
            keys = b"dd bs=1 count=3 2>/dev/null | cat -v"
            await talk.write(
                b"kill -9 %1; wait; stty raw -echo; echo n''ow; " + keys + b"; exit 7; exit 7\n"
            )
            await hear(talk, b"now")
            await talk.write(b"\x03\x1b\xff")
            await hear(talk, b"^C^[M-^?")
            assert await talk.wait() == 7
        finally:
            await talk.aclose()


async def test_the_next_agent_ends_what_the_last_one_left(bench: Bench) -> None:
    async with bench.running(make_app()) as inside:
        command = Execution(("sh", "-c", FAMILY), terminal=TerminalSize(24, 80))
        talk = await inside.driver.exec(inside.handle, command)

        async def all_sleep() -> bool:
            return len(await sleeping(inside)) == 3

        await until(all_sleep)
        assert await inside.driver.recover(inside.spec, inside.handle) is not None
        assert await sleeping(inside) == set()
        assert not list(inside.spec.directory.glob("exec-*"))
        await talk.aclose()
