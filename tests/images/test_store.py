"""Images on their way from what an author wrote to a tree on a node."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import pytest

from tabane.errors import Corrupt, NotFound, UsageError
from tabane.images import ImageStore, Packed, layout, oci, pack
from tabane.images.layers import unpack
from tabane.testing.layouts import (
    make_manifest,
    of_platform,
    put,
    tagged,
    tar_of,
    write_index,
)


async def sent(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def bring(store: ImageStore, source: str, base: Path) -> str:
    with pack(source, base) as packed:
        return await store.import_layout(sent(packed.chunks()))


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    tree = tmp_path / "rootfs"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin/tool").write_text("#!tool")
    (tree / "bin/tool").chmod(0o755)
    return tree


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "store")


async def test_a_directory_becomes_an_image(store: ImageStore, rootfs: Path) -> None:
    digest = await bring(store, "rootfs:rootfs", rootfs.parent)
    assert store.has(digest) and store.digests() == [digest]
    image = await store.prepare(digest)
    assert (image.tree / "bin/tool").read_text() == "#!tool"
    assert (image.tree / "bin/tool").stat().st_mode & 0o777 == 0o755
    assert (image.digest, image.entrypoint, image.host_usr) == (digest, (), False)


async def test_the_same_tree_has_the_same_digest(rootfs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(rootfs, copy, symlinks=True)
    with pack("rootfs:rootfs", tmp_path) as one, pack(f"rootfs:{copy}", Path("/")) as two:
        assert one.digest == two.digest
    (copy / "more").write_text("")
    with pack("rootfs:copy", tmp_path) as three:
        assert three.digest != one.digest


async def test_layers_and_config(store: ImageStore, tmp_path: Path) -> None:
    first, second = tar_of(a="1", b="2"), gzip.compress(tar_of(a="3", __wh__b=""))
    config = {
        "User": "web",
        "Env": ["A=1"],
        "Entrypoint": ["/a"],
        "Cmd": None,
        "WorkingDir": "/w",
        "StopSignal": "SIGINT",
        "ExposedPorts": {"80/tcp": {}},
    }
    write_index(
        tmp_path / "l", tagged(make_manifest(tmp_path / "l", first, second, **config), "v1")
    )
    image = await store.prepare(await bring(store, "oci:l", tmp_path))
    assert {path.name: path.read_text() for path in image.tree.iterdir()} == {"a": "3"}
    assert (image.user, image.env, image.workdir) == ("web", ("A=1",), "/w")
    assert (image.entrypoint, image.cmd, image.stop_signal) == (("/a",), (), "SIGINT")


async def test_another_node_gets_the_same(store: ImageStore, rootfs: Path, tmp_path: Path) -> None:
    digest = await bring(store, f"rootfs:{rootfs}", tmp_path)
    other = ImageStore(tmp_path / "other")
    assert await other.import_layout(sent(store.export(digest))) == digest
    assert await other.import_layout(sent(store.export(digest))) == digest
    assert other.digests() == [digest]


async def test_an_archive_of_a_layout(store: ImageStore, rootfs: Path, tmp_path: Path) -> None:
    with pack(f"rootfs:{rootfs}", tmp_path) as packed:
        (tmp_path / "image.tar").write_bytes(b"".join(packed.chunks()))
    (tmp_path / "image.tar.gz").write_bytes(gzip.compress((tmp_path / "image.tar").read_bytes()))
    for name in ("image.tar", "image.tar.gz"):
        assert await bring(store, f"archive:{name}", tmp_path) == packed.digest
    assert await store.import_layout(tmp_path / "image.tar") == packed.digest


@pytest.mark.real
async def test_what_docker_saves(store: ImageStore, tmp_path: Path) -> None:
    write_index(tmp_path / "l", tagged(make_manifest(tmp_path / "l", tar_of(a="1")), "v1"))
    target = f"docker-archive:{tmp_path}/saved.tar:name:v1"
    copy = ("skopeo", "copy", "-q", f"oci:{tmp_path}/l:v1", target)
    await asyncio.to_thread(subprocess.run, copy, check=True)
    with pack("archive:saved.tar", tmp_path) as one, pack("archive:saved.tar", tmp_path) as two:
        assert one.digest == two.digest
        image = await store.prepare(await store.import_layout(sent(one.chunks())))
    assert (image.tree / "a").read_text() == "1"


async def test_tags_and_platforms_choose(tmp_path: Path) -> None:
    base = tmp_path / "l"
    one, two = make_manifest(base, tar_of(a="1")), make_manifest(base, tar_of(a="2"))
    foreign = make_manifest(base, tar_of(a="3"), architecture="arm64")
    both = (of_platform(foreign, "arm64"), of_platform(two, "amd64"))
    index = put(base, oci.encode(oci.Index(both)), oci.INDEX)
    write_index(base, tagged(one, "one"), tagged(index, "two"))
    for tag, manifest in (("one", one), ("two", two)):
        with pack(f"oci:l:{tag}", tmp_path) as packed:
            assert packed.digest == manifest.digest


def several(base: Path) -> None:
    one, two = make_manifest(base, tar_of(a="1")), make_manifest(base, tar_of(a="2"))
    write_index(base, tagged(one, "one"), tagged(two, "two"))


def foreign(base: Path) -> None:
    manifest = make_manifest(base, tar_of(a="1"), architecture="arm64")
    write_index(base, of_platform(manifest, "arm64"))


def secretly_foreign(base: Path) -> None:
    write_index(base, make_manifest(base, tar_of(a="1"), architecture="arm64"))


def strange_layer(base: Path) -> None:
    config = put(base, b'{"architecture":"amd64","os":"linux","rootfs":{"diff_ids":["x"]}}', "")
    layer = put(base, b"brotli", f"{oci.LAYER}+br")
    write_index(base, put(base, oci.encode(oci.Manifest(config, (layer,))), oci.MANIFEST))


def no_image(base: Path) -> None:
    base.mkdir()
    write_index(base)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (several, "has several images: add one of the tags one, two"),
        (foreign, "is for linux/arm64 only, not for linux/amd64"),
        (secretly_foreign, "is for linux/arm64, not for linux/amd64"),
        (strange_layer, "has a layer of type .*br: use tar, gzip or zstd"),
        (no_image, "has no image$"),
    ],
)
def test_layouts_that_do_not_fit(
    tmp_path: Path, make: Callable[[Path], None], problem: str
) -> None:
    make(tmp_path / "l")
    with pytest.raises(UsageError, match=problem):
        pack("oci:l", tmp_path)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("rootfs:missing", "missing does not exist"),
        ("rootfs:file", "is not a directory"),
        ("rootfs:", "is none of rootfs:PATH, oci:PATH, archive:PATH, wasm:PATH"),
        ("docker://x/y:z", "is none of"),
        ("host", "is none of"),
        ("oci:missing:tag", "missing:tag does not exist"),
        ("archive:file", "is no tar archive, or is cut off"),
        ("archive:empty.tar", "is not an OCI image archive"),
    ],
)
def test_sources_that_cannot_be(tmp_path: Path, source: str, problem: str) -> None:
    (tmp_path / "file").write_text("no tar")
    (tmp_path / "empty.tar").write_bytes(tar_of(other="x"))
    with pytest.raises((UsageError, Corrupt), match=problem):
        pack(source, tmp_path)


def test_a_layout_without_a_blob(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path / "l", tar_of(a="1"))
    write_index(tmp_path / "l", manifest)
    layer = layout.blob_path(tmp_path / "l", oci.digest_of(tar_of(a="1")))
    layer.write_bytes(layer.read_bytes()[:-10])
    with pytest.raises(Corrupt, match="has 10230 of 10240 bytes: make the image again"):
        pack("oci:l", tmp_path)
    layer.unlink()
    with pytest.raises(Corrupt, match="is missing"):
        pack("oci:l", tmp_path)


def test_nothing_is_left_of_a_failed_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    for source in ("rootfs:missing", "archive:missing", "oci:missing"):
        with pytest.raises(UsageError):
            pack(source, tmp_path)
    assert list((tmp_path / "scratch").iterdir()) == []


def streamed(packed: Packed) -> bytes:
    return b"".join(packed.chunks())


async def test_every_bit_is_verified(store: ImageStore, rootfs: Path, tmp_path: Path) -> None:
    with pack(f"rootfs:{rootfs}", tmp_path) as packed:
        data = streamed(packed)
    at = data.index(b"#!tool")
    broken = data[:at] + b"!!" + data[at + 2 :]
    with pytest.raises(Corrupt, match="is not what its name says"):
        await store.import_layout(sent([broken]))
    assert store.digests() == []
    assert list((tmp_path / "store/incoming").iterdir()) == []


@pytest.mark.parametrize("part", [0.0, 0.1, 0.3, 0.5, 0.8])
async def test_a_stream_that_breaks_off(
    store: ImageStore, rootfs: Path, tmp_path: Path, part: float
) -> None:
    with pack(f"rootfs:{rootfs}", tmp_path) as packed:
        data = streamed(packed)
    with pytest.raises((Corrupt, UsageError)):
        await store.import_layout(sent([data[: int(len(data) * part)]]))
    assert store.digests() == []


async def test_a_sender_that_fails(store: ImageStore, tmp_path: Path) -> None:
    async def failing() -> AsyncIterator[bytes]:
        yield b"x" * 100
        raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError):
        await store.import_layout(failing())
    assert list((tmp_path / "store/incoming").iterdir()) == []


@pytest.mark.parametrize("name", ["blobs/sha256/../../../x", "blobs/sha256/" + "A" * 64])
async def test_names_that_are_no_digests(store: ImageStore, tmp_path: Path, name: str) -> None:
    with pytest.raises(Corrupt, match="is not a sha256 digest"):
        await store.import_layout(sent([tar_of(**{name: "x"})]))
    assert not (tmp_path / "x").exists()


async def test_many_ask_at_once(store: ImageStore, rootfs: Path) -> None:
    digest = await bring(store, "rootfs:rootfs", rootfs.parent)
    images = await asyncio.gather(*(store.prepare(digest) for _ in range(8)))
    assert len({id(image) for image in images}) == 1


async def test_a_store_opened_again(store: ImageStore, rootfs: Path, tmp_path: Path) -> None:
    digest = await bring(store, "rootfs:rootfs", rootfs.parent)
    image = await store.prepare(digest)
    (tmp_path / "store/incoming/half").mkdir()
    again = ImageStore(tmp_path / "store")
    assert await again.prepare(digest) == image
    assert list((tmp_path / "store/incoming").iterdir()) == []


async def test_a_layer_that_is_not_its_diff_id(store: ImageStore, tmp_path: Path) -> None:
    base = tmp_path / "l"
    digest = oci.digest_of(b"other")
    document = {"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": [digest]}}
    config = put(base, json.dumps(document).encode(), oci.CONFIG)
    layer = put(base, gzip.compress(tar_of(a="1")), oci.GZIP_LAYERS[0])
    write_index(base, put(base, oci.encode(oci.Manifest(config, (layer,))), oci.MANIFEST))
    image = await bring(store, "oci:l", tmp_path)
    with pytest.raises(Corrupt, match="unpacks to"):
        await store.prepare(image)
    assert list((tmp_path / "store/trees").iterdir()) == []
    assert list((tmp_path / "store/incoming").iterdir()) == []


@pytest.mark.parametrize("data", [b"no gzip", gzip.compress(b"x" * 9999)[:30]])
def test_a_layer_that_is_not_compressed_well(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "blob").write_bytes(data)
    (tmp_path / "tree").mkdir()
    with pytest.raises(Corrupt):
        unpack(tmp_path / "blob", "sha256:x", tmp_path / "tree")


async def test_removing_keeps_what_others_need(store: ImageStore, tmp_path: Path) -> None:
    shared, own = tar_of(a="1"), tar_of(b="2")
    write_index(tmp_path / "one", make_manifest(tmp_path / "one", shared))
    write_index(tmp_path / "two", make_manifest(tmp_path / "two", shared, own))
    one, two = [await bring(store, f"oci:{name}", tmp_path) for name in ("one", "two")]
    await store.prepare(two)
    await store.remove(two)
    await store.remove(two)
    assert store.digests() == [one]
    assert not layout.blob_path(tmp_path / "store", oci.digest_of(own)).exists()
    assert list((tmp_path / "store/trees").iterdir()) == []
    assert ((await store.prepare(one)).tree / "a").read_text() == "1"


async def test_what_another_version_wrote_has_to_come_anew(
    store: ImageStore, rootfs: Path, tmp_path: Path
) -> None:
    digest = await bring(store, f"rootfs:{rootfs}", tmp_path)
    (tmp_path / "store/images" / digest.removeprefix("sha256:")).write_text(f'["{digest}"]')
    again = ImageStore(tmp_path / "store")
    assert again.list_images() == [] and not again.has(digest)
    assert await bring(again, f"rootfs:{rootfs}", tmp_path) == digest
    assert ((await again.prepare(digest)).tree / "bin/tool").exists()


async def test_unknown_images(store: ImageStore) -> None:
    digest = "sha256:" + "0" * 64
    assert not store.has(digest)
    with pytest.raises(NotFound, match="is not in this node's store"):
        await store.prepare(digest)
    with pytest.raises(NotFound):
        store.export(digest)
    with pytest.raises(Corrupt, match="is not a sha256 digest"):
        store.has("sha256:../../etc/passwd")


async def test_the_hosts_skeleton(store: ImageStore) -> None:
    image = await store.prepare("host")
    assert image.host_usr and image.tree.stat().st_mode & 0o777 == 0o755
    assert (image.tree / "bin").readlink() == Path("usr/bin")
    assert (image.tree / "tmp").stat().st_mode & 0o7777 == 0o1777
    assert (image.tree / "etc/passwd").read_text().startswith("root:x:0:0:")
    assert not list((image.tree / "usr").iterdir())
    assert not (image.tree / "etc/shadow").exists() and not (image.tree / "etc/hostname").exists()
    assert (await ImageStore(image.tree.parents[2]).prepare("host")).tree == image.tree
