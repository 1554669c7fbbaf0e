"""Images of registries, with Debian's docker-registry and with ones that misbehave."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tabane.errors import (
    Corrupt,
    Denied,
    TabaneError,
    Unreachable,
    Unsupported,
    UsageError,
)
from tabane.images import ImageStore, layout, oci, registry, skopeo
from tabane.images.registry import Progress
from tabane.references import Reference, parse_reference
from tabane.supervise import Supervisor
from tabane.testing.layouts import (
    make_artifact,
    make_manifest,
    of_platform,
    put,
    tar_of,
    write_index,
)
from tabane.testing.registries import Registry, running_registry

TLS_HANDSHAKE = b"\x16"
MODULE = b"\0asm\x01\0\0\0" + b"module"


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skopeo, "PAUSES_S", (0.0, 0.0))


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "store")


def make(directory: Path, *layers: bytes, **config: str) -> oci.Descriptor:
    manifest = make_manifest(directory, *layers, **config)
    write_index(directory, manifest)
    return manifest


async def put_there(there: Registry, directory: Path, name: str, **how: bool) -> None:
    await asyncio.to_thread(there.put, directory, name, **how)


async def pull(
    store: ImageStore, name: str, auth: str = "", told: list[Progress] | None = None
) -> str:
    image = await registry.resolve(parse_reference(name), auth)
    async with store.receive() as incoming:
        tell = (told if told is not None else []).append
        await registry.fetch(image, incoming, tell, auth)
        return await store.adopt(incoming, image.digest, name)


async def fails(work: Awaitable[object]) -> str:
    """In one sentence."""
    with pytest.raises(TabaneError) as error:
        await work
    assert "\n" not in error.value.message
    return f"{type(error.value).__name__}: {error.value.message}"


async def test_there_and_back(there: Registry, store: ImageStore, tmp_path: Path) -> None:
    manifest = make(tmp_path / "l", gzip.compress(tar_of(a="1")), tar_of(b="2"), User="7")
    await put_there(there, tmp_path / "l", "team/app:1")
    told: list[Progress] = []
    digest = await pull(store, f"docker://{there.host}/team/app:1", told=told)
    assert digest == manifest.digest
    image = await store.prepare(digest)
    assert {path.name: path.read_text() for path in image.tree.iterdir()} == {"a": "1", "b": "2"}
    assert (image.kind, image.user) == ("linux", "7")
    assert store.describe(digest).source == f"docker://{there.host}/team/app:1"
    total = told[-1].total_bytes
    assert told[-1] == Progress("pull", there.host, total, total) and total > 10240
    async with store.receive() as incoming:
        for blob in store.blobs(digest):
            assert incoming.take_known(blob)
        target = parse_reference(f"docker://{there.host}/other/app:2")
        await registry.push(incoming, digest, target, told.append)
    assert told[-1].step == "push"
    other = ImageStore(tmp_path / "other")
    assert await pull(other, f"docker://{there.host}/other/app@{digest}") == digest


async def test_an_image_in_dockers_form_keeps_its_digest(
    there: Registry, store: ImageStore, tmp_path: Path
) -> None:
    make(tmp_path / "l", gzip.compress(tar_of(a="1")), tar_of(b="2"), User="7")
    await put_there(there, tmp_path / "l", "team/docker:1", docker=True)
    digest = await pull(store, f"docker://{there.host}/team/docker:1")
    assert store.manifest(digest).media_type == oci.MANIFESTS[1]
    image = await store.prepare(digest)
    assert image.user == "7" and (image.tree / "b").read_text() == "2"
    other = ImageStore(tmp_path / "other")
    assert await pull(other, f"docker://{there.host}/team/docker@{digest}") == digest


async def test_what_is_here_is_not_fetched_again(
    there: Registry, store: ImageStore, tmp_path: Path
) -> None:
    base, more = tar_of(base="b" * 100_000), tar_of(more="2")
    make(tmp_path / "one", base)
    two = make(tmp_path / "two", base, more)
    for name in ("one", "two"):
        await put_there(there, tmp_path / name, f"team/shared:{name}")
    await pull(store, f"docker://{there.host}/team/shared:one")
    there.blob(oci.digest_of(base)).rename(tmp_path / "away")
    told: list[Progress] = []
    assert await pull(store, f"docker://{there.host}/team/shared:two", told=told) == two.digest
    assert told[-1].total_bytes == len(more)
    async with store.receive() as incoming:
        image = await registry.resolve(
            parse_reference(f"docker://{there.host}/team/shared@{two.digest}")
        )
        await registry.fetch(image, incoming, told.append)


async def test_a_tag_may_move_a_digest_does_not(
    there: Registry, store: ImageStore, tmp_path: Path
) -> None:
    one = make(tmp_path / "one", tar_of(a="1"))
    two = make(tmp_path / "two", tar_of(a="2"))
    name = f"docker://{there.host}/team/moving"
    await put_there(there, tmp_path / "one", "team/moving:now")
    assert await pull(store, f"{name}:now") == one.digest
    await put_there(there, tmp_path / "two", "team/moving:now")
    assert await pull(store, f"{name}:now") == two.digest
    assert await pull(store, f"{name}@{one.digest}") == one.digest


async def test_an_index_and_an_artifact(there: Registry, store: ImageStore, tmp_path: Path) -> None:
    base = tmp_path / "l"
    here = make_manifest(base, tar_of(a="1"))
    foreign = make_manifest(base, tar_of(a="2"), architecture="arm64")
    entries = (of_platform(foreign, "arm64"), of_platform(here, "amd64"))
    index = put(base, oci.encode(oci.Index(entries)), oci.INDEX)
    write_index(base, index)
    await put_there(there, base, "team/many:1")
    assert await pull(store, f"docker://{there.host}/team/many:1") == here.digest
    assert await pull(store, f"docker://{there.host}/team/many@{index.digest}") == here.digest

    module = make_artifact(tmp_path / "w", MODULE, title="app.wasm")
    write_index(tmp_path / "w", module)
    await put_there(there, tmp_path / "w", "team/wasm:1")
    assert await pull(store, f"docker://{there.host}/team/wasm:1") == module.digest
    image = await store.prepare(module.digest)
    assert (image.kind, image.entrypoint) == ("wasm", ("/app.wasm",))


async def test_images_for_other_machines(
    there: Registry, store: ImageStore, tmp_path: Path
) -> None:
    make(tmp_path / "arm", tar_of(a="1"), architecture="arm64")
    await put_there(there, tmp_path / "arm", "team/arm:1")
    base = tmp_path / "l"
    entry = of_platform(make_manifest(base, tar_of(a="1"), architecture="arm64"), "arm64")
    write_index(base, put(base, oci.encode(oci.Index((entry,))), oci.INDEX))
    await put_there(there, base, "team/arms:1")
    name = f"docker://{there.host}/team"
    assert await fails(pull(store, f"{name}/arm:1")) == (
        f"UsageError: {name}/arm:1 is for linux/arm64, not for linux/amd64"
    )
    assert await fails(pull(store, f"{name}/arms:1")) == (
        f"UsageError: {name}/arms:1 is for linux/arm64 only, not for linux/amd64"
    )
    assert store.digests() == []


async def test_what_is_not_there(there: Registry, store: ImageStore, tmp_path: Path) -> None:
    make(tmp_path / "l", tar_of(a="1"))
    await put_there(there, tmp_path / "l", "team/known:1")
    name = f"docker://{there.host}/team"
    for image in (f"{name}/known:2", f"{name}/unknown:1", f"{name}/known@sha256:{'0' * 64}"):
        assert await fails(pull(store, image)) == (
            f"NotFound: {there.host} has no image {image}: look at its name and tag"
        )


async def test_a_registry_that_wants_a_login(store: ImageStore, tmp_path: Path) -> None:
    make(tmp_path / "l", tar_of(a="1"))
    with running_registry(tmp_path, login=True) as there:
        await put_there(there, tmp_path / "l", "team/app:1", login=True)
        name = f"docker://{there.host}/team/app:1"
        refused = (
            f"Denied: {there.host} does not let us have {name}: log in on the node "
            f"(`skopeo login {there.host}`), or name a file with a login that may (--authfile)"
        )
        assert await fails(pull(store, name)) == refused
        assert await fails(pull(store, name, there.auth_file("wrong"))) == refused
        assert store.has(await pull(store, name, there.auth_file()))
    assert (await fails(pull(store, name))).startswith(
        f"Unreachable: {there.host} cannot be reached, or breaks off, also when asked again "
    )


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"\0" + data[1:]])
async def test_a_layer_that_is_damaged_in_its_registry(
    there: Registry, store: ImageStore, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    layer = gzip.compress(tar_of(a=f"{damage}" * 1000))
    make(tmp_path / "l", layer)
    await put_there(there, tmp_path / "l", "team/damaged:1")
    there.blob(oci.digest_of(layer)).write_bytes(damage(layer))
    name = f"docker://{there.host}/team/damaged:1"
    assert (await fails(pull(store, name))).startswith(f"Corrupt: docker://{there.host}")
    assert store.digests() == [] and list((tmp_path / "store/incoming").iterdir()) == []


async def test_an_image_that_is_larger_than_the_quota(there: Registry, tmp_path: Path) -> None:
    make(tmp_path / "l", tar_of(a="x" * (1 << 20)))
    await put_there(there, tmp_path / "l", "team/large:1")
    store = ImageStore(tmp_path / "store", 1 << 20)
    name = f"docker://{there.host}/team/large:1"
    assert (await fails(pull(store, name))).startswith(
        "NoRoom: this alone takes more than the 1.0 MiB"
    )
    assert store.room.used_bytes == 0


async def test_a_disk_that_fills_up_while_pulling(there: Registry, tmp_path: Path) -> None:
    make(tmp_path / "l", tar_of(a="".join(map(str, range(1 << 20)))))
    await put_there(there, tmp_path / "l", "team/fills:1")
    place = tmp_path / "disk"
    place.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place))
    await asyncio.to_thread(subprocess.run, mount, check=True)
    try:
        store = ImageStore(place / "store", 1 << 40)
        said = await fails(pull(store, f"docker://{there.host}/team/fills:1"))
        assert said.startswith("NoRoom: docker://") and "the disk is full" in said
        assert list((place / "store/incoming").iterdir()) == []
    finally:
        await asyncio.to_thread(subprocess.run, ("umount", str(place)), check=True)


# Registries of straw

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


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no registry were on loopback."""
    monkeypatch.setattr(Reference, "is_local", False)


@pytest.mark.usefixtures("elsewhere")
async def test_what_speaks_no_tls_is_not_asked_in_the_clear(
    there: Registry, store: ImageStore
) -> None:
    assert await fails(pull(store, f"docker://{there.host}/team/app:1")) == (
        f"Unsupported: {there.host} speaks no TLS: have it do so, or say `insecure = true` for it "
        "in /etc/containers/registries.conf of each node"
    )


@pytest.mark.usefixtures("elsewhere")
async def test_a_certificate_that_nobody_vouches_for(store: ImageStore, tmp_path: Path) -> None:
    with running_registry(tmp_path, tls=True) as secret:
        said = await fails(pull(store, f"docker://{secret.host}/team/app:1"))
    assert said.startswith(f"Unsupported: {secret.host} cannot prove who it is: put its authority")
    assert f"/etc/containers/certs.d/{secret.host}/ of each node" in said


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
