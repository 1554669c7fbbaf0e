"""The SDK, asked of real k2is, and of servers that are none."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing
from pathlib import Path

import pytest
from tests.k2i.conftest import Start
from tests.k2i.test_cli import K2I, Service, serve

from tabane.errors import (
    Busy,
    Closed,
    Denied,
    ProtocolError,
    Refused,
    TimedOut,
    Unauthenticated,
    Unreachable,
    UsageError,
    error_of,
)
from tabane.k2i.client import AsyncClient, Changes, Client, Outcome, Rows, Silent
from tabane.k2i.exchange import Reply, encode_target, parse_url


@pytest.fixture(scope="module")
def port() -> Iterator[Service]:
    yield from serve()


@pytest.fixture(scope="module")
def unix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("x" * 100) / "k2i.sock"
    command = [K2I, "--unix", path.name]
    with subprocess.Popen(command, cwd=path.parent, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield f"unix://{path}"
        process.terminate()


def test_typed_rows(unix: str, start: Start) -> None:
    child = start("", "an argument")
    k2i = Client(unix)
    (process,) = k2i.processes(pid=[child.pid])
    assert (process.pid, process.uid) == (child.pid, os.geteuid())
    assert process.command.endswith("an argument")
    rows = k2i.processes(user=os.geteuid(), sort="-pid", limit=3)
    assert [row.pid for row in rows] == sorted((row.pid for row in rows), reverse=True)
    assert len(rows) == 3
    assert rows.silent == []
    assert rows.nodes[0].age_s < 60
    assert k2i.threads(pid=child.pid)[0].tid == child.pid
    assert any(row.pid == child.pid and row.depth > 0 for row in k2i.tree())
    assert [row.pid for row in k2i.tree(limit=2)] == [row.pid for row in k2i.tree()][:2]
    assert any(row.fd == "cwd" for row in k2i.files(pid=child.pid))
    assert k2i.host()[0].hostname == socket.gethostname()
    assert any(row.mount_point == "/" for row in k2i.mounts())
    assert k2i.logins() is not None
    assert isinstance(k2i.history(since_s=5), Rows)
    assert k2i.app_history(app="default/none") == []
    assert k2i.process_history(pid=1, since_s=1) is not None


def test_tables_of_other_fields(unix: str) -> None:
    k2i = Client(unix)
    (row,) = k2i.table("processes", group=["user"], sum=["rss_kib"], user=os.geteuid())
    assert row.keys() == {"user", "count", "rss_kib"}
    with pytest.raises(UsageError, match=r"table\('processes'"):
        k2i.processes(fields="pid")


async def test_the_same_for_asyncio(unix: str, start: Start) -> None:
    child = start()
    async with AsyncClient(unix) as k2i:
        (process,) = await k2i.processes(pid=child.pid)
        assert process.pid == child.pid
        (host,) = await k2i.host()
        assert host.cpus == os.cpu_count()
        rows = await k2i.table("processes", fields=["pid"], pid=child.pid)
        assert rows == [{"pid": child.pid}]
        answers = await asyncio.gather(
            *(k2i.threads(pid=child.pid), k2i.tree(), k2i.files(pid=child.pid), k2i.mounts()),
            *(k2i.logins(), k2i.history(), k2i.app_history(), k2i.process_history(pid=1)),
        )
        assert all(isinstance(answer, Rows) for answer in answers)
        with pytest.raises(UsageError):
            await k2i.processes(colour="red")
        async with aclosing(k2i.changes(pid=child.pid)) as changes:
            first = await anext(changes)
            assert isinstance(first, Changes)
            assert [row["pid"] for row in first.born] == [child.pid]
            child.kill()
            child.wait()
            async for event in changes:
                if isinstance(event, Changes) and event.died:
                    assert event.died[0]["pid"] == child.pid
                    break


def test_changes_end_with_k2i(start: Start) -> None:
    for service in serve():
        with closing(Client(url_of(service)).changes(pid=service.process.pid)) as changes:
            first = next(changes)
            assert isinstance(first, Changes)
            assert first.first
            service.process.terminate()
            with pytest.raises((Closed, Unreachable)):
                for _ in changes:
                    pass


def url_of(service: Service) -> str:
    return f"http://127.0.0.1:{service.port}"


def test_what_is_refused_is_raised(port: Service) -> None:
    k2i = Client(url_of(port))
    with pytest.raises(UsageError, match="no parameter 'colour'"):
        k2i.processes(colour="red")
    with pytest.raises(UsageError):
        next(k2i.changes(interval_s=0))
    with pytest.raises(UsageError):
        k2i.processes(scope="cluster")
    with pytest.raises(Unauthenticated):
        k2i.files()


def test_nobody_there(tmp_path: Path) -> None:
    for url in (f"unix://{tmp_path}/none", f"unix://{tmp_path}/no/where", free_port()):
        with pytest.raises(Unreachable, match="no k2i at"):
            Client(url).host()
        with pytest.raises(Unreachable, match="no k2i at"):
            asyncio.run(AsyncClient(url).host())


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"http://127.0.0.1:{sock.getsockname()[1]}"


@pytest.fixture
def answering() -> Iterator[Callable[[bytes], str]]:
    """Serves one connection after the other with these bytes; none: it says nothing."""
    closers: list[Callable[[], None]] = []

    def serve(answer: bytes) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        done = threading.Event()

        def work() -> None:
            while not done.is_set():
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock:
                    sock.recv(1 << 16)
                    sock.sendall(answer)
                    if not answer:
                        done.wait()

        thread = threading.Thread(target=work)
        thread.start()

        def close() -> None:
            done.set()
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            thread.join()

        closers.append(close)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield serve
    for close in closers:
        close()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"SSH-2.0-x\r\n", ProtocolError),
        (OK % (2, b"{}"), ProtocolError),
        (OK % (9, b"{"), Closed),
        (OK % (30, b'{"host":[{}],"nodes":[],"x":1}'), ProtocolError),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 3\r\n\r\nbad", Refused),
        (b"HTTP/1.1 200 OK\r\n", Closed),
    ],
)
def test_what_is_no_k2i(
    answering: Callable[[bytes], str], answer: bytes, kind: type[Exception]
) -> None:
    url = answering(answer)
    with pytest.raises(kind):
        Client(url).host()
    with pytest.raises(kind):
        asyncio.run(AsyncClient(url).host())


def test_who_says_nothing_is_not_waited_for(answering: Callable[[bytes], str]) -> None:
    url = answering(b"")
    with pytest.raises(TimedOut):
        Client(url, timeout_s=0.05).host()
    with pytest.raises(TimedOut):
        asyncio.run(AsyncClient(url, timeout_s=0.05).host())


EVENTS = (
    b'event: silent\ndata: {"node":"tokyo/t1"}\n\n'
    b'event: error\ndata: {"error":"busy","message":"too slow"}\n\n'
)


def test_events_of_a_stream(answering: Callable[[bytes], str]) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    events = Client(answering(head + EVENTS)).changes()
    assert next(events) == Silent("tokyo/t1")
    with pytest.raises(Busy, match="too slow"):
        next(events)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_answer_in_pieces_of_any_size(size: int) -> None:
    data = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
    data %= (len(EVENTS), EVENTS)
    reply, found = Reply(), []
    with pytest.raises(Busy):
        for start in range(0, len(data), size):
            reply.feed(data[start : start + size])
            found += reply.take_events()
    assert found == [Silent("tokyo/t1")]


@pytest.mark.parametrize(
    "url", ["", "k2i.sock", "unix://x", "https://x", "http://", "http://x:99999", "http://x/y"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UsageError):
        parse_url(url)


def test_targets() -> None:
    assert encode_target("/v2/x", {}) == "/v2/x"
    params = {"pid": [1, 2], "app": "a/b", "mapped": True, "name": "x&y", "user": None}
    assert encode_target("/v2/x", params) == "/v2/x?pid=1,2&app=a/b&mapped=yes&name=x%26y"


def test_errors_by_their_codes() -> None:
    assert type(error_of("denied", "x")) is Denied
    assert type(error_of("unauthenticated", "x")) is Unauthenticated
    assert type(error_of("spec", "x")) is UsageError
    assert type(error_of("of tomorrow", "x")) is Refused


def test_orders_name_the_process_so_that_no_other_is_meant(
    answering: Callable[[bytes], str], unix: str
) -> None:
    (process,) = Client(unix).processes(pid=os.getpid())
    said = b'{"target":{"dc":"a","node":"b","incarnation":"c","pid":5,"start_ticks":7}}'
    k2i = Client(answering(OK % (len(said), said)))
    outcome = k2i.signal(process, "TERM", dry_run=True)
    assert isinstance(outcome, Outcome)
    assert (outcome.ok, outcome.target.pid) == (True, 5)
