"""An image that is on its way into a store: blobs in a place of their own until all are there."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from tabane.errors import Corrupt
from tabane.images import layout, oci
from tabane.images.room import Claim

WHERE = "the image"


class Incoming:
    """See the module's text. `place` is a directory on the file system of `store`; `claim` is what
    comes to be told before it is written."""

    def __init__(self, place: Path, claim: Claim, store: Path) -> None:
        self.place = place
        self.claim = claim
        self.layout = place / "layout"
        self._store = store
        self._sound: set[str] = set()
        """Blobs that have been hashed."""
        (self.layout / "blobs/sha256").mkdir(parents=True)

    def path(self, digest: str) -> Path:
        """Where a blob goes."""
        return layout.blob_path(self.layout, digest)

    def write(self, data: bytes) -> str:
        """Add a small blob; returns its digest."""
        digest = oci.digest_of(data)
        self.path(digest).write_bytes(data)
        self._sound.add(digest)
        return digest

    def take_known(self, digest: str) -> bool:
        """Whether the store has this blob; if so it is here as well, and stays, whatever the store
        removes meanwhile."""
        if digest not in self._sound:
            try:
                os.link(layout.blob_path(self._store, digest), self.path(digest))
            except FileNotFoundError:
                return False
            except FileExistsError:
                return False  # it is on its way already
            self._sound.add(digest)
        return True

    def missing(self, manifest: oci.Manifest) -> list[oci.Descriptor]:
        """The blobs of an image that are still to come; those that the store has are here then."""
        wanted = {one.digest: one for one in (manifest.config, *manifest.layers)}
        return [one for digest, one in wanted.items() if not self.take_known(digest)]

    def extract(self, archive: Path) -> str:
        """Take a layout's tar apart; returns the digest of its image. Raises `Corrupt`,
        `UsageError`."""
        self._sound |= layout.extract(archive, self.layout, WHERE)
        return layout.find_manifest(self.layout, "", WHERE)[0]

    def verify(self, digest: str) -> tuple[str, ...]:
        """The digests of all that an image consists of. Raises `Corrupt` for what is missing, cut
        off, or not what its name says, and `UsageError` when it cannot run here."""
        self._check(oci.Descriptor(oci.MANIFEST, digest, -1))
        manifest = oci.parse_manifest(layout.read_document(self.path(digest), WHERE))
        for descriptor in (manifest.config, *manifest.layers):
            self._check(descriptor)
        data = layout.read_document(self.path(manifest.config.digest), WHERE)
        oci.check(manifest, oci.parse_config(data), WHERE)
        return (digest, *manifest.digests())

    def _check(self, descriptor: oci.Descriptor) -> None:
        path = self.path(descriptor.digest)
        layout.check_size(path, descriptor, WHERE)
        if descriptor.digest in self._sound:
            return
        if not is_sound(path, descriptor.digest):
            raise Corrupt(f"{WHERE}: blob {descriptor.digest} is not what its name says")
        self._sound.add(descriptor.digest)


def is_sound(path: Path, digest: str) -> bool:
    """Whether a blob is there and is what its name says."""
    try:
        with path.open("rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}" == digest
    except FileNotFoundError:
        return False


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
