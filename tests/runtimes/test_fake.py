"""The fake driver keeps to the interface, and fails as its script says."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tabane.errors import EngineError, NotFound, Unsupported
from tabane.model import App, ExitStatus, new_instance_id
from tabane.runtimes.api import Driver, Image, InstanceSpec, Link
from tabane.runtimes.fake import FakeDriver, Script
from tabane.testing.drivers import DRIVER_CHECKS, SAID, Behaviour, Check

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
        self.driver: Driver = FakeDriver()
        self._directory = directory

    def restarted(self) -> Driver:
        assert isinstance(self.driver, FakeDriver)
        again = FakeDriver(world=self.driver.world)
        again.scripts = self.driver.scripts
        return again

    @asynccontextmanager
    async def instance(self, behaviour: Behaviour) -> AsyncIterator[InstanceSpec]:
        assert isinstance(self.driver, FakeDriver)
        spec = make_spec(self._directory, behaviour)
        self.driver.scripts[spec.app.key] = SCRIPTS[behaviour]
        yield spec

    def left_of(self, spec: InstanceSpec) -> list[str]:
        assert isinstance(self.driver, FakeDriver)
        return [str(key) for key in self.driver.world.lives if key == spec.id]


@pytest.mark.parametrize("check", DRIVER_CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check: Check, tmp_path: Path) -> None:
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
    async with asyncio.timeout(10):
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
