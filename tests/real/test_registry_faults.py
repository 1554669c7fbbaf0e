"""Registries that misbehave, and those who pull from them that end."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.real.test_registry import fails, make, pull

from tabane.errors import Corrupt, Denied, TabaneError, Unreachable, Unsupported, UsageError
from tabane.images import ImageStore, layout, oci, skopeo
from tabane.supervise import Supervisor
from tabane.testing.layouts import tar_of

TLS_HANDSHAKE = b"\x16"


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skopeo, "PAUSES_S", (0.0, 0.0))


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "store")


Answer = Callable[[str, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def straw(answer: Answer) -> AsyncIterator[str]:
    """A registry whose answers to requests, by path, are up to the test."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if (first := await reader.readexactly(1)) == TLS_HANDSHAKE:
                return  # which is tried first
            head = first + await reader.readuntil(b"\r\n\r\n")
            await answer(head.split(b" ")[1].decode(), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


def http(status: str, body: bytes, media_type: str = "application/json", size: int = -1) -> bytes:
    length = len(body) if size < 0 else size
    head = f"HTTP/1.1 {status}\r\nContent-Type: {media_type}\r\nContent-Length: {length}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


class Straw:
    """Has one image; `layer` writes the answer for its layer."""

    def __init__(self, directory: Path, layer: Answer) -> None:
        self.asked: list[str] = []
        self._layout = directory
        self._manifest = make(directory, tar_of(a="x" * 500_000))
        self._layer = oci.digest_of(tar_of(a="x" * 500_000))
        self._answer_layer = layer

    async def __call__(self, path: str, writer: asyncio.StreamWriter) -> None:
        self.asked.append(path)
        if path == "/v2/":
            writer.write(http("200 OK", b"{}"))
        elif "/manifests/" in path:
            writer.write(http("200 OK", self.read(self._manifest.digest), oci.MANIFEST))
        elif path.endswith(self._layer):
            await self._answer_layer(path, writer)
        else:
            writer.write(http("200 OK", self.read(path.rpartition("/")[2])))
        await writer.drain()

    def read(self, digest: str) -> bytes:
        return layout.blob_path(self._layout, digest).read_bytes()

    def asked_for_layer(self) -> int:
        return sum(path.endswith(self._layer) for path in self.asked)


async def test_a_registry_that_breaks_off_is_asked_again_and_given_up(
    store: ImageStore, tmp_path: Path
) -> None:
    async def half(path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(http("200 OK", b"x" * 1000, size=500_000 + 10_240))

    image = Straw(tmp_path / "l", half)
    async with straw(image) as host:
        said = await fails(pull(store, f"docker://{host}/team/app:1"))
    assert said == (
        f"Unreachable: {host} cannot be reached, or breaks off, also when asked again "
        "(unexpected EOF)"
    )
    assert image.asked_for_layer() == 1 + len(skopeo.PAUSES_S)
    assert list((tmp_path / "store/incoming").iterdir()) == []


async def test_a_registry_that_recovers(store: ImageStore, tmp_path: Path) -> None:
    async def late(path: str, writer: asyncio.StreamWriter) -> None:
        if image.asked_for_layer() < 2:
            writer.write(http("200 OK", b"x" * 1000, size=500_000 + 10_240))
        else:
            writer.write(http("200 OK", image.read(path.rpartition("/")[2])))

    image = Straw(tmp_path / "l", late)
    async with straw(image) as host:
        assert store.has(await pull(store, f"docker://{host}/team/app:1"))


async def test_a_registry_that_falls_silent(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = asyncio.Event()

    async def never(path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(http("200 OK", b"x" * 1000, size=500_000 + 10_240))
        await writer.drain()
        await left.wait()

    monkeypatch.setattr(skopeo, "STALL_S", 0.5)
    async with straw(Straw(tmp_path / "l", never)) as host:
        said = await fails(pull(store, f"docker://{host}/team/app:1"))
        left.set()
    assert said.startswith(f"TimedOut: docker://{host}/team/app@sha256:")
    assert said.endswith(": its registry has been silent for 0.5 s")


@pytest.mark.parametrize(
    ("answer", "kind", "problem"),
    [
        (http("503 Service Unavailable", b"{}"), Unreachable, "cannot be reached"),
        (http("500 Internal Server Error", b"{}"), Unreachable, "cannot be reached"),
        (http("403 Forbidden", b"{}"), Denied, "does not let us have"),
        (http("200 OK", b"no json", oci.MANIFEST), Corrupt, "cannot be read"),
        (http("200 OK", b"{}", oci.MANIFEST), UsageError, "of the type Docker's first schema"),
        (b"", Unreachable, "cannot be reached"),
    ],
)
async def test_registries_that_answer_strangely(
    store: ImageStore, answer: bytes, kind: type[TabaneError], problem: str
) -> None:
    async def strange(path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(http("200 OK", b"{}") if path == "/v2/" else answer)
        await writer.drain()

    async with straw(strange) as host:
        with pytest.raises(kind, match=problem):
            await pull(store, f"docker://{host}/team/app:1")


async def test_a_registry_that_lies_about_a_digest(store: ImageStore, tmp_path: Path) -> None:
    async def other(path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(http("200 OK", b"y" * (500_000 + 10_240)))

    async with straw(Straw(tmp_path / "l", other)) as host:
        name = f"docker://{host}/team/app:1"
        assert "is damaged in its registry" in await fails(pull(store, name))
        wrong = f"docker://{host}/team/app@sha256:{'1' * 64}"
        assert (await fails(pull(store, wrong))).startswith("Corrupt")


async def test_a_name_that_leads_nowhere(store: ImageStore) -> None:
    said = await fails(pull(store, "docker://tabane.invalid/team/app:1"))
    assert said.startswith("Unreachable: tabane.invalid cannot be reached")


async def test_without_skopeo(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Unsupported, match="needs skopeo on this node: install"):
        await pull(store, "docker://127.0.0.1:1/team/app:1")


PULLS = """\
import asyncio, sys
from tabane.images import registry
from tabane.references import parse_reference
asyncio.run(registry.resolve(parse_reference(sys.argv[1])))
"""


async def test_skopeo_ends_with_who_started_it() -> None:
    """Also when that is killed."""
    asked, gone = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        while await reader.read(1000):
            pass
        writer.close()
        gone.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        name = f"docker://127.0.0.1:{server.sockets[0].getsockname()[1]}/a/b:1"
        agent = await asyncio.create_subprocess_exec(sys.executable, "-c", PULLS, name)
        await asked.wait()
        agent.kill()
        await agent.wait()
        await gone.wait()


async def test_a_pull_that_is_given_up_leaves_no_skopeo(store: ImageStore, tmp_path: Path) -> None:
    asked, left = asyncio.Event(), asyncio.Event()

    async def never(path: str, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await left.wait()

    async with straw(Straw(tmp_path / "l", never)) as host, Supervisor("test") as tasks:
        task = tasks.start("pull", pull(store, f"docker://{host}/team/app:1"))
        await asked.wait()
        task.cancel()
        await asyncio.wait([task])
        left.set()
    assert list((tmp_path / "store/incoming").iterdir()) == []
    assert store.room.used_bytes == 0
