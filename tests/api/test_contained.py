"""What an instance may ask of k2i, and what it is answered at its socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tabane.api.contained import CONNECTIONS, ContainedK2i, read_question
from tabane.clock import SYSTEM
from tabane.errors import Denied, NotFound, TabaneError, UsageError
from tabane.k2i import K2i, ProcessTable, Question
from tabane.model import App, AppName, InstanceId, Services
from tabane.node.services import NodeServices
from tabane.runtimes.api import Image, InstanceSpec

SHOP = AppName("default/shop")


@pytest.mark.parametrize(
    ("path", "query", "params"),
    [
        ("/v2/processes", b"", {}),
        ("/v2/processes", b"app=shop", {}),
        ("/v2/processes", b"app=default/shop&pid=7", {"pid": "7"}),
        ("/v2/facts", b"scope=node&kind=redis", {"kind": "redis"}),
        ("/v2/tree", b"name=a%20b%0A", {"name": "a b\n"}),
    ],
)
def test_whatever_it_asks_is_about_its_app(path: str, query: bytes, params: dict[str, str]) -> None:
    asked = read_question("GET", path, query, SHOP)
    assert asked == Question(path.removeprefix("/v2/"), params | {"app": "default/shop"})


@pytest.mark.parametrize(
    ("method", "path", "query", "kind"),
    [
        ("POST", "/v2/processes", b"", Denied),
        ("GET", "/v2/processes", b"app=other", Denied),
        ("GET", "/v2/processes", b"app=shop,other", Denied),
        ("GET", "/v2/processes", b"app=", Denied),
        ("GET", "/v2/processes", b"app=else/shop", Denied),
        ("GET", "/v2/processes", b"app=shop&app=other", UsageError),
        ("GET", "/v2/processes", b"scope=cluster", Denied),
        ("GET", "/v2/processes", b"name=%ff", UsageError),
        ("GET", "/v2/processes", b"name=\xff", UsageError),
        ("GET", "/v2/host", b"", NotFound),
        ("GET", "/v2/", b"", NotFound),
        ("GET", "/v2/processes/1", b"", NotFound),
        ("GET", "//v2/processes", b"", NotFound),
    ],
)
def test_all_else_is_refused(method: str, path: str, query: bytes, kind: type[TabaneError]) -> None:
    with pytest.raises(kind):
        read_question(method, path, query, SHOP)


@pytest.fixture
def spec(tmp_path: Path) -> InstanceSpec:
    services = tmp_path / "services"
    services.mkdir()
    return InstanceSpec(
        id=InstanceId("i1"),
        app=App("shop", "host", services=Services(k2i=True)),
        image=Image("host", tmp_path),
        link=None,
        directory=tmp_path,
        log=tmp_path / "log",
        cgroup="",
        services=services,
    )


@pytest.fixture
async def services(spec: InstanceSpec) -> AsyncIterator[NodeServices]:
    """An instance's socket, answered."""
    table = ProcessTable("tokyo/tokyo-1")
    agent: Any = SimpleNamespace(clock=SYSTEM, k2i=K2i(table, node="tokyo/tokyo-1"))
    services = NodeServices()
    await services.open(spec)
    await services.k2i.attach(ContainedK2i(agent).serve)
    yield services
    await services.k2i.aclose()
    agent.k2i.close()
    table.close()


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connect(spec: InstanceSpec) -> Streams:
    assert spec.services is not None
    return await asyncio.open_unix_connection(spec.services / "k2i.sock")


async def ask(streams: Streams, path: str, method: str = "GET") -> tuple[int, Any]:
    reader, writer = streams
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: k2i\r\n\r\n".encode())
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.partition("content-length: ")[2].split("\r\n")[0])
    return int(head.split()[1]), json.loads(await reader.readexactly(length))


@pytest.mark.usefixtures("services")
async def test_questions_on_one_connection(spec: InstanceSpec) -> None:
    streams = await connect(spec)
    for path in ("/v2/processes", "/v2/processes?fields=pid", "/v2/facts"):
        status, answer = await ask(streams, path)
        assert (status, answer["silent"]) == (200, [])
        assert answer[path[4:].partition("?")[0]] == []  # nothing here belongs to its app
    status, answer = await ask(streams, "/v2/host")
    assert (status, answer["error"]) == (404, "not_found")
    streams[1].close()


@pytest.mark.usefixtures("services")
async def test_the_connections_of_one_instance_are_few(spec: InstanceSpec) -> None:
    streams = [await connect(spec) for _ in range(CONNECTIONS)]
    reader, writer = await connect(spec)
    assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
    writer.close()
    streams[0][1].close()
    assert (await ask(streams[1], "/v2/processes"))[0] == 200
    for _, open_writer in streams:
        open_writer.close()


async def test_at_its_end_connections_are_cut_and_the_file_goes(
    spec: InstanceSpec, services: NodeServices
) -> None:
    reader, writer = await connect(spec)
    await ask((reader, writer), "/v2/processes")
    await services.close(spec)
    assert await reader.read() == b""
    writer.close()
    assert list(Path(spec.directory, "services").iterdir()) == []
    await services.close(spec)


async def test_what_connects_before_anybody_answers_waits(
    spec: InstanceSpec, services: NodeServices
) -> None:
    await services.k2i.aclose()
    later = NodeServices()
    await later.open(spec)  # as the next agent does, over the file that the last one left
    streams = await connect(spec)
    asked = asyncio.ensure_future(ask(streams, "/v2/processes"))
    await asyncio.sleep(0)
    assert not asked.done()
    table = ProcessTable("tokyo/tokyo-1")
    agent: Any = SimpleNamespace(clock=SYSTEM, k2i=K2i(table))
    await later.k2i.attach(ContainedK2i(agent).serve)
    assert (await asked)[0] == 200
    streams[1].close()
    await later.close(spec)
    agent.k2i.close()
    table.close()


@pytest.mark.usefixtures("services")
def test_everyone_in_the_instance_may_connect(spec: InstanceSpec) -> None:
    assert spec.services is not None
    assert (spec.services / "k2i.sock").stat().st_mode & 0o777 == 0o666
