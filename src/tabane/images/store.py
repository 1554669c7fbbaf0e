"""A node's images: verified blobs, and the trees that instances run from.

    blobs/sha256/HEX     every blob has been hashed before it got its name
    images/HEX           one file per image (by its manifest's digest): the blobs it consists of,
                         and where it came from; its time is when the image was last used
    trees/HEX/rootfs     unpacked, for drivers; made when first wanted, by renaming what is complete
    trees/HEX/bytes      how much that takes
    host/HEX             skeletons for the image `host`
    incoming/            what is not complete yet; emptied when a store is opened

What a driver makes of an image and keeps (a disk, a compiled module) goes beside its tree, into
`trees/HEX`: it counts as the image's, and goes with it.

One process has the store open. Everything that takes time runs in threads.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec

from tabane.clock import SYSTEM, Clock
from tabane.errors import Corrupt, NotFound
from tabane.images import host, layout, oci, trees
from tabane.images.incoming import Incoming, is_sound, sync_file
from tabane.images.room import Claim, Room
from tabane.model import Value
from tabane.runtimes.api import Image

log = logging.getLogger(__name__)

HOST = "host"
MOST_SOURCES = 16
USED_S = 60.0
"""That an image is used is written down so often at the most."""


class Marker(Value, frozen=True):
    """The file of an image. `digests`: of its manifest, its configuration, its layers; `sources`:
    where it came from, and what else it was asked for by, the latest last."""

    digests: tuple[str, ...]
    sources: tuple[str, ...] = ()

    def named(self, *sources: str) -> Marker:
        """With these among its sources."""
        fresh = [one for one in sources if one and one not in self.sources]
        return Marker(self.digests, (*self.sources, *fresh)[-MOST_SOURCES:])


class StoredImage(Value, frozen=True):
    """An image here. `source`: the first of its `sources`; `bytes`: of its blobs, some of which it
    may share; `unpacked_bytes`: of its tree and of what drivers keep beside it; `used_at`: when it
    was last asked for."""

    digest: str
    kind: str
    source: str
    bytes: int
    unpacked_bytes: int
    used_at: float
    sources: tuple[str, ...] = ()


class ImageStore:
    """See the module's text. `directory` is made if need be; others than root need not see it.
    `quota_bytes`: as of `Room`."""

    def __init__(self, directory: Path, quota_bytes: int = 0, clock: Clock = SYSTEM) -> None:
        self._directory = directory
        self._clock = clock
        shutil.rmtree(directory / "incoming", ignore_errors=True)
        for name in ("blobs/sha256", "images", "trees", "host", "incoming"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        directory.chmod(0o700)
        self.room = Room(directory, quota_bytes)
        self._prepared: dict[str, Image] = {}
        self._used: dict[str, float] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._changing = asyncio.Lock()
        """Held while blobs come or go, so that none is removed that another image just got."""
        self._drop_unknown()
        self.measure()

    def _drop_unknown(self) -> None:
        """Images that another version has written, or that are damaged, have to come anew."""
        for digest in self.digests():
            try:
                self._read(digest)
            except Corrupt as error:
                log.warning("%s: it is forgotten", error)
                self._marker(digest).unlink()

    # What is here

    def has(self, digest: str) -> bool:
        """Whether the whole image is here."""
        return self._marker(digest).exists()

    def digests(self) -> list[str]:
        """Of all images here."""
        return sorted(f"sha256:{path.name}" for path in (self._directory / "images").iterdir())

    def list_images(self) -> list[StoredImage]:
        """All of them, the one used least recently first."""
        found = []
        for digest in self.digests():
            with suppress(NotFound, FileNotFoundError):  # it is being removed
                found.append(self.describe(digest))
        return sorted(found, key=lambda image: image.used_at)

    def describe(self, digest: str) -> StoredImage:
        """Raises `NotFound`."""
        marker = self._read(digest)
        return StoredImage(
            digest,
            self.config(digest).platform.kind,
            marker.sources[0] if marker.sources else "",
            sum(self.blob(one).stat().st_size for one in marker.digests),
            trees.measure(self._tree(digest)),
            self._marker(digest).stat().st_mtime,
            marker.sources,
        )

    def manifest(self, digest: str) -> oci.Manifest:
        """Raises `NotFound`."""
        return oci.parse_manifest(self.blob(self._read(digest).digests[0]).read_bytes())

    def config(self, digest: str) -> oci.Config:
        """Raises `NotFound`."""
        return oci.parse_config(self.blob(self._read(digest).digests[1]).read_bytes())

    def blob(self, digest: str) -> Path:
        """Where a blob is, if it is here."""
        return layout.blob_path(self._directory, digest)

    def blobs(self, digest: str) -> dict[str, Path]:
        """What the image consists of: its manifest, its configuration, its layers. Raises
        `NotFound`."""
        return {one: self.blob(one) for one in self._read(digest).digests}

    # Coming and going

    @asynccontextmanager
    async def receive(self) -> AsyncIterator[Incoming]:
        """A place for what is coming; what is not adopted when the block ends is gone. Raises
        `NoRoom` when the disk is full."""
        with self.room.claim() as claim:
            place = Path(tempfile.mkdtemp(dir=self._directory / "incoming"))
            try:
                yield Incoming(place, claim, self._directory)
            finally:  # a thread that was given up may still write there
                await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)

    async def import_layout(self, source: AsyncIterable[bytes] | Path, name: str = "") -> str:
        """Take in an image as `Packed.chunks()` or `export` give it; return its digest. `name`:
        where it came from.

        Raises `Corrupt` when a blob is not what its name says or the stream breaks off, `NoRoom`,
        and `UsageError` when it cannot run here. Of what is here already only the name is noted.
        """
        async with self.receive() as incoming:
            archive = source if isinstance(source, Path) else incoming.place / "archive"
            if not isinstance(source, Path):
                await _receive(source, archive, incoming.claim)
            digest = await asyncio.to_thread(incoming.extract, archive)
            return await self.adopt(incoming, digest, name)

    async def adopt(self, incoming: Incoming, digest: str, source: str = "") -> str:
        """Make the image whose manifest has `digest` one of the store's. Raises as
        `import_layout`."""
        digests = await asyncio.to_thread(incoming.verify, digest)
        async with self._changing:
            before = self._read(digest).sources if self.has(digest) else ()
            marker = Marker(digests).named(*before, source)
            await asyncio.to_thread(self._adopt, incoming, marker)
        return digest

    async def name(self, digest: str, source: str) -> None:
        """Note that an image here was also asked for as `source`; nothing, when it is gone."""
        async with self._changing:
            marker = self._read(digest) if self.has(digest) else None
            if marker is not None and (named := marker.named(source)) != marker:
                async with self.receive() as incoming:
                    await asyncio.to_thread(self._write_marker, incoming, named)

    def _adopt(self, incoming: Incoming, marker: Marker) -> None:
        for blob in marker.digests:
            path = incoming.path(blob)
            sync_file(path)
            path.replace(self.blob(blob))
        self._write_marker(incoming, marker)
        incoming.claim.bytes = 0
        self.measure()

    def _write_marker(self, incoming: Incoming, marker: Marker) -> None:
        scratch = incoming.place / "marker"
        scratch.write_bytes(msgspec.json.encode(marker))
        sync_file(scratch)
        scratch.replace(self._marker(marker.digests[0]))
        self._write_use(marker.digests[0], self._clock.wall())

    def export(self, digest: str) -> Iterator[bytes]:
        """The image as a tar stream for another store's `import_layout`. Raises `NotFound`."""
        return layout.stream(digest, self.blobs(digest))

    async def remove(self, digest: str) -> None:
        """Forget an image: its tree and the blobs no other image needs. Unknown ones are fine.

        Instances that run from it keep their files; drivers hold them.
        """
        async with self._changing:
            if self.has(digest) or self._tree(digest).exists():
                self._prepared.pop(digest, None)
                await asyncio.to_thread(self._remove, digest)

    def _remove(self, digest: str) -> None:
        gone: set[str] = set()
        if self.has(digest):
            gone |= set(self._read(digest).digests)
            self._marker(digest).unlink()
        for other in self.digests():
            gone -= set(self._read(other).digests)
        for blob in gone:
            self.blob(blob).unlink(missing_ok=True)
        if self._tree(digest).exists():
            place = Path(tempfile.mkdtemp(dir=self._directory / "incoming"))
            self._tree(digest).rename(place / "tree")
            shutil.rmtree(place)
        self.measure()

    def orphans(self) -> list[str]:
        """Trees whose image is not here any more."""
        trees = (f"sha256:{path.name}" for path in (self._directory / "trees").iterdir())
        return sorted(digest for digest in trees if not self.has(digest))

    async def drop_damaged(self, digest: str) -> bool:
        """Remove what of an image is not what its name says any more, if anything is: it and all
        that share that are not here any more, but for their trees."""
        async with self._changing:
            return await asyncio.to_thread(self._drop_damaged, digest)

    def _drop_damaged(self, digest: str) -> bool:
        damaged = {one for one, path in self.blobs(digest).items() if not is_sound(path, one)}
        for other in self.digests() if damaged else ():
            if damaged & {*self._read(other).digests}:
                self._marker(other).unlink()
        for blob in damaged:
            self.blob(blob).unlink(missing_ok=True)
        self.measure()
        return bool(damaged)

    # Use

    async def prepare(self, digest: str) -> Image:
        """The image, unpacked if it is not yet; many may ask at once. `host` is the host's own.

        Raises `NotFound` when it is not here, `Corrupt` when it does not unpack to what it says,
        `NoRoom` when that is more than there is room for.
        """
        self._note_use(digest)
        if digest in self._prepared:
            return self._prepared[digest]
        async with self._locks.setdefault(digest, asyncio.Lock()):
            if digest not in self._prepared:
                work = self._make_host if digest == HOST else self._unpack
                self._prepared[digest] = await asyncio.to_thread(work, digest)
        self._locks.pop(digest, None)
        return self._prepared[digest]

    def _note_use(self, digest: str) -> None:
        now = self._clock.wall()
        if digest != HOST and now - self._used.get(digest, 0.0) > USED_S and self.has(digest):
            self._write_use(digest, now)

    def _write_use(self, digest: str, now: float) -> None:
        self._used[digest] = now
        os.utime(self._marker(digest), (now, now))

    def used_lately(self) -> set[str]:
        """What was asked for within `USED_S`: who asked may be about to begin."""
        now = self._clock.wall()
        self._used = {one: at for one, at in self._used.items() if now - at <= USED_S}
        return set(self._used)

    def _make_host(self, digest: str) -> Image:
        return host.make_image(self._directory / HOST, self._directory / "incoming")

    def _unpack(self, digest: str) -> Image:
        manifest, config = self.manifest(digest), self.config(digest)
        final = self._tree(digest)
        image = oci.make_image(digest, final / "rootfs", manifest, config)
        if not final.exists():
            place = Path(tempfile.mkdtemp(dir=self._directory / "incoming"))
            try:
                with self.room.claim() as claim:
                    trees.unpack(place, manifest, config, self.blob, claim.spend)
                    trees.check_program(place / "rootfs", image)
                    trees.finish(place, claim.bytes)
                    place.rename(final)
            except BaseException:
                shutil.rmtree(place)
                raise
            self.measure()
        return image

    # Files

    def measure(self) -> None:
        """Have `room` know what there is; drivers may have put something beside a tree."""
        sizes = (entry.stat().st_size for entry in os.scandir(self._directory / "blobs/sha256"))
        unpacked = map(trees.measure, (self._directory / "trees").iterdir())
        self.room.stored_bytes = sum(sizes) + sum(unpacked)

    def _marker(self, digest: str) -> Path:
        return self._directory / "images" / oci.check_digest(digest).removeprefix("sha256:")

    def _tree(self, digest: str) -> Path:
        return self._directory / "trees" / digest.removeprefix("sha256:")

    def _read(self, digest: str) -> Marker:
        try:
            return msgspec.json.decode(self._marker(digest).read_bytes(), type=Marker)
        except FileNotFoundError:
            problem = f"image {digest} is not in this node's store: deploy its app again"
            raise NotFound(problem) from None
        except msgspec.DecodeError:
            raise Corrupt(f"{self._marker(digest)} does not say what {digest} is") from None


def choose_to_remove(images: Iterable[StoredImage], keep: set[str]) -> list[str]:
    """What may be removed, in the order in which to remove it: what was not used for longest
    first."""
    order = sorted(images, key=lambda image: image.used_at)
    return [image.digest for image in order if image.digest not in keep]


async def _receive(source: AsyncIterable[bytes], archive: Path, claim: Claim) -> None:
    with archive.open("wb") as file:
        async for data in source:
            claim.spend(len(data))
            await asyncio.to_thread(file.write, data)
