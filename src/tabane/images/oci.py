"""The OCI image format: descriptors, manifests, configurations, layouts. Pure.

An image is named by its manifest's digest. Everything else follows from the manifest and is checked
against it, so a digest fixed at deploy fixes every byte. Docker's own manifest (version 2, schema
2) differs in its media types only and is taken as it is. The formats are those of the OCI Image
Format Specification 1.1.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from tabane.errors import Corrupt, UsageError
from tabane.model import Value
from tabane.runtimes.api import Image

OS = "linux"
ARCHITECTURE = "amd64"
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
REF_NAME = "org.opencontainers.image.ref.name"
INDEXES = (INDEX, "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFESTS = (MANIFEST, "application/vnd.docker.distribution.manifest.v2+json")
PLAIN_LAYERS = (LAYER, "application/vnd.docker.image.rootfs.diff.tar")
GZIP_LAYERS = (f"{LAYER}+gzip", "application/vnd.docker.image.rootfs.diff.tar.gzip")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
MOST_DOCUMENT_BYTES = 4 << 20
"""A manifest or configuration; larger ones are refused, as registries do."""


class Platform(Value, frozen=True, omit_defaults=True):
    architecture: str = ""
    os: str = ""


class Descriptor(Value, frozen=True, rename="camel", omit_defaults=True):
    """What names a blob: digest, size and kind."""

    media_type: str
    digest: str
    size: int
    platform: Platform | None = None
    annotations: dict[str, str] = msgspec.field(default_factory=dict)


class Manifest(Value, frozen=True, rename="camel", omit_defaults=True):
    config: Descriptor
    layers: tuple[Descriptor, ...]
    schema_version: int = 2
    media_type: str = MANIFEST

    def digests(self) -> tuple[str, ...]:
        """Of the blobs it needs, the configuration first."""
        return tuple(dict.fromkeys((self.config.digest, *(layer.digest for layer in self.layers))))


class Index(Value, frozen=True, rename="camel", omit_defaults=True):
    manifests: tuple[Descriptor, ...]
    schema_version: int = 2


class Process(Value, frozen=True, rename="pascal", omit_defaults=True):
    """The `config` object of an image configuration: what to run, and how."""

    user: str = ""
    env: tuple[str, ...] | None = None
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    working_dir: str = ""
    stop_signal: str = ""


class RootFs(Value, frozen=True):
    diff_ids: tuple[str, ...]
    type: str = "layers"


class Config(Value, frozen=True):
    architecture: str
    os: str
    rootfs: RootFs
    config: Process | None = None


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def check_digest(digest: str) -> str:
    """`digest` if it is one; a path is made of it. Raises `Corrupt`."""
    if not DIGEST.fullmatch(digest):
        raise Corrupt(f"{digest!r} is not a sha256 digest")
    return digest


def describe(media_type: str, data: bytes) -> Descriptor:
    return Descriptor(media_type, digest_of(data), len(data))


def encode(value: Value) -> bytes:
    """Canonical JSON: equal values give equal bytes, hence equal digests."""
    return msgspec.json.encode(value, order="deterministic")


def parse_manifest(data: bytes) -> Manifest:
    """Raises `Corrupt`."""
    manifest = _parse(data, Manifest, "manifest")
    for digest in manifest.digests():
        check_digest(digest)
    return manifest


def parse_index(data: bytes) -> Index:
    """Raises `Corrupt`."""
    index = _parse(data, Index, "index")
    for entry in index.manifests:
        check_digest(entry.digest)
    return index


def parse_config(data: bytes) -> Config:
    """Raises `Corrupt`."""
    return _parse(data, Config, "configuration")


def pick(index: Index, read: Callable[[str], bytes], tag: str, where: str) -> str:
    """The digest of the one image for this platform (named `tag`, if given) in a layout.

    `read` gives the blob of a digest, for an index in an index. `where` is for the errors:
    `UsageError` when there is none or more than one.
    """
    named = [e for e in index.manifests if not tag or e.annotations.get(REF_NAME) == tag]
    found = list(_manifests(named, read))
    matching = {e.digest for e in found if e.platform in (None, Platform(ARCHITECTURE, OS))}
    if len(matching) == 1:
        return matching.pop()
    tags = sorted({e.annotations[REF_NAME] for e in named if REF_NAME in e.annotations})
    if matching:
        raise UsageError(f"{where} has several images: add one of the tags {', '.join(tags)}")
    if found:
        others = sorted({f"{e.platform.os}/{e.platform.architecture}" for e in found if e.platform})
        raise UsageError(f"{where} is for {', '.join(others)} only, not for {OS}/{ARCHITECTURE}")
    raise UsageError(f"{where} has no image" + (f" with the tag {tag!r}" if tag else ""))


def _manifests(entries: list[Descriptor], read: Callable[[str], bytes]) -> Iterator[Descriptor]:
    for entry in entries:
        if entry.media_type in MANIFESTS:
            yield entry
        elif entry.media_type in INDEXES:
            nested = parse_index(read(entry.digest)).manifests
            yield from (e for e in nested if e.media_type in MANIFESTS)


def check(manifest: Manifest, config: Config, where: str) -> None:
    """Refuse what cannot run here: a foreign platform, layers of unknown kind (`UsageError`)."""
    if (config.os, config.architecture) != (OS, ARCHITECTURE):
        platform = f"{config.os}/{config.architecture}"
        raise UsageError(f"{where} is for {platform}, not for {OS}/{ARCHITECTURE}")
    for layer in manifest.layers:
        if layer.media_type not in PLAIN_LAYERS + GZIP_LAYERS:
            raise UsageError(f"{where} has a layer of type {layer.media_type}: use tar or gzip")
    if len(config.rootfs.diff_ids) != len(manifest.layers):
        raise Corrupt(f"{where} has {len(manifest.layers)} layers, its configuration another count")


def make_image(digest: str, tree: Path, config: Config) -> Image:
    """What a driver needs to know of an unpacked image."""
    process = config.config or Process()
    return Image(
        digest,
        tree,
        entrypoint=process.entrypoint or (),
        cmd=process.cmd or (),
        env=process.env or (),
        user=process.user,
        workdir=process.working_dir,
        stop_signal=process.stop_signal,
    )


Document = TypeVar("Document", Manifest, Index, Config)


def _parse(data: bytes, kind: type[Document], name: str) -> Document:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise Corrupt(f"the image's {name} cannot be read: {error}") from error
