"""The fake driver keeps to the interface, and fails as its script says."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from tabane.errors import EngineError, NotFound, Unsupported
from tabane.model import App, Container, ExitStatus, GuestProcess, new_instance_id
from tabane.runtimes.api import Driver, Image, InstanceSpec, Link
from tabane.runtimes.fake import FakeDriver, Script
from tabane.runtimes.pods import Pods
from tabane.testing.drivers import DRIVER_CHECKS, SAID, Behaviour, Check
from tabane.testing.pods import FIRST, POD_CHECKS, SECOND, InPods, with_sidecars
from tabane.testing.pods import Check as PodCheck

SCRIPTS = {
    Behaviour.WAITS: Script(),
    Behaviour.SAYS: Script(prints=SAID + b"\n", die_after=0.001, dies=ExitStatus()),
    Behaviour.EXITS: Script(die_after=0.001, dies=ExitStatus(3)),
    Behaviour.STAYS: Script(ignores_stop=True, prints=SAID),
    Behaviour.EATS: Script(die_after=0.001, dies=ExitStatus(signal=signal.SIGKILL, oom=True)),
    Behaviour.BREAKS: Script(fail_start=1),
}


def make_spec(directory: Path, name: str = "app", port: int | None = None) -> InstanceSpec:
    app = App(name=name, image="fake", port=port)
    link = Link(1, "127.0.0.1", "127.0.0.1", 1, 1)
    log = directory / f"{name}.log"
    image = Image("fake", directory)
    return InstanceSpec(new_instance_id(), app, image, link, directory, log, f"/tabane/{name}")


class FakeBench:
    def __init__(self, directory: Path) -> None:
        self.fake = FakeDriver()
        self.driver: Driver = Pods(self.fake)
        self._directory = directory

    def restarted(self) -> Driver:
        again = FakeDriver(world=self.fake.world)
        again.scripts = self.fake.scripts
        return Pods(again)

    @asynccontextmanager
    async def instance(self, behaviour: Behaviour) -> AsyncIterator[InstanceSpec]:
        spec = make_spec(self._directory, behaviour)
        self.fake.scripts[spec.app.key] = SCRIPTS[behaviour]
        yield spec

    @asynccontextmanager
    async def pod(self, main: Behaviour, *sidecars: Behaviour) -> AsyncIterator[InstanceSpec]:
        async with self.instance(main) as spec:
            names = (FIRST, SECOND)
            containers = [Container(name) for name in names[: len(sidecars)]]
            spec = with_sidecars(spec, *containers)
            for number, sidecar in enumerate(spec.sidecars):
                guests = (GuestProcess("sandbox", 2 + number, "init"),)
                script = replace(SCRIPTS[sidecars[number]], guests=guests)
                self.fake.scripts[sidecar.app.key] = script
            yield spec

    def left_of(self, spec: InstanceSpec) -> list[str]:
        return [key for key in self.fake.world.lives if key.endswith(spec.id)]


@pytest.mark.parametrize("check", DRIVER_CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check: Check, tmp_path: Path) -> None:
    await check(FakeBench(tmp_path))


@pytest.mark.parametrize("check", DRIVER_CHECKS, ids=lambda check: check.__name__)
async def test_conformance_with_a_sidecar(check: Check, tmp_path: Path) -> None:
    await check(InPods(FakeBench(tmp_path)))


@pytest.mark.parametrize("check", POD_CHECKS, ids=lambda check: check.__name__)
async def test_pods(check: PodCheck, tmp_path: Path) -> None:
    await check(FakeBench(tmp_path))


async def ask(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        length = int(head.partition(b"Content-Length: ")[2].split(b"\r\n")[0])
        return await reader.readexactly(length)
    finally:
        writer.close()
        await writer.wait_closed()


async def test_it_fails_as_often_as_told(tmp_path: Path) -> None:
    driver = FakeDriver(Script(fail_start=2))
    spec = make_spec(tmp_path)
    handle = await driver.prepare(spec)
    for attempt in (1, 2):
        with pytest.raises(EngineError, match=f"told to fail start {attempt} of 2"):
            await driver.start(spec, handle)
    assert (await driver.start(spec, handle)).data["pid"]
    await driver.destroy(handle)


async def test_it_refuses_as_told(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="told to refuse"):
        await FakeDriver(Script(fail_prepare=True)).prepare(make_spec(tmp_path))
    assert not (await FakeDriver(Script(works=False)).probe()).works


async def test_it_serves_http_until_it_ends(tmp_path: Path, unused_tcp_port: int) -> None:
    driver = FakeDriver()
    spec = make_spec(tmp_path, port=unused_tcp_port)
    handle = await driver.start(spec, await driver.prepare(spec))
    assert await ask(unused_tcp_port) == f"hello from {spec.id}\n".encode()
    await driver.stop(handle, 1)
    with pytest.raises(ConnectionRefusedError):
        await ask(unused_tcp_port)
    await driver.destroy(handle)


async def test_it_listens_late(tmp_path: Path, unused_tcp_port: int) -> None:
    driver = FakeDriver(Script(listens_after=0.01))
    spec = make_spec(tmp_path, port=unused_tcp_port)
    handle = await driver.start(spec, await driver.prepare(spec))
    with pytest.raises(ConnectionRefusedError):
        await ask(unused_tcp_port)
    async with asyncio.timeout(60):
        while True:
            try:
                assert await ask(unused_tcp_port)
                break
            except ConnectionRefusedError:
                await asyncio.sleep(0.005)
    await driver.destroy(handle)


async def test_frozen_it_answers_after_the_thaw(tmp_path: Path, unused_tcp_port: int) -> None:
    driver = FakeDriver()
    spec = make_spec(tmp_path, port=unused_tcp_port)
    handle = await driver.start(spec, await driver.prepare(spec))
    await driver.freeze(handle)
    answer = asyncio.ensure_future(ask(unused_tcp_port))
    done, _ = await asyncio.wait([answer], timeout=0.05)
    assert not done
    await driver.thaw(handle)
    assert await answer == f"hello from {spec.id}\n".encode()
    await driver.destroy(handle)


async def test_it_knows_only_its_own(tmp_path: Path) -> None:
    driver = FakeDriver()
    handle = await driver.prepare(make_spec(tmp_path))
    await driver.destroy(handle)
    with pytest.raises(NotFound):
        await driver.wait(handle)
