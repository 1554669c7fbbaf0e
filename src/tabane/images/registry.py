"""Registries, through skopeo, which knows their protocols and the machine's settings for them.

What is wanted is first resolved: of a tag or an index one image is chosen, and its manifest and
configuration are read, so that what cannot run here is refused before its layers are fetched. Then
`skopeo copy` brings the layers that are missing into an OCI layout; it finds those that are there
already. The manifest is kept byte for byte as the registry has it (a layout's would be converted
from Docker's form), so an image has the same digest here and there.

skopeo follows /etc/containers: registries.conf (mirrors, and which registries may be asked without
TLS), certs.d, policy.json (signatures); and the usual files with logins. A registry on loopback may
always be asked without TLS.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from tabane.clock import SYSTEM, Clock
from tabane.errors import Corrupt, UsageError
from tabane.images import oci
from tabane.images.incoming import Incoming
from tabane.images.skopeo import run
from tabane.model import Value
from tabane.references import Reference

LAYOUT = "oci:layout:image"
"""The layout below the directory that skopeo runs in: a path with a colon would be misread."""


class Progress(Value, frozen=True, omit_defaults=True):
    """How far an image has come. `step`: `begin`, `resolve`, `pull`, `copy` (from another node),
    `push`; `where`: the registry or node. `total_bytes` of what is missing here; 0: not known."""

    step: str
    where: str = ""
    done_bytes: int = 0
    total_bytes: int = 0


Tell = Callable[[Progress], object]


class Resolved(Value, frozen=True):
    """What a reference means: one image, as its registry has it. `reference` has its digest."""

    reference: Reference
    manifest: bytes
    config: bytes

    @property
    def digest(self) -> str:
        return self.reference.digest

    @property
    def parsed(self) -> oci.Manifest:
        return oci.parse_manifest(self.manifest)


async def resolve(reference: Reference, auth: str = "") -> Resolved:
    """Ask the registry. `auth`: an auth file's text, else the usual files are looked at.

    Raises as `skopeo.run`, and `Corrupt` for what does not fit together, `UsageError` when it is
    for other machines.
    """
    where = str(reference)
    raw = await _inspect(reference, auth)
    found = read_document(raw, where)
    digest = oci.digest_of(raw)
    if reference.digest not in ("", digest):
        raise Corrupt(f"{where}: the registry sent another manifest, {digest}")
    if isinstance(found, oci.Index):
        entry = oci.Descriptor(oci.INDEX, digest, len(raw))
        digest = oci.pick(oci.Index((entry,)), lambda _: raw, "", where)
        raw = await _inspect(reference.at(digest), auth)
        found = read_document(raw, where)
    if not isinstance(found, oci.Manifest):
        raise Corrupt(f"{where}: its index leads to another index, {digest}")
    config = await _inspect(reference.at(digest), auth, "--config")
    if oci.digest_of(config) != found.config.digest:
        raise Corrupt(f"{where}: its configuration is not what its manifest says")
    oci.check(found, oci.parse_config(config), where)
    return Resolved(reference.at(digest), raw, config)


def read_document(raw: bytes, where: str) -> oci.Manifest | oci.Index:
    """What a registry answers: a manifest, or an index of some. Raises `Corrupt`, `UsageError`."""
    try:
        kind = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        media_type = msgspec.json.decode(kind.get("mediaType", msgspec.Raw(b'""')), type=str)
    except msgspec.DecodeError as error:
        raise Corrupt(f"{where}: the registry's answer cannot be read: {error}") from None
    if media_type in oci.INDEXES or (not media_type and "manifests" in kind):
        return oci.parse_index(raw)
    if media_type in oci.MANIFESTS or (not media_type and "layers" in kind):
        return oci.parse_manifest(raw)
    what = media_type or "Docker's first schema"
    raise UsageError(f"{where} has a manifest of the type {what}: push it anew with a newer tool")


async def fetch(
    image: Resolved, incoming: Incoming, tell: Tell, auth: str = "", clock: Clock = SYSTEM
) -> None:
    """Bring what is missing of an image. Raises as `resolve`, and `NoRoom`."""
    reference, manifest = image.reference, image.parsed
    incoming.write(image.manifest)
    incoming.write(image.config)
    missing = incoming.missing(manifest)
    total = sum(layer.size for layer in missing)
    incoming.claim.spend(total)
    if not missing:
        return
    as_it_is = "--preserve-digests" if manifest.media_type == oci.MANIFEST else "--quiet"
    options = ("--dest-oci-accept-uncompressed-layers", as_it_is)
    argv = ("copy", *options, *_tls("src", reference), f"{reference}", LAYOUT)
    before = _size_of(incoming.layout)

    def look(pid: int) -> int:
        done = min(total, _size_of(incoming.layout) - before)
        tell(Progress("pull", reference.host, done, total))
        return done

    await run(argv, reference, auth, incoming.place, look=look, clock=clock)


async def push(
    incoming: Incoming,
    digest: str,
    reference: Reference,
    tell: Tell,
    auth: str = "",
    clock: Clock = SYSTEM,
) -> None:
    """Send the image whose blobs are all in `incoming`, as it is. Raises as `resolve`."""
    manifest = oci.parse_manifest(incoming.path(digest).read_bytes())
    entry = oci.Descriptor(
        manifest.media_type,
        digest,
        incoming.path(digest).stat().st_size,
        annotations={oci.REF_NAME: "image"},
    )
    (incoming.layout / "index.json").write_bytes(oci.encode(oci.Index((entry,))))
    (incoming.layout / "oci-layout").write_bytes(oci.LAYOUT)
    total = sum(layer.size for layer in manifest.layers)

    def look(pid: int) -> int:
        done = min(total, _has_read(pid))
        tell(Progress("push", reference.host, done, total))
        return done

    argv = ("copy", "--preserve-digests", *_tls("dest", reference), LAYOUT, str(reference))
    await run(argv, reference, auth, incoming.place, look=look, clock=clock)


async def _inspect(reference: Reference, auth: str, *options: str) -> bytes:
    argv = ("inspect", "--raw", *options, *_tls("", reference), str(reference))
    return await run(argv, reference, auth, Path("/"))


def _tls(side: str, reference: Reference) -> tuple[str, ...]:
    """A registry on loopback need not have TLS; of others registries.conf says so."""
    option = f"--{side}-tls-verify" if side else "--tls-verify"
    return (f"{option}=false",) if reference.is_local else ()


def _size_of(layout: Path) -> int:
    """Of blobs, and of those that are coming, which skopeo has beside them."""
    total = 0
    for directory in (layout, layout / "blobs/sha256"):
        for entry in os.scandir(directory):
            with suppress(FileNotFoundError):
                total += entry.stat().st_size if entry.is_file() else 0
    return total


def _has_read(pid: int) -> int:
    """How many bytes a process has read: one that sends files has sent about so much."""
    try:
        return int(Path(f"/proc/{pid}/io").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
