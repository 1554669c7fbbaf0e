"""What k2i learns of instances beside their processes: begun and ended with them."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tabane.clock import SYSTEM
from tabane.model import App, AppName, Collect, Generation, Instance, InstanceId, NodeName, State
from tabane.node.records import Record
from tabane.node.running import Running
from tabane.node.watching import Watching
from tabane.runtimes.api import Image, InstanceSpec, Link
from tabane.runtimes.fake import FakeDriver, Script
from tabane.supervise import Supervisor

NODE = NodeName("here/here-1")
NAME = InstanceId("i1")


class Node:
    """A node of straw with one instance of the fake driver's."""

    def __init__(self, tasks: Supervisor, directory: Path) -> None:
        self.driver = FakeDriver()
        self.directory = directory
        self.running: dict[InstanceId, Running] = {}
        agent: Any = SimpleNamespace(
            clock=SYSTEM,
            tasks=tasks,
            config=SimpleNamespace(
                key=NODE,
                incarnation="first",
                paths=SimpleNamespace(collect=directory / "collect.toml"),
            ),
            executor=SimpleNamespace(
                get=self.running.__getitem__,
                instances=lambda: [running.instance for running in self.running.values()],
            ),
        )
        self.watching = Watching(agent)

    async def start(self, script: Script, *collect: Collect, ready: bool = True) -> None:
        """The instance, in its namespaces: those of this process."""
        app = App("shop", "host", collect=collect)
        self.driver.scripts[app.key] = script
        link = Link(1, "127.0.0.1", "127.0.0.1", os.getpid(), 0)
        image = Image("host", self.directory)
        log = self.directory / "log"
        spec = InstanceSpec(NAME, app, image, link, self.directory, log, "")
        handle = await self.driver.start(spec, await self.driver.prepare(spec))
        instance = Instance(
            NAME, AppName("default/shop"), 1, NODE, Generation("first", NAME, 1), State.READY
        )
        record = msgspec.structs.replace(Record(instance, app, image, link), handle=handle)
        self.running[NAME] = Running(record, self.driver)
        if ready:
            self.watching.follow(NAME, State.READY)

    async def until(self, look: Callable[[], Any]) -> Any:
        """The first true value: of what tasks do without telling."""
        while not (found := look()):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        return found


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with Supervisor("test") as tasks:
        node = Node(tasks, tmp_path)
        yield node
        for running in node.running.values():
            assert running.record.handle is not None
            await node.driver.destroy(running.record.handle)


async def test_what_runs_within_is_told_by_the_driver(node: Node) -> None:
    await node.start(Script())
    (row,) = await node.until(node.watching.insides.processes)
    assert (row.inside, row.pid, row.name) == ("sandbox", 1, "init")
    assert (row.node, row.instance, row.app) == ("here-1", "i1", "default/shop")
    node.watching.follow(NAME, State.FROZEN)
    assert node.watching.insides.processes() == []


async def test_a_driver_that_fails_or_is_slow_is_waited_for_by_nobody(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tabane.k2i.inside.LEAST_PAUSE_S", 0.01)
    monkeypatch.setattr("tabane.k2i.inside.SHARE", 1.0)
    await node.start(Script(fail_look=1, look_takes=0.01))
    assert node.watching.insides.processes() == []
    errors = await node.until(node.watching.insides.errors)
    assert errors == {NAME: "fake cannot tell what runs in i1: told to fail look 1 of 1"}
    await node.until(node.watching.insides.processes)
    assert node.watching.insides.errors() == {}


async def test_an_apps_command_runs_inside(node: Node) -> None:
    await node.start(Script(), Collect("command", command=("echo", "n", "1")))
    row = await node.until(lambda: next((r for r in node.watching.collection.rows() if r.at), None))
    assert (row.of, row.instance, row.app, row.facts) == (
        "instance",
        "i1",
        "default/shop",
        {"n": 1},
    )


async def test_a_command_that_is_not_there_is_said(node: Node) -> None:
    await node.start(Script(), Collect("command", command=("nothing",)))
    row = await node.until(
        lambda: next((r for r in node.watching.collection.rows() if r.error), None)
    )
    assert row.error == "nothing ended with 127: nothing: not found"


async def test_a_collectors_connection_goes_to_loopback_inside(node: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        port = listening.getsockname()[1]
        await node.start(Script(), Collect("redis", url=f"redis://localhost:{port}"))
        loop = asyncio.get_running_loop()
        connection, address = await loop.sock_accept(listening)
        assert address[0] == "127.0.0.1"
        assert await loop.sock_recv(connection, 100) == b"*1\r\n$4\r\nINFO\r\n"
        await loop.sock_sendall(connection, b"$3\r\na:1\r\n")
        row = await node.until(
            lambda: next((r for r in node.watching.collection.rows() if r.at), None)
        )
        connection.close()
    assert (row.of, row.pid, row.facts) == ("instance", 0, {"a": 1})


async def test_it_begins_with_what_runs_already_and_ends_with_it(node: Node) -> None:
    await node.start(Script(), Collect("command", command=("echo", "n", "1")), ready=False)
    assert node.watching.collection.rows() == []
    node.watching.begin()
    assert node.watching.collection.instances() == {NAME}
    node.watching.follow(NAME, State.STOPPING)
    assert node.watching.collection.rows() == []


async def test_a_mistake_in_the_nodes_file_is_a_row(node: Node) -> None:
    (node.directory / "collect.toml").write_text('[[collect]]\nkind = "nginx"\n')
    node.watching.begin()
    row = await node.until(
        lambda: next((r for r in node.watching.collection.rows() if r.error), None)
    )
    assert (row.of, row.collector) == ("node", "collect.toml")
    assert "collect[1].url: is missing" in row.error
