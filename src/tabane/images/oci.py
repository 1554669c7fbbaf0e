"""The OCI image format: descriptors, manifests, configurations, layouts. Pure.

An image is named by its manifest's digest. Everything else follows from the manifest and is checked
against it, so a digest fixed at deploy fixes every byte. Docker's own manifest (version 2, schema
2) differs in its media types only and is taken as it is. The formats are those of the OCI Image
Format Specification 1.1.

What an image is of, its *kind*, is said by its configuration's platform. A WebAssembly program
comes as an image like others, with one file in its layers, or as the artifact that the CNCF's Wasm
working group describes: its layer is the program itself.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

import msgspec

from tabane.errors import Corrupt, UsageError
from tabane.model import Value
from tabane.runtimes.api import Image

LINUX, WASM, SOLO5 = "linux", "wasm", "solo5"
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
ZSTD_LAYERS = (f"{LAYER}+zstd", "application/vnd.docker.image.rootfs.diff.tar.zstd")
TAR_LAYERS = PLAIN_LAYERS + GZIP_LAYERS + ZSTD_LAYERS
WASM_CONFIG = "application/vnd.wasm.config.v0+json"
WASM_LAYERS = ("application/wasm", "application/vnd.wasm.content.layer.v1+wasm")
TITLE = "org.opencontainers.image.title"
PROGRAM = "module.wasm"
"""What an artifact's program is called when it has no title."""
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
MOST_DOCUMENT_BYTES = 4 << 20
"""A manifest or configuration; larger ones are refused, as registries do."""


class Platform(Value, frozen=True, omit_defaults=True):
    architecture: str = ""
    os: str = ""

    def __str__(self) -> str:
        return f"{self.os}/{self.architecture}"

    @property
    def kind(self) -> str:
        """What image it is of; empty: none that could run here."""
        return KINDS.get(self, "")


KINDS = {
    Platform("amd64", "linux"): LINUX,
    Platform("wasm", "wasip1"): WASM,
    Platform("wasm", "wasip2"): WASM,
    Platform("wasm", "wasi"): WASM,
    Platform("amd64", "solo5"): SOLO5,
}
"""Of platforms, those that an index is looked for first."""
NATIVE = Platform("amd64", "linux")


class Descriptor(Value, frozen=True, rename="camel", omit_defaults=True):
    """What names a blob: digest, size and kind."""

    media_type: str
    digest: str
    size: int
    platform: Platform | None = None
    annotations: dict[str, str] = msgspec.field(default_factory=dict)


class Manifest(Value, frozen=True, rename="camel", omit_defaults=False):
    config: Descriptor
    layers: tuple[Descriptor, ...]
    schema_version: int = 2
    media_type: str = MANIFEST

    def digests(self) -> tuple[str, ...]:
        """Of the blobs it needs, the configuration first."""
        return tuple(dict.fromkeys((self.config.digest, *(layer.digest for layer in self.layers))))


class Index(Value, frozen=True, rename="camel", omit_defaults=False):
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


class RootFs(Value, frozen=True, omit_defaults=False):
    diff_ids: tuple[str, ...]
    type: str = "layers"


class Config(Value, frozen=True):
    architecture: str
    os: str
    rootfs: RootFs = RootFs(())
    config: Process | None = None

    @property
    def platform(self) -> Platform:
        return Platform(self.architecture, self.os)


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
    """The digest of the one image that could run here (named `tag`, if given) in a layout.

    `read` gives the blob of a digest, for an index in an index: of that the first is taken whose
    platform stands first in `KINDS`. `where` is for the errors: `UsageError` when there is none or
    more than one.
    """
    named = [e for e in index.manifests if not tag or e.annotations.get(REF_NAME) == tag]
    found = [_manifests(entry, read) for entry in named]
    chosen = {best.digest for entries in found if (best := _best(entries)) is not None}
    if len(chosen) == 1:
        return chosen.pop()
    tags = sorted({e.annotations[REF_NAME] for e in named if REF_NAME in e.annotations})
    if chosen:
        raise UsageError(f"{where} has several images: add one of the tags {', '.join(tags)}")
    platforms = {str(e.platform) for entries in found for e in entries if e.platform}
    if others := sorted(platforms - {"unknown/unknown"}):
        raise UsageError(f"{where} is for {', '.join(others)} only, not for {NATIVE}")
    raise UsageError(f"{where} has no image" + (f" with the tag {tag!r}" if tag else ""))


def _manifests(entry: Descriptor, read: Callable[[str], bytes]) -> list[Descriptor]:
    entries: tuple[Descriptor, ...] = (entry,)
    if entry.media_type in INDEXES:
        entries = parse_index(read(entry.digest)).manifests
    return [one for one in entries if one.media_type in MANIFESTS]


def _best(entries: list[Descriptor]) -> Descriptor | None:
    """What says no platform may be for any."""
    order: list[Platform | None] = [None, *KINDS]
    fitting = [entry for entry in entries if entry.platform in order]
    return min(fitting, key=lambda entry: order.index(entry.platform), default=None)


def check(manifest: Manifest, config: Config, where: str) -> str:
    """The image's kind. Raises `UsageError` for what cannot run here: a foreign platform, layers of
    an unknown type."""
    kind = config.platform.kind
    if not kind:
        raise UsageError(f"{where} is for {config.platform}, not for {NATIVE}")
    if program_of(manifest) is not None:
        return kind
    for layer in manifest.layers:
        if layer.media_type not in TAR_LAYERS:
            types = "tar, gzip or zstd"
            raise UsageError(f"{where} has a layer of type {layer.media_type}: use {types}")
    if len(config.rootfs.diff_ids) != len(manifest.layers):
        raise Corrupt(f"{where} has {len(manifest.layers)} layers, its configuration another count")
    return kind


def program_of(manifest: Manifest) -> Descriptor | None:
    """The layer that is a WebAssembly program itself; None for an image with a tree."""
    layers = manifest.layers
    return next((layer for layer in layers if layer.media_type in WASM_LAYERS), None)


def name_program(layer: Descriptor) -> str:
    """What the program in a layer of its own is called in the image's tree."""
    title = layer.annotations.get(TITLE, "")
    return title if FILE_NAME.fullmatch(title) else PROGRAM


def make_image(digest: str, tree: Path, manifest: Manifest, config: Config) -> Image:
    """What a driver needs to know of an unpacked image. Where that is a program, the entrypoint
    begins with its absolute path."""
    process = config.config or Process()
    entrypoint, cmd = process.entrypoint or (), process.cmd or ()
    kind = config.platform.kind
    if (program := program_of(manifest)) is not None:
        entrypoint = (f"/{name_program(program)}", *entrypoint)
    elif kind != LINUX and not entrypoint:
        entrypoint, cmd = cmd[:1], cmd[1:]
    if kind != LINUX and entrypoint:
        program_path = PurePosixPath("/", process.working_dir, entrypoint[0])
        entrypoint = (str(program_path), *entrypoint[1:])
    return Image(
        digest,
        tree,
        kind,
        entrypoint=entrypoint,
        cmd=cmd,
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
