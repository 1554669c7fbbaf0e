"""Activity leases: connections, leases for a time, and the use that follows from them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tabane.middlecon.addresses import Unix, listen_on
from tabane.model import Generation, Instance, InstanceId, NodeName, State
from tabane.node.activity import CONNECTIONS, FILE, Activity
from tabane.node.services import End
from tabane.supervise import Supervisor
from tabane.testing import VirtualClock

ONE = InstanceId("i1")


class Rig:
    def __init__(self, directory: Path, tasks: Supervisor) -> None:
        self.path = directory / "lease.sock"
        self.spec: Any = SimpleNamespace(id=ONE, directory=directory)
        self.tasks = tasks
        self.clock = VirtualClock(wall=1_000_000.0)
        self.in_use = False
        self.ends: list[End] = []
        self.activity = self.make()

    def make(self) -> Activity:
        return Activity(self._hold, self.tasks, self.clock)

    async def _hold(self, instance: InstanceId) -> None:
        assert instance == ONE
        self.in_use = True
        try:
            await asyncio.Event().wait()
        finally:
            self.in_use = False

    async def begin(self) -> None:
        self.path.unlink(missing_ok=True)
        self.ends.append(await self.activity.serve(listen_on(Unix(self.path)), self.spec))

    async def restart(self) -> None:
        """Another agent."""
        await self.ends.pop()()
        await self.until(lambda: not self.in_use)
        self.activity = self.make()
        await self.begin()

    @property
    def leases(self) -> int:
        generation = Generation("incarnation", ONE, 1)
        node = NodeName("tokyo/tokyo-1")
        instance = Instance(ONE, "default/a", 1, node, generation, State.READY)  # type: ignore[arg-type]
        return self.activity.show(instance).leases

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.001)

    async def connect(self) -> asyncio.StreamWriter:
        return (await asyncio.open_unix_connection(self.path))[1]

    async def ask(self, line: str) -> tuple[int, dict[str, Any]]:
        reader, writer = await asyncio.open_unix_connection(self.path)
        writer.write(f"{line} HTTP/1.1\r\nHost: x\r\n".encode())
        writer.write(b"\r\n")
        answer = await reader.read()
        writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with Supervisor("test") as tasks:
        rig = Rig(tmp_path, tasks)
        await rig.begin()
        yield rig
        for end in rig.ends:
            await end()
        await rig.until(lambda: not rig.in_use)


async def test_a_connection_is_a_lease_while_it_is_open(rig: Rig) -> None:
    assert (rig.leases, rig.in_use) == (0, False)
    one, other = await rig.connect(), await rig.connect()
    await rig.until(lambda: rig.leases == 2 and rig.in_use)
    one.write(b"whatever is said\n")
    one.close()
    await rig.until(lambda: rig.leases == 1)
    assert rig.in_use
    other.transport.abort()
    await rig.until(lambda: rig.leases == 0 and not rig.in_use)


async def test_a_lease_for_a_time_ends_with_it(rig: Rig) -> None:
    assert await rig.ask("PUT /lease?for=10m") == (200, {"leases": 1, "left_s": 600.0})
    await rig.until(lambda: rig.in_use)
    rig.clock.advance(599.0)
    assert await rig.ask("GET /lease") == (200, {"leases": 1, "left_s": 1.0})
    rig.clock.advance(2.0)
    await rig.until(lambda: not rig.in_use)
    assert rig.leases == 0


async def test_a_lease_for_a_time_is_replaced_and_given_back(rig: Rig) -> None:
    await rig.ask("PUT /lease?for=1h")
    assert (await rig.ask("PUT /lease?for=5s"))[1]["left_s"] == 5.0
    await rig.until(lambda: rig.in_use)
    assert await rig.ask("DELETE /lease") == (200, {"leases": 0, "left_s": 0.0})
    await rig.until(lambda: not rig.in_use)


async def test_a_lease_for_a_time_outlives_the_agent(rig: Rig) -> None:
    await rig.ask("PUT /lease?for=1h")
    wire = await rig.connect()
    await rig.until(lambda: rig.leases == 2)
    await rig.restart()
    await rig.until(lambda: rig.in_use)
    assert rig.leases == 1
    wire.close()
    rig.clock.advance(3600.0)
    await rig.until(lambda: not rig.in_use)


async def test_a_file_that_says_nothing_is_no_lease(rig: Rig) -> None:
    (rig.spec.directory / FILE).write_text("soon")
    await rig.restart()
    assert rig.leases == 0


@pytest.mark.parametrize(
    "line",
    [
        "PUT /lease",
        "PUT /lease?for=",
        "PUT /lease?for=soon",
        "PUT /lease?for=0s",
        "PUT /lease?for=2d",
        "PUT /lease?for=1s&more=1",
        "POST /lease?for=1s",
        "PUT /other?for=1s",
    ],
)
async def test_what_cannot_be_is_refused_with_the_reason(rig: Rig, line: str) -> None:
    status, body = await rig.ask(line)
    assert status == 400
    assert body["error"]
    assert rig.leases == 0


async def test_an_instance_has_few_connections(rig: Rig) -> None:
    wires = [await rig.connect() for _ in range(CONNECTIONS)]
    await rig.until(lambda: rig.leases == CONNECTIONS)
    reader, writer = await asyncio.open_unix_connection(rig.path)
    assert await reader.read() == b""
    writer.close()
    for wire in wires:
        wire.close()
    await rig.until(lambda: rig.leases == 0)
