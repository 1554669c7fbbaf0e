"""Conversations over HTTP: a fake's commands, over real sockets and the real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.api.conftest import Api

from tabane.api import frames
from tabane.api.forwarding import Forward
from tabane.api.server import ApiServer
from tabane.errors import Closed, TabaneError, Unreachable
from tabane.model import State
from tabane.runtimes.api import Execution, Image, TerminalSize
from tabane.runtimes.fake_talk import FakeTalk, begin
from tabane.security.identity import Principal
from tabane.supervise import Supervisor
from tabane.tools.talk import Talk

EXEC = "/api/v1/instances/abc/exec"


class Deaf(FakeTalk):
    """Takes no input, ever."""

    def __init__(self) -> None:
        super().__init__(b"up\n", code=None)
        self.closed = asyncio.Event()

    async def write(self, data: bytes) -> None:
        await asyncio.Event().wait()

    async def aclose(self) -> None:
        await super().aclose()
        self.closed.set()


class Driver:
    """The fake's, and what was begun with it."""

    def __init__(self) -> None:
        self.begun: list[Execution] = []
        self.talks: list[FakeTalk] = []
        self.make: Callable[[Execution], FakeTalk] = begin

    async def exec(self, handle: object, execution: Execution) -> FakeTalk:
        self.begun.append(execution)
        self.talks.append(self.make(execution))
        return self.talks[-1]


@pytest.fixture
def driver(api: Api) -> Driver:
    driver = Driver()
    instance = SimpleNamespace(app="default/hello", state=State.READY, id="abc")
    record = SimpleNamespace(
        handle=1,
        image=Image("sha256:1", Path("/nowhere")),
        sidecars=(SimpleNamespace(name="proxy", image=Image("sha256:2", Path("/nowhere"))),),
        app=SimpleNamespace(key="default/hello"),
    )
    running = SimpleNamespace(driver=driver, instance=instance, record=record)
    thawed: list[Any] = []

    async def wait_awake(running: Any) -> None:
        thawed.append(running)

    api.agent.executor = SimpleNamespace(
        get=lambda _: running,
        instances=lambda: [instance],
        freezer=SimpleNamespace(wait_awake=wait_awake),
    )
    api.agent.audit = SimpleNamespace(add=lambda line: None)
    api.agent.clock = SimpleNamespace(wall=lambda: 0.0)
    return driver


@asynccontextmanager
async def serving(api: Api, tmp_path: Path) -> AsyncIterator[Callable[[], Talk]]:
    """The API on a socket; makes clients of it."""
    import socket

    listener = socket.create_server(("127.0.0.1", 0))
    clients: list[socket.socket] = []

    def connect() -> Talk:
        clients.append(socket.create_connection(listener.getsockname()))
        clients[-1].settimeout(60)
        return Talk("tokyo/tokyo-1", Authorized(clients[-1]))  # type: ignore[arg-type]

    async with Supervisor("test") as tasks:
        server = ApiServer(api.app, tasks)
        server.serve([listener])
        try:
            yield connect
        finally:
            for client in clients:
                client.close()
            await server.aclose()
            listener.close()


class Authorized:
    """A connection that has the token in its request's head."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock

    def sendall(self, data: bytes) -> None:
        field = b"Host: localhost\r\n"
        self._sock.sendall(data.replace(field, field + b"Authorization: Bearer secret\r\n"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


async def hear_end(talk: Talk) -> list[frames.Frame]:
    """All frames to the end; output is joined."""
    heard: list[frames.Frame] = []
    while not talk.is_over:
        for kind, data in await asyncio.to_thread(talk.hear):
            if heard and heard[-1][0] == kind:
                data = heard.pop()[1] + data
            heard.append((kind, data))
    return heard


def code(number: int) -> frames.Frame:
    return frames.EXIT, number.to_bytes(4, "big")


async def test_a_command_s_output_and_end(api: Api, driver: Driver, tmp_path: Path) -> None:
    async with serving(api, tmp_path) as connect:
        talk = connect()
        talk.begin(EXEC, {"argv": ["echo", "hi"], "env": {"A": "b"}})
        assert await hear_end(talk) == [(frames.OUTPUT, b"hi\n"), code(0)]
        assert driver.begun == [Execution(("echo", "hi"), env=("A=b",))]
        talk = connect()
        talk.begin(EXEC, {"argv": ["nothing"]})
        assert await hear_end(talk) == [(frames.ERROR, b"nothing: not found\n"), code(127)]


async def test_input_is_credited_as_it_is_taken(api: Api, driver: Driver, tmp_path: Path) -> None:
    async with serving(api, tmp_path) as connect:
        talk = connect()
        talk.begin(EXEC, {"argv": ["cat"], "stdin": True})
        heard, given = b"", 0
        while given < 3 * frames.WINDOW:
            block = bytes(min(talk.credit, 64 << 10))
            given += len(block)
            if block:
                talk.give(block)
            while not talk.credit:
                heard += b"".join(data for _, data in await asyncio.to_thread(talk.hear))
        talk.give(b"")
        *rest, end = await hear_end(talk)
        assert len(heard) + sum(len(data) for _, data in rest) == given
        assert end == code(0)


async def test_a_terminal_is_resized(api: Api, driver: Driver, tmp_path: Path) -> None:
    async with serving(api, tmp_path) as connect:
        talk = connect()
        size = {"rows": 24, "columns": 80}
        talk.begin(EXEC, {"argv": ["cat"], "stdin": True, "terminal": size})
        talk.say(frames.encode_size(50, 132))
        talk.give(b"x\x03")
        assert await hear_end(talk) == [(frames.OUTPUT, b"x"), code(130)]
        assert driver.begun[0].terminal == TerminalSize(24, 80)
        assert driver.talks[0].sizes == [TerminalSize(50, 132)]


async def test_a_signal(api: Api, driver: Driver, tmp_path: Path) -> None:
    async with serving(api, tmp_path) as connect:
        talk = connect()
        talk.begin(EXEC, {"argv": ["cat"], "stdin": True})
        talk.say(frames.encode(frames.SIGNAL, bytes([15])))
        assert await hear_end(talk) == [code(143)]


async def test_a_container_beside_the_main_one(api: Api, driver: Driver, tmp_path: Path) -> None:
    async with serving(api, tmp_path) as connect:
        for name, meant in (("proxy", "proxy"), ("main", ""), ("", "")):
            talk = connect()
            talk.begin(EXEC, {"argv": ["echo", "x"], "container": name})
            assert (await hear_end(talk))[-1] == code(0)
            assert driver.begun[-1].container == meant
        for name, problem in (
            ("cache", r"abc of default/hello has no container cache \(it has: main, proxy\)"),
            ("../x", "is no container's name"),
        ):
            talk = connect()
            with pytest.raises(TabaneError, match=problem):
                talk.begin(EXEC, {"argv": ["echo"], "container": name})
                await hear_end(talk)
    assert len(driver.begun) == 3


async def test_who_leaves_ends_it_even_if_it_never_reads(
    api: Api, driver: Driver, tmp_path: Path
) -> None:
    deaf = Deaf()
    driver.make = lambda execution: deaf
    async with serving(api, tmp_path) as connect:
        talk = connect()
        talk.begin(EXEC, {"argv": ["x"], "stdin": True})
        while talk.credit:
            talk.give(bytes(min(talk.credit, 64 << 10)))
        heard: list[frames.Frame] = []
        while not heard:
            heard = await asyncio.to_thread(talk.hear)
        assert heard == [(frames.OUTPUT, b"up\n")]
        talk.close()
        await deaf.closed.wait()


async def test_more_input_than_was_credited_is_an_error(
    api: Api, driver: Driver, tmp_path: Path
) -> None:
    driver.make = lambda execution: Deaf()
    async with serving(api, tmp_path) as connect:
        talk = connect()
        talk.begin(EXEC, {"argv": ["x"], "stdin": True})
        for _ in range(5):
            talk.say(frames.encode(frames.INPUT, bytes(64 << 10)))
        with pytest.raises(TabaneError, match="heed C"):
            await hear_end(talk)


async def test_a_time_out_is_said(api: Api, driver: Driver, tmp_path: Path) -> None:
    async with serving(api, tmp_path) as connect:
        talk = connect()
        talk.begin(EXEC, {"argv": ["cat"], "stdin": True, "timeout_s": 0.01})
        with pytest.raises(TabaneError, match=r"cat in abc did not end within 0\.01 s"):
            await hear_end(talk)


class Cut(FakeTalk):
    """Its instance ends while it runs."""

    async def wait(self) -> int:
        raise Closed("its machine has ended")


async def test_an_instance_that_ends_meanwhile_is_said(
    api: Api, driver: Driver, tmp_path: Path
) -> None:
    """Who left is not the client."""
    driver.make = lambda _: Cut(b"up\n")
    async with serving(api, tmp_path) as connect:
        talk = connect()
        talk.begin(EXEC, {"argv": ["cat"]})
        with pytest.raises(Closed, match="cat in abc was lost: its machine has ended"):
            await hear_end(talk)


async def test_what_is_no_conversation(api: Api, driver: Driver) -> None:
    for raw in (b"", b"GARBAGE", frames.encode(frames.INPUT, b"x")):
        answer = await api.ask("POST", EXEC, raw=raw)
        assert (answer.status, answer.json()["error"]) == (400, "usage")


# Passing on


async def test_another_node_s_instance_is_passed_on(
    api: Api, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes both ways, once only, and its answer's status."""
    asked: list[str] = []

    async def locate(agent: Any, instance: str) -> str:
        asked.append(instance)
        return "osaka/osaka-1"

    monkeypatch.setattr("tabane.api.actions.locate", locate)
    async with serving(api, tmp_path) as connect:
        there = connect()
        port = there._sock.getpeername()[1]
        there.close()
        monkeypatch.setattr("tabane.api.forwarding.API_PORT", port)
        peer = SimpleNamespace(key="osaka/osaka-1", address="127.0.0.1")
        api.agent.config.cluster = SimpleNamespace(node=lambda key: peer)
        talk = connect()
        path = EXEC.replace("abc", "def")
        talk.begin(path, {"argv": ["cat"], "stdin": True})
        talk.give(b"far away")
        talk.give(b"")
        assert await hear_end(talk) == [(frames.OUTPUT, b"far away"), code(0)]
        assert asked == ["def"]
        talk = connect()
        talk.begin(path, {"argv": []})
        with pytest.raises(TabaneError, match="argv"):
            await hear_end(talk)


async def test_a_node_that_cannot_be_reached_is_named(
    api: Api, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def locate(agent: Any, instance: str) -> str:
        return "osaka/osaka-1"

    monkeypatch.setattr("tabane.api.actions.locate", locate)
    monkeypatch.setattr("tabane.api.forwarding.API_PORT", 1)
    peer = SimpleNamespace(key="osaka/osaka-1", address="127.0.0.1")
    api.agent.config.cluster = SimpleNamespace(node=lambda key: peer)
    begin_frame = frames.encode(frames.BEGIN, json.dumps({"argv": ["x"]}).encode())
    answer = await api.ask("POST", EXEC.replace("abc", "def"), raw=begin_frame)
    assert (answer.status, answer.json()["error"]) == (503, Unreachable.code)
    assert "osaka/osaka-1 cannot be reached" in answer.json()["message"]


async def test_the_answer_of_a_node_that_takes_no_more_is_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one that has refused what it was asked before it has heard all of it."""
    reader = asyncio.StreamReader()
    heard: list[Any] = []

    class Refusing:
        transport = SimpleNamespace(abort=lambda: None)

        def write(self, data: bytes) -> None: ...

        async def drain(self) -> None:
            reader.feed_data(b"HTTP/1.1 400 No\r\nContent-Length: 3\r\n\r\nno!")
            raise ConnectionResetError

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)  # a client's next block is not there at once
        if heard:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": b"more", "more_body": True}

    async def send(message: Any) -> None:
        heard.append(message)

    peer: Any = SimpleNamespace(key="osaka/osaka-1")
    forward = Forward(peer, "token", "tokyo/tokyo-1", Principal("token"))

    async def connect() -> Any:
        return reader, Refusing()

    monkeypatch.setattr(forward, "_connect", connect)
    scope = {"method": "POST", "raw_path": b"/x", "query_string": b""}
    await forward(scope, receive, send)
    assert heard[0]["status"] == 400
    assert b"".join(message.get("body", b"") for message in heard) == b"no!"
