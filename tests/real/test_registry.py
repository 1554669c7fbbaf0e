"""Images of registries, with Debian's docker-registry and with ones that misbehave."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from zstandard import ZstdCompressor

from tabane.errors import (
    TabaneError,
)
from tabane.images import ImageStore, oci, pack, registry, skopeo
from tabane.images.registry import Progress
from tabane.references import Reference, parse_reference
from tabane.testing.layouts import (
    make_artifact,
    make_manifest,
    of_platform,
    put,
    tar_of,
    write_index,
)
from tabane.testing.registries import Registry, running_registry

MODULE = b"\0asm\x01\0\0\0" + b"module"
UNIKERNEL = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\0\x3e\0" + b"kernel"


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


async def test_layers_of_zstd(there: Registry, store: ImageStore, tmp_path: Path) -> None:
    base, plain = tmp_path / "l", tar_of(a="1")
    layer = put(base, ZstdCompressor().compress(plain), oci.ZSTD_LAYERS[0])
    root = oci.RootFs((oci.digest_of(plain),))
    config = put(base, oci.encode(oci.Config("amd64", "linux", root)), oci.CONFIG)
    manifest = put(base, oci.encode(oci.Manifest(config, (layer,))), oci.MANIFEST)
    write_index(base, manifest)
    await put_there(there, base, "team/zstd:1")
    assert await pull(store, f"docker://{there.host}/team/zstd:1") == manifest.digest
    assert ((await store.prepare(manifest.digest)).tree / "a").read_text() == "1"


@pytest.mark.parametrize(
    ("source", "program"), [("wasm:program", MODULE), ("solo5:program", UNIKERNEL)]
)
async def test_programs_there_and_back(
    there: Registry, store: ImageStore, tmp_path: Path, source: str, program: bytes
) -> None:
    (tmp_path / "program").write_bytes(program)
    with pack(source, tmp_path) as packed:
        (tmp_path / "image.tar").write_bytes(b"".join(packed.chunks()))
    digest = await store.import_layout(tmp_path / "image.tar")
    name = f"docker://{there.host}/team/{source.partition(':')[0]}:1"
    async with store.receive() as incoming:
        assert all(map(incoming.take_known, store.blobs(digest)))
        await registry.push(incoming, digest, parse_reference(name), lambda progress: None)
    other = ImageStore(tmp_path / "other")
    assert await pull(other, name) == digest
    image = await other.prepare(digest)
    assert f"{image.kind}:program" == source and image.entrypoint == ("/program",)
