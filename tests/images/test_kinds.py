"""Images of programs for other hosts than Linux, and layers as registries have them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
from zstandard import ZstdCompressor

from tabane.errors import Corrupt, UsageError
from tabane.images import ImageStore, layout, oci, pack
from tabane.testing.layouts import (
    make_artifact,
    make_manifest,
    of_platform,
    put,
    tagged,
    tar_of,
    write_index,
)

MODULE = b"\0asm\x01\0\0\0" + b"module"
COMPONENT = b"\0asm\x0d\0\x01\0" + b"component"
UNIKERNEL = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\0\x3e\0" + b"kernel"


async def sent(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def bring(store: ImageStore, source: str, base: Path) -> str:
    with pack(source, base) as packed:
        return await store.import_layout(sent(packed.chunks()))


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "store")


@pytest.mark.parametrize(
    ("source", "program", "kind", "platform"),
    [
        ("wasm:hello.wasm", MODULE, "wasm", oci.Platform("wasm", "wasip1")),
        ("wasm:hello.wasm", COMPONENT, "wasm", oci.Platform("wasm", "wasip2")),
        ("solo5:hello.hvt", UNIKERNEL, "solo5", oci.Platform("amd64", "solo5")),
    ],
)
async def test_a_program_becomes_an_image(
    store: ImageStore,
    tmp_path: Path,
    source: str,
    program: bytes,
    kind: str,
    platform: oci.Platform,
) -> None:
    name = source.partition(":")[2]
    (tmp_path / name).write_bytes(program)
    digest = await bring(store, source, tmp_path)
    image = await store.prepare(digest)
    assert (image.kind, image.entrypoint, image.cmd) == (kind, (f"/{name}",), ())
    assert (image.tree / name).read_bytes() == program
    assert (store.config(digest).platform, store.describe(digest).kind) == (platform, kind)


async def test_a_program_has_the_same_digest_wherever_it_is(
    store: ImageStore, tmp_path: Path
) -> None:
    (tmp_path / "a b").mkdir()
    for name in ("hello", "a b/hello"):
        (tmp_path / name).write_bytes(MODULE)
    with pack("wasm:hello", tmp_path) as one, pack("wasm:a b/hello", tmp_path) as two:
        assert one.digest == two.digest
    (tmp_path / "ü ü").write_bytes(MODULE)
    image = await store.prepare(await bring(store, "wasm:ü ü", tmp_path))
    assert image.entrypoint == ("/module.wasm",)


@pytest.mark.parametrize(
    ("source", "program", "problem"),
    [
        ("wasm:p", b"#!/bin/sh", "is no WebAssembly module or component"),
        ("wasm:p", b"", "is no WebAssembly module or component"),
        ("wasm:p", b"\0asm\x02\0\0\0", "is WebAssembly of version 0x2: want a module"),
        ("wasm:p", UNIKERNEL, "is no WebAssembly module"),
        ("wasm:.", b"", "is not a file"),
        ("wasm:none", b"", "none does not exist"),
        ("solo5:p", MODULE, "is no solo5 unikernel: that is an ELF file for x86-64"),
        ("solo5:p", UNIKERNEL[:10], "is no solo5 unikernel"),
        ("solo5:p", UNIKERNEL.replace(b"\x3e\0", b"\xb7\0"), "is no solo5 unikernel"),
    ],
)
def test_files_that_are_no_such_program(
    tmp_path: Path, source: str, program: bytes, problem: str
) -> None:
    (tmp_path / "p").write_bytes(program)
    with pytest.raises(UsageError, match=problem):
        pack(source, tmp_path)


@pytest.mark.parametrize(
    ("title", "name"),
    [("", "module.wasm"), ("app.wasm", "app.wasm"), ("../../x", "module.wasm")],
)
async def test_an_artifact_of_a_registry(
    store: ImageStore, tmp_path: Path, title: str, name: str
) -> None:
    base = tmp_path / "l"
    write_index(base, make_artifact(base, COMPONENT, os="wasip2", title=title))
    image = await store.prepare(await bring(store, "oci:l", tmp_path))
    assert (image.kind, image.entrypoint) == ("wasm", (f"/{name}",))
    assert (image.tree / name).read_bytes() == COMPONENT


@pytest.mark.parametrize("os", ["wasip1", "wasip2", "wasi"])
@pytest.mark.parametrize(
    ("process", "entrypoint", "cmd"),
    [
        ({"Entrypoint": ["/srv/a"]}, ("/srv/a",), ()),
        ({"Cmd": ["a", "-v"], "WorkingDir": "/srv"}, ("/srv/a",), ("-v",)),
        ({"Entrypoint": ["srv/a"], "Cmd": ["-v"]}, ("/srv/a",), ("-v",)),
    ],
)
async def test_an_image_with_a_module_in_a_layer(
    store: ImageStore,
    tmp_path: Path,
    os: str,
    process: dict[str, object],
    entrypoint: tuple[str, ...],
    cmd: tuple[str, ...],
) -> None:
    base = tmp_path / "l"
    layer = tar_of(**{"srv/a": MODULE})
    write_index(base, make_manifest(base, layer, architecture="wasm", os=os, **process))
    image = await store.prepare(await bring(store, "oci:l", tmp_path))
    assert (image.kind, image.entrypoint, image.cmd) == ("wasm", entrypoint, cmd)


@pytest.mark.parametrize(
    ("entrypoint", "problem"),
    [
        (["/text"], "/text is no WebAssembly module or component"),
        (["/gone"], "the image has no program '/gone'"),
        (["/../../../../etc/passwd"], "the image has no program"),
        ([], "names no program: give it an entrypoint"),
    ],
)
async def test_an_image_without_the_program_it_names(
    store: ImageStore, tmp_path: Path, entrypoint: list[str], problem: str
) -> None:
    base = tmp_path / "l"
    described = {"architecture": "wasm", "os": "wasip1", "Entrypoint": entrypoint}
    write_index(base, make_manifest(base, tar_of(text="no wasm"), **described))
    digest = await bring(store, "oci:l", tmp_path)
    with pytest.raises(UsageError, match=problem):
        await store.prepare(digest)
    assert list((tmp_path / "store/trees").iterdir()) == []
    assert list((tmp_path / "store/incoming").iterdir()) == []


def test_an_index_is_looked_through_for_what_runs_here(tmp_path: Path) -> None:
    base = tmp_path / "l"
    arm, here = (make_manifest(base, tar_of(a=a), architecture=a) for a in ("arm64", "amd64"))
    wasm = make_artifact(base, MODULE)
    attestation = of_platform(make_manifest(base, tar_of(x="x")), "unknown", "unknown")

    def chosen(*entries: oci.Descriptor) -> str:
        index = put(base, oci.encode(oci.Index(entries)), oci.INDEX)
        write_index(base, tagged(index, "v1"))
        with pack("oci:l:v1", tmp_path) as packed:
            return packed.digest

    foreign, native = of_platform(arm, "arm64"), of_platform(here, "amd64")
    module = of_platform(wasm, "wasm", "wasip1")
    assert chosen(attestation, foreign, module, native) == here.digest
    assert chosen(attestation, foreign, module) == wasm.digest
    with pytest.raises(UsageError, match=r"is for linux/arm64 only, not for linux/amd64$"):
        chosen(attestation, foreign)


async def test_a_layer_compressed_with_zstd(store: ImageStore, tmp_path: Path) -> None:
    base, plain = tmp_path / "l", tar_of(a="1")
    document = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"diff_ids": [oci.digest_of(plain)]},
    }
    config = put(base, json.dumps(document).encode(), oci.CONFIG)
    half = len(plain) // 2
    packed = b"".join(ZstdCompressor().compress(part) for part in (plain[:half], plain[half:]))
    layer = put(base, packed, oci.ZSTD_LAYERS[0])
    write_index(base, put(base, oci.encode(oci.Manifest(config, (layer,))), oci.MANIFEST))
    digest = await bring(store, "oci:l", tmp_path)
    assert ((await store.prepare(digest)).tree / "a").read_text() == "1"


def test_what_we_pack_is_what_the_specification_asks_for(tmp_path: Path) -> None:
    """Registries refuse a manifest without its schema's version."""
    (tmp_path / "tree").mkdir()
    with pack("rootfs:tree", tmp_path) as packed:
        stream = tmp_path / "stream.tar"
        stream.write_bytes(b"".join(packed.chunks()))
        layout.extract(stream, tmp_path / "l", "it")
    index = json.loads((tmp_path / "l/index.json").read_bytes())
    read = lambda digest: json.loads(layout.blob_path(tmp_path / "l", digest).read_bytes())  # noqa: E731
    manifest = read(packed.digest)
    assert index["schemaVersion"] == manifest["schemaVersion"] == 2
    assert manifest["mediaType"] == oci.MANIFEST
    assert read(manifest["config"]["digest"])["rootfs"]["type"] == "layers"


async def test_an_image_that_lost_a_blob_on_its_way(store: ImageStore, tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path / "l", tar_of(a="1"), tar_of(b="2"))
    data = layout.blob_path(tmp_path / "l", manifest.digest).read_bytes()
    with pytest.raises(Corrupt, match="is missing"):
        async with store.receive() as incoming:
            assert incoming.write(data) == manifest.digest
            assert len(incoming.missing(oci.parse_manifest(data))) == 3
            await store.adopt(incoming, manifest.digest)
    assert store.digests() == [] and list((tmp_path / "store/incoming").iterdir()) == []
