"""Checks of instances: made while they are ready, and what becomes of one that hangs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from tabane.gateway.activation import StopAsked
from tabane.model import App, AppName, Generation, Instance, InstanceId, NodeName, State
from tabane.node.checking import find_problem, wait_well
from tabane.node.health import Health
from tabane.node.records import Record
from tabane.node.running import Running
from tabane.reactions import Health as Policy
from tabane.runtimes.api import Image
from tabane.runtimes.fake import FakeDriver
from tabane.supervise import Supervisor
from tabane.testing import VirtualClock

NODE, ID, APP = NodeName("here/here-1"), InstanceId("i1"), AppName("default/web")
GOOD = b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n"


class Server:
    """The instance's program: says `answer` to who asks; None: nothing."""

    def __init__(self) -> None:
        self.answer: bytes | None = GOOD
        self.asked: list[bytes] = []
        self.port = 0
        self.over = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.asked.append(await reader.readuntil(b"\r\n\r\n"))
            if self.answer is None:
                await self.over.wait()
            else:
                writer.write(self.answer)
        except asyncio.IncompleteReadError:
            self.asked.append(b"")
        finally:
            writer.close()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    listening = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = listening.sockets[0].getsockname()[1]
    yield made
    made.over.set()
    listening.close()
    await listening.wait_closed()


def make(server: Server, **policy: Any) -> Running:
    health = Policy(**({"timeout_s": 5.0} | policy))
    app = App("web", "host", port=server.port, health=health)
    instance = Instance(ID, app.key, 1, NODE, Generation("one", ID, 1), State.READY)
    instance = replace(instance, address="127.0.0.1")
    return Running(Record(instance, app, Image("host", Path("/"))), FakeDriver())


class Node:
    """A node of straw: its agent, as far as checks need it."""

    def __init__(self, running: Running, tasks: Supervisor) -> None:
        self.clock, self.running = VirtualClock(), running
        self.failed: list[str] = []
        self.told: list[StopAsked] = []
        self.hears = asyncio.Event()
        agent: Any = SimpleNamespace(
            clock=self.clock, tasks=tasks, joined=True, ask_home=self.ask_home, executor=self
        )
        self.health = Health(agent)

    def fail(self, running: Running, reason: str) -> None:
        assert running.is_hung
        self.failed.append(reason)
        self.follow(State.FAILED)

    async def ask_home(self, app: AppName, asked: StopAsked) -> None:
        self.told.append(asked)
        self.hears.set()

    def follow(self, state: State) -> None:
        self.health.follow(ID, state, self.running if state is State.READY else None)

    async def pass_interval(self) -> None:
        """Let the task of the checks come to its next wait, then time pass."""
        for _ in range(3):
            await asyncio.sleep(0)
        self.clock.advance(10.0)

    async def check(self, server: Server) -> None:
        """One interval passes, and what it brings is asked and answered."""
        before = len(server.asked)
        await self.pass_interval()
        while len(server.asked) == before:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_http_passes_by_its_status(server: Server) -> None:
    running = make(server, http="/healthz?deep=1")
    assert await find_problem(running) == ""
    assert server.asked[0].startswith(b"GET /healthz?deep=1 HTTP/1.1\r\nHost: 127.0.0.1\r\n")
    server.answer = b"HTTP/1.1 302 Found\r\n\r\n"
    assert await find_problem(running) == ""


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"HTTP/1.1 500 Oh\r\n\r\n", "GET / is answered 500"),
        (b"HTTP/1.0 404 No\r\n\r\n", "GET / is answered 404"),
        (b"220 mail.example.com ESMTP\r\n", "GET / is answered by no HTTP"),
        (b"", "GET / fails: it is closed without an answer"),
        (b"HTTP/1", "GET / fails: it is closed without an answer"),
    ],
)
async def test_http_fails_by_what_it_says(server: Server, answer: bytes, problem: str) -> None:
    server.answer = answer
    assert await find_problem(make(server, http="/")) == problem


async def test_silence_is_a_problem_after_its_time(server: Server) -> None:
    server.answer = None
    problem = await find_problem(make(server, http="/", timeout_s=0.01))
    assert problem == "GET / is not answered within 0.01 s"


async def test_tcp_passes_when_it_connects(server: Server) -> None:
    running = make(server, tcp=True)
    assert await find_problem(running) == ""
    server.port = 1
    assert "a connection fails: " in await find_problem(make(server, tcp=True))


async def test_ready_by_the_check_waits_for_one_that_passes(server: Server) -> None:
    server.answer = b"HTTP/1.1 503 Not yet\r\n\r\n"
    running = make(server, http="/")
    async with Supervisor("test") as tasks:
        ready = tasks.start("ready", wait_well(running))
        while len(server.asked) < 2:
            assert not ready.done()
            await asyncio.sleep(0.001)
        assert await running.describe_unready() == "GET / is answered 503"
        server.answer = GOOD
        await ready


async def test_one_that_hangs_is_ended_and_its_home_told(server: Server) -> None:
    async with Supervisor("test") as tasks:
        node = Node(make(server, http="/", failures=2), tasks)
        node.follow(State.READY)
        await node.check(server)
        server.answer = b"HTTP/1.1 500 Oh\r\n\r\n"
        await node.check(server)
        assert not node.failed
        await node.check(server)
        await node.hears.wait()
        reason = "unhealthy: GET / is answered 500, 2 times in a row"
        assert node.failed == [reason]
        assert node.told == [StopAsked(APP, ID, reason, hung=True)]
        node.clock.advance(1000.0)
        await asyncio.sleep(0)
        assert len(server.asked) == 3, "it is not checked any more"


async def test_what_is_frozen_is_not_checked_and_begins_anew(server: Server) -> None:
    server.answer = b"HTTP/1.1 500 Oh\r\n\r\n"
    async with Supervisor("test") as tasks:
        node = Node(make(server, http="/", failures=2), tasks)
        node.follow(State.READY)
        await node.check(server)
        node.follow(State.FREEZING)
        node.follow(State.FROZEN)
        for _ in range(5):
            await node.pass_interval()
        assert len(server.asked) == 1
        node.follow(State.READY)
        await node.check(server)
        assert not node.failed, "what failed before says nothing"
        await node.check(server)
        await node.hears.wait()
        assert len(node.failed) == 1


async def test_what_stands_still_by_order_is_not_checked(server: Server) -> None:
    server.answer = b"HTTP/1.1 500 Oh\r\n\r\n"
    async with Supervisor("test") as tasks:
        node = Node(make(server, http="/", failures=1), tasks)
        node.running.paused = True
        node.follow(State.READY)
        for _ in range(5):
            await node.pass_interval()
        assert not server.asked
        node.running.paused = False
        await node.check(server)
        await node.hears.wait()
        assert len(node.failed) == 1


async def test_without_a_check_nothing_is_asked(server: Server) -> None:
    async with Supervisor("test") as tasks:
        node = Node(make(server), tasks)
        node.follow(State.READY)
        await node.pass_interval()
        assert len(tasks) == 0
