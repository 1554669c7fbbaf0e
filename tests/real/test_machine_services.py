"""Sockets of the node in a machine: its programs reach their own two, and nothing else."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from tabane.errors import Closed
from tabane.guest.links import MOST_LINKS
from tabane.model import Container, Services
from tabane.runtimes.api import Image, User
from tabane.runtimes.pods import log_of
from tabane.testing.checkpoints import place
from tabane.testing.containers import make_tree, open_directory
from tabane.testing.drivers import PATIENCE_S, Behaviour, until
from tabane.testing.machine_bench import COMMANDS, MachineBench, Running, make_app
from tabane.testing.machines import make_machine
from tabane.testing.pods import with_sidecars
from tabane.testing.talks import run_inside

pytestmark = pytest.mark.real

TALK = Path(__file__).with_name("unix_talk.c")
WAITS = COMMANDS[Behaviour.WAITS]
HUB = "/run/tabane/hub.sock"


@pytest.fixture(scope="module")
def ground() -> Iterator[Path]:
    with open_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def image(ground: Path) -> Image:
    image = make_tree(ground)
    argv = ("gcc", "-static", "-Os", "-Wall", "-Werror", "-o", image.tree / "bin/talk", TALK)
    subprocess.run(argv, check=True)
    return image


@pytest.fixture
def bench(microvms: MachineBench) -> MachineBench:
    return microvms


class Node:
    """What serves an instance's sockets: it says at the end how much it heard, or, when that began
    with a number, so many bytes."""

    def __init__(self) -> None:
        self.open = 0
        self.most = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            heard = await reader.read(1 << 16)
            if heard.startswith(b"pour "):
                writer.write(bytes(int(heard.split()[1])))
            total = len(heard)
            while data := await reader.read(1 << 16):
                total += len(data)
            if not heard.startswith(b"pour "):
                writer.write(b"heard %d\n" % total)
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def running(
    bench: MachineBench,
    node: Node,
    *,
    k2i: bool = False,
    main: tuple[str, ...] = WAITS,
    beside: tuple[str, ...] = WAITS,
    images: Path | None = None,
) -> AsyncIterator[Running]:
    """A machine of two containers whose app asks for the hub, and maybe for k2i. `images`: a
    checkpoint that it goes on from."""
    app = make_app(main, services=Services(middlecon=("room",), k2i=k2i))
    async with make_machine(bench.ground, bench.image, app) as spec:
        spec = with_sidecars(spec, Container("beside", command=beside))
        spec = replace(spec, services=spec.directory / "services")
        assert spec.services is not None
        spec.services.mkdir()
        servers = [
            await asyncio.start_unix_server(node.serve, spec.services / name)
            for name in ("hub.sock", "k2i.sock")
        ]
        handle = await bench.driver.prepare(spec)
        try:
            if images is None:
                yield Running(bench.driver, spec, await bench.driver.start(spec, handle))
            else:
                yield Running(bench.driver, spec, await bench.driver.restore(spec, handle, images))
        finally:
            await bench.driver.destroy(handle)
            for server in servers:
                server.close()
                await server.wait_closed()
            for path in spec.services.iterdir():
                path.unlink()
            spec.services.rmdir()
        assert bench.left_of(spec) == []


async def talk(inside: Running, given: bytes, container: str = "", path: str = HUB) -> bytes:
    argv = ("talk", path)
    ended = await run_inside(
        inside.driver, inside.handle, argv, given=[given], container=container, user=User(33, 34)
    )
    assert (ended.code, ended.stderr) == (0, b"")
    return ended.stdout


async def test_the_sockets_of_an_instance(bench: MachineBench) -> None:
    """One boot for all that can be seen of them."""
    node = Node()
    async with running(bench, node, k2i=False) as inside:
        await see_what_is_there(inside)
        await see_much(inside)
        await see_many(inside, node)
        await see_another_agent(bench, inside, node)


async def see_what_is_there(inside: Running) -> None:
    """In each container, for every user: what its app asks for, read-only."""
    for name in ("", "beside"):
        assert await inside.run("ls /run/tabane; echo $TABANE_HUB", container=name) == (
            f"hub.sock\nunix://{HUB}\n"
        )
        assert "Read-only" in await inside.run("echo > /run/tabane/x", container=name)
        assert "Read-only" in await inside.run(f"rm {HUB}", container=name)
        assert await talk(inside, b"hello", name) == b"heard 5\n"


async def see_much(inside: Running) -> None:
    """Both directions, and at the same time; each ends for itself."""
    given = os.urandom(1 << 20)
    both = [talk(inside, given, name) for name in ("", "beside")]
    assert await asyncio.wait_for(asyncio.gather(*both), PATIENCE_S) == [b"heard 1048576\n"] * 2
    assert await talk(inside, b"pour 1000000 ") == bytes(1_000_000)


async def see_many(inside: Running, node: Node) -> None:
    """What is more than a guest may have waits, and is heard when others have gone."""
    count = MOST_LINKS + 20
    ended = await run_inside(inside.driver, inside.handle, ("talk", HUB, str(count)))
    assert (ended.code, ended.stdout) == (0, b"heard 1\n" * count)
    assert MOST_LINKS // 2 < node.most <= MOST_LINKS


async def see_another_agent(bench: MachineBench, inside: Running, node: Node) -> None:
    """With a node's agent go the connections that it carried; the next one carries new ones."""
    waiting = asyncio.ensure_future(
        run_inside(inside.driver, inside.handle, ("sh", "-c", f"sleep 1000 | talk {HUB}"))
    )

    async def is_open(count: int) -> None:
        async def there() -> bool:
            return node.open == count

        await until(there)

    await is_open(1)
    again = bench.restarted()
    with pytest.raises(Closed):
        await waiting
    await is_open(0)
    found = await again.recover(inside.spec, inside.handle)
    assert found is not None
    assert await talk(Running(again, inside.spec, found), b"again") == b"heard 5\n"  # type: ignore[arg-type]


NAMES = "while read name </proc/sys/kernel/hostname; do echo $name; sleep 0.05; done"


async def test_a_copy_of_several_containers(bench: MachineBench) -> None:
    """All of them go on in it. What they had open to the node is closed there, and stays open in
    the one that was saved; they connect anew, as who they are now."""
    node, other = Node(), Node()
    main = ("sh", "-c", f"talk {HUB} - </dev/null; echo closed; {NAMES}")
    programs = {"main": main, "beside": ("sh", "-c", NAMES)}

    async def is_open() -> bool:
        return node.open == 1

    with place() as images:
        async with running(bench, node, **programs) as origin:
            await until(is_open)
            await bench.driver.checkpoint(origin.handle, images, leave_running=True)
            async with running(bench, other, images=images, **programs) as copy:
                await until(partial(has_said, copy, "closed"))
                await until(partial(has_said, copy, copy.spec.id))
                log = log_of(copy.spec.log, "beside")
                await until(partial(has_line, log, copy.spec.id))
                assert {*log.read_text().rpartition("\n")[0].splitlines()} == {copy.spec.id}
                for name in ("", "beside"):
                    seen = await copy.run("hostname; cat /run/tabane/epoch", container=name)
                    assert seen.startswith(f"{copy.spec.id}\n") and len(seen.split()[1]) == 36
                    assert await talk(copy, b"hello", name) == b"heard 5\n"
                with suppress(Closed):  # its machine may end before it
                    await copy.run("kill -9 -1", container="beside")
                assert (await bench.driver.wait(copy.handle)).container == "beside"
            assert await is_open() and not await has_said(origin, "closed")
            assert await origin.run("ls /run/tabane") == "hub.sock\n"


async def has_said(inside: Running, line: str) -> bool:
    return await has_line(inside.spec.log, line)


async def has_line(log: Path, line: str) -> bool:
    return log.exists() and line in log.read_text().splitlines()
