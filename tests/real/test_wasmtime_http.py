"""HTTP apps that are WebAssembly modules: a CGI call of a fresh instance for each request."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tabane.model import ExitStatus, Reactive
from tabane.testing.drivers import until
from tabane.testing.wasm_bench import (
    PORT,
    Images,
    WasmBench,
    ask,
    open_bench,
)

pytestmark = pytest.mark.real


@pytest.fixture
async def bench(ground: Path, images: Images) -> AsyncIterator[WasmBench]:
    async with open_bench(ground, images) as bench:
        yield bench


async def test_each_request_is_a_fresh_instance(bench: WasmBench) -> None:
    async with bench.serving() as inside:
        replies = [await inside.get("/") for _ in range(3)]
        replies += await asyncio.gather(*(inside.get("/") for _ in range(20)))
        assert {(reply.status, reply.body) for reply in replies} == {(200, b"request 1\n")}
        assert inside.spec.log.read_text() == "served /\n" * 23


async def test_what_a_program_is_told(bench: WasmBench) -> None:
    fields = "\r\nX-One: 1\r\nX-One: 2\r\nCookie: a=b\r\nCookie: c=d\r\nProxy: evil"
    async with bench.serving("one", "two words", env={"OWN": "mine"}) as inside:
        reply = await inside.get("/e%6Ev?a=%20b", method="PUT", fields=fields)
    lines = reply.body.decode().splitlines()
    assert lines[:2] == ["arg one", "arg two words"]
    assert dict(line.split("=", 1) for line in lines[2:]) == {
        "OWN": "mine",
        "GATEWAY_INTERFACE": "CGI/1.1",
        "SERVER_SOFTWARE": "tabane",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": str(PORT),
        "SERVER_PROTOCOL": "HTTP/1.1",
        "SCRIPT_NAME": "",
        "REMOTE_ADDR": "127.0.0.1",
        "REQUEST_METHOD": "PUT",
        "REQUEST_URI": "/e%6Ev?a=%20b",
        "PATH_INFO": "/env",
        "QUERY_STRING": "a=%20b",
        "HTTP_HOST": "here",
        "HTTP_X_ONE": "1, 2",
        "HTTP_COOKIE": "a=b; c=d",
    }


async def test_answers(bench: WasmBench) -> None:
    async with bench.serving() as inside:
        missing = await inside.get("/missing")
        assert missing.head.startswith("HTTP/1.1 404 Not Found\r\n") and missing.whole
        moved = await inside.get("/moved")
        assert moved.status == 302 and "Location: /elsewhere" in moved.head
        assert (await inside.get("/file")).body == b"refused\n"
        assert (await inside.get("/random")).body == b"0\n"
        assert int((await inside.get("/clock")).body) > 1_600_000_000
        head = await inside.get("/", method="HEAD")
        assert (head.status, head.body) == (200, b"")
        old = await ask(inside.link, "GET / HTTP/1.0")
        assert old.body == b"request 1\n" and "chunked" not in old.head
        assert (await inside.get("/stream")).body == b"first\nsecond\n"


async def test_bodies(bench: WasmBench) -> None:
    async with bench.serving() as inside:
        body = bytes(range(256)) * 4096
        length = f"POST /echo HTTP/1.1\r\nContent-Length: {len(body)}"
        assert (await ask(inside.link, length, body)).body == body
        pieces = [body[at : at + 9999] for at in range(0, len(body), 9999)]
        chunks = b"".join(b"%x;note\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
        chunked = "POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked"
        ended = chunks + b"0\r\nTrailer: x\r\n\r\n"
        assert (await ask(inside.link, chunked, ended)).body == body
        unread = await ask(inside.link, "PUT / HTTP/1.1\r\nContent-Length: 99999", body[:99999])
        assert unread.body == b"request 1\n"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("nonsense", 400),
        ("GET / HTTP/2.0", 505),
        ("GET nowhere HTTP/1.1", 400),
        ("GET /%zz HTTP/1.1", 400),
        ("GET /%00 HTTP/1.1", 400),
        ("POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2", 400),
        ("POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked", 400),
        ("POST / HTTP/1.1\r\nContent-Length: -1", 400),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: gzip", 501),
        ("GET / HTTP/1.1\r\nBad Name: x", 400),
        ("GET / HTTP/1.1\r\nX: " + "y" * 40_000, 431),
        ("GET / HTTP/1.1\r\n" + "".join(f"X{n}: y\r\n" for n in range(300)) + "Z: z", 431),
    ],
)
async def test_bad_requests(bench: WasmBench, head: str, status: int) -> None:
    async with bench.serving() as inside:
        assert (await ask(inside.link, head)).status == status
        assert (await inside.get("/")).status == 200


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/loop", 504, "its time is up"),
        ("/sleep", 504, "its time is up"),
        ("/trap", 500, "unreachable"),
        ("/exit", 500, "it exited with code 7"),
        ("/eat", 500, "it exited with code 12"),
        ("/silent", 500, "it wrote no header lines"),
        ("/junk", 500, "it wrote no header lines as CGI has them"),
    ],
)
async def test_a_request_that_fails_fails_alone(
    bench: WasmBench, path: str, status: int, words: str
) -> None:
    """And in time; the others are answered meanwhile."""
    async with bench.serving(reactive=Reactive(response_timeout_s=0.5)) as inside:
        failing = asyncio.ensure_future(inside.get(path))
        assert (await inside.get("/")).status == 200
        reply = await failing
        assert reply.status == status
        assert words in reply.body.decode() and words in inside.spec.log.read_text()
        assert (await inside.get("/")).body == b"request 1\n"


async def test_an_answer_that_breaks_off_shows(bench: WasmBench) -> None:
    async with bench.serving() as inside:
        reply = await inside.get("/cut")
        assert (reply.status, reply.whole) == (200, False)


async def test_more_requests_than_fit_wait(bench: WasmBench) -> None:
    async with bench.serving(reactive=Reactive(concurrency=2)) as inside:
        replies = await asyncio.gather(*(inside.get("/stream") for _ in range(8)))
        assert {reply.body for reply in replies} == {b"first\nsecond\n"}
        assert len(list(Path(f"/proc/{inside.pid}/task").iterdir())) == 2


async def test_stopping_ends_answers_first(bench: WasmBench) -> None:
    async with bench.serving() as inside:
        asking = asyncio.ensure_future(inside.get("/stream"))
        await wait_for_threads(inside.pid)
        await inside.driver.stop(inside.handle, 20)
        assert (await asking).body == b"first\nsecond\n"
        assert await inside.driver.wait(inside.handle) == ExitStatus(signal=signal.SIGTERM)


async def wait_for_threads(pid: int) -> None:
    """Until one has a connection: a socket besides the one that listens."""

    async def connected() -> bool:
        links = [path.readlink() for path in Path(f"/proc/{pid}/fd").iterdir()]
        return sum(str(link).startswith("socket:") for link in links) > 1

    await until(connected)


async def test_frozen_and_thawed_it_answers(bench: WasmBench) -> None:
    async with bench.serving() as inside:
        await inside.driver.freeze(inside.handle)
        asking = asyncio.ensure_future(inside.get("/"))
        await asyncio.sleep(0)
        await inside.driver.thaw(inside.handle)
        assert (await asking).status == 200


async def test_the_program_within_is_told(bench: WasmBench) -> None:
    async with bench.serving("an", "argument") as inside:
        (found,) = await inside.driver.guest_processes(inside.handle)
        assert (found.inside, found.name) == ("wasm", "cgi.wasm")
        assert found.command == "/cgi.wasm an argument"
