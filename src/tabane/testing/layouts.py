"""OCI layouts as others would have written them, sound or not, for tests of images."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from tabane.images import layout, oci

GZIP_MAGIC = b"\x1f\x8b"


def put(directory: Path, data: bytes, media_type: str) -> oci.Descriptor:
    """A blob of the layout in `directory`."""
    path = layout.blob_path(directory, oci.digest_of(data))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return oci.describe(media_type, data)


def tar_of(**files: str | bytes) -> bytes:
    """A tar archive of files; `__` in a name stands for a dot."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def make_manifest(
    directory: Path,
    *layers: bytes,
    architecture: str = "amd64",
    os: str = "linux",
    **config: Any,
) -> oci.Descriptor:
    """An image in a layout: gzip where a layer begins like it, else plain."""
    kinds = [oci.GZIP_LAYERS[0] if is_gzip(data) else oci.LAYER for data in layers]
    plain = [gzip.decompress(data) if is_gzip(data) else data for data in layers]
    document = {
        "architecture": architecture,
        "os": os,
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [oci.digest_of(data) for data in plain]},
        "history": [],
    }
    described = put(directory, json.dumps(document).encode(), oci.CONFIG)
    blobs = tuple(put(directory, data, kind) for data, kind in zip(layers, kinds, strict=True))
    return put(directory, oci.encode(oci.Manifest(described, blobs)), oci.MANIFEST)


def make_artifact(
    directory: Path, program: bytes, *, os: str = "wasip1", title: str = ""
) -> oci.Descriptor:
    """A WebAssembly program as an artifact, as registries have them."""
    layer = put(directory, program, oci.WASM_LAYERS[0])
    if title:
        annotations = {oci.TITLE: title}
        layer = oci.Descriptor(layer.media_type, layer.digest, layer.size, None, annotations)
    document = {"architecture": "wasm", "os": os, "layerDigests": [layer.digest]}
    config = put(directory, json.dumps(document).encode(), oci.WASM_CONFIG)
    return put(directory, oci.encode(oci.Manifest(config, (layer,))), oci.MANIFEST)


def is_gzip(data: bytes) -> bool:
    return data.startswith(GZIP_MAGIC)


def write_index(directory: Path, *manifests: oci.Descriptor) -> None:
    """What makes a layout of the blobs."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "index.json").write_bytes(oci.encode(oci.Index(manifests)))
    (directory / "oci-layout").write_bytes(oci.LAYOUT)


def tagged(manifest: oci.Descriptor, tag: str) -> oci.Descriptor:
    annotations = {oci.REF_NAME: tag}
    return oci.Descriptor(manifest.media_type, manifest.digest, manifest.size, None, annotations)


def of_platform(manifest: oci.Descriptor, architecture: str, os: str = "linux") -> oci.Descriptor:
    platform = oci.Platform(architecture, os)
    return oci.Descriptor(manifest.media_type, manifest.digest, manifest.size, platform)
