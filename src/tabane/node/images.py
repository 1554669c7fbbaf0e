"""Images on this node: its own store, filled from other nodes and from registries.

An image comes to a data center once. For each there is one node of the dc, chosen by its digest,
that gets it from elsewhere: another dc's node that has it, else the registry. The others have that
node get it, and copy it from there. A node that cannot have it so gets it by itself.

What is not used is removed when there is no room for what is wanted, the longest unused first:
never what an app names, an instance runs from, is on its way, or was asked for just now.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import msgspec

from tabane.errors import (
    Conflict,
    Corrupt,
    Denied,
    NotFound,
    TabaneError,
    Unreachable,
    Unsupported,
    error_of,
)
from tabane.images import ImageStore, oci, registry
from tabane.images.registry import Progress, Tell
from tabane.images.room import NoRoom
from tabane.images.store import HOST, StoredImage, choose_to_remove
from tabane.model import App, AppName, Value
from tabane.node.config import Peer
from tabane.node.flights import Flights
from tabane.node.messages import Removed
from tabane.node.peers import ask_peer
from tabane.references import SCHEME, Reference, parse_reference
from tabane.runtimes.api import Image

if TYPE_CHECKING:
    from tabane.node.agent import Agent

T = TypeVar("T")
FINAL = (Denied, Unsupported)
"""What a registry would tell another node as well."""

log = logging.getLogger(__name__)


class Wanted(Value, frozen=True, omit_defaults=True):
    """An image to be had. `source`: a reference in a registry, if it comes from one; `auth`: logins
    for that, as an auth file's text. `here`: this node is to get it, whoever should."""

    digest: str = ""
    source: str = ""
    auth: str = ""
    here: bool = False


class ImageRow(Value, frozen=True):
    """An image on a node, and who keeps it there."""

    node: str
    image: StoredImage
    apps: tuple[str, ...]
    instances: tuple[str, ...]


class StoreRow(Value, frozen=True):
    """What a node's images take, and may take."""

    node: str
    used_bytes: int
    limit_bytes: int


class OwnImages(Value, frozen=True):
    store: StoreRow
    images: tuple[ImageRow, ...]


def images_of(app: App) -> set[str]:
    """The digests that an app names."""
    return {image for image, _ in app.images()}


def describe_coming(name: str, progress: Progress) -> str:
    """An image that is on its way, as a sentence's end."""
    coming = f"its image {name} is being pulled"
    if progress.where:
        coming += f" from {progress.where}"
    if not progress.total_bytes:
        return coming
    done, total = progress.done_bytes >> 20, max(1, progress.total_bytes >> 20)
    return f"{coming}, {done} of {total} MiB are here"


class NodeImages:
    """See the module's text."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        config = agent.config
        self.store = ImageStore(config.paths.images, config.image_quota_bytes, agent.clock)
        self._flights = Flights(agent.tasks)

    # For instances

    async def prepare_for(self, app: App) -> Image:
        return await self.prepare(app.image, app.source)

    def describe(self, app: App) -> str:
        """What keeps an app's images from being ready, as a sentence's end."""
        for digest, source in app.images():
            if (progress := self._flights.progress(digest)) is not None:
                return describe_coming(source or digest[:19], progress)
        return "its image is being unpacked"

    async def prepare(self, digest: str, source: str = "") -> Image:
        """An image by digest, or `host`, brought here and unpacked if need be. Raises `NotFound`
        when nobody that answers has it, and as `ImageStore.prepare`."""
        try:
            return await self._prepare(digest, source)
        except Corrupt:
            if digest == HOST or not await self.store.drop_damaged(digest):
                raise
            log.warning("image %s was damaged on the disk: it is brought anew", digest)
            return await self._prepare(digest, source)

    async def _prepare(self, digest: str, source: str) -> Image:
        if digest != HOST and not self.store.has(digest):
            await self.bring(Wanted(digest, source), lambda progress: None)
        return await self._with_room(lambda: self.store.prepare(digest))

    def kind_of(self, digest: str) -> str:
        """Of an image that is here; the host's is like one of Linux."""
        return self.store.config(digest).platform.kind if digest != HOST else oci.LINUX

    # Coming

    async def take(self, source: AsyncIterator[bytes], name: str, size: int) -> str:
        """Take in an image as `ImageStore.import_layout` does. Of what comes once only, the `size`
        is told before, so that there is room when it comes."""
        self.store.room.check(size)
        while self.store.room.left_bytes < size and await self._remove_oldest():
            pass
        return await self.store.import_layout(source, name)

    async def pull(self, wanted: Wanted, tell: Tell) -> str:
        """Have an image here; returns its digest, to which a tag is fixed now. Raises as
        `registry.resolve` and `bring`."""
        if not wanted.digest:
            reference = parse_reference(wanted.source)
            tell(Progress("resolve", reference.host))
            with self._telling_where(reference):
                image = await registry.resolve(reference, wanted.auth)
            wanted = msgspec.structs.replace(wanted, digest=image.digest)
        await self.bring(wanted, tell)
        return wanted.digest

    async def bring(self, wanted: Wanted, tell: Tell) -> None:
        """Have an image here whose digest is known: once, however many want it. Raises `NotFound`
        when nobody that answers has it."""
        if not self.store.has(wanted.digest):
            work = lambda tell: self._with_room(lambda: self._bring(wanted, tell))  # noqa: E731
            await self._flights.join(wanted.digest, work, tell)
        await self.store.name(wanted.digest, wanted.source)

    async def _bring(self, wanted: Wanted, tell: Tell) -> None:
        problems = []
        for peer in self._where(wanted):
            try:
                await self._copy(peer, wanted, tell)
            except NoRoom:
                raise
            except (TabaneError, OSError) as error:
                if type(error) in FINAL:
                    raise
                problems.append(str(error))
            else:
                return
        if not wanted.source.startswith(SCHEME):
            told = f" ({'; '.join(problems)})" if problems else ""
            raise NotFound(f"image {wanted.digest[:19]} is on no node that answers{told}")
        await self._pull(parse_reference(wanted.source).at(wanted.digest), wanted, tell)

    def _where(self, wanted: Wanted) -> Iterator[Peer]:
        """The nodes to ask, in that order: who is to get it for this data center, the others here,
        those elsewhere."""
        nodes = self._agent.nodes
        live = [node for node in nodes.live_nodes() if node != self._agent.config.key]
        leader = nodes.home_of(AppName(wanted.digest))
        live.sort(key=lambda node: (node != leader, not nodes.is_near(node)))
        yield from map(self._agent.config.cluster.node, live)

    async def _copy(self, peer: Peer, wanted: Wanted, tell: Tell) -> None:
        """Copy it from a node that has it, or that is to get it."""
        leads = peer.key == self._agent.nodes.home_of(AppName(wanted.digest))
        if leads and not wanted.here:
            await self._have_it_got(peer, wanted, tell)
        async with self.store.receive() as incoming:
            data = b"".join([block async for block in self._read(peer, wanted.digest)])
            incoming.write(data)
            missing = incoming.missing(oci.parse_manifest(data))
            total = sum(blob.size for blob in missing)
            incoming.claim.spend(total)
            done = 0
            for blob in missing:
                with incoming.path(blob.digest).open("wb") as file:
                    async for block in self._read(peer, blob.digest):
                        await asyncio.to_thread(file.write, block)
                        done += len(block)
                        tell(Progress("copy", peer.key, done, total))
            await self.store.adopt(incoming, wanted.digest, wanted.source)

    async def _read(self, peer: Peer, digest: str) -> AsyncIterator[bytes]:
        async with ask_peer(peer, self._agent.token, "GET", f"/api/v1/blobs/{digest}") as answer:
            async for block in answer.blocks():
                yield block

    async def _have_it_got(self, peer: Peer, wanted: Wanted, tell: Tell) -> None:
        body = msgspec.json.encode(msgspec.structs.replace(wanted, here=True))
        pull = ask_peer(peer, self._agent.token, "POST", "/api/v1/images/pull", body)
        async with pull as answer:
            async for line in answer.lines():
                said = msgspec.json.decode(line)
                if "error" in said:
                    raise error_of(said["error"], said["message"])
                if "step" in said:
                    tell(msgspec.convert(said, Progress))

    async def _pull(self, reference: Reference, wanted: Wanted, tell: Tell) -> None:
        with self._telling_where(reference):
            image = await registry.resolve(reference, wanted.auth)
        async with self.store.receive() as incoming:
            await registry.fetch(image, incoming, tell, wanted.auth, self._agent.clock)
            await self.store.adopt(incoming, image.digest, wanted.source)

    async def push(self, digest: str, reference: Reference, auth: str, tell: Tell) -> None:
        """Send an image to a registry. Raises `NotFound`, and as `registry.push`."""
        blobs = self.store.blobs(digest)
        async with self.store.receive() as incoming:
            for blob in blobs:
                if not incoming.take_known(blob):
                    raise NotFound(f"image {digest} was removed meanwhile: pull it again")
            with self._telling_where(reference):
                await registry.push(incoming, digest, reference, tell, auth, self._agent.clock)

    @contextmanager
    def _telling_where(self, reference: Reference) -> Iterator[None]:
        """A registry on loopback is another one on each node: name the node that looked there."""
        try:
            yield
        except Unreachable as error:
            if not reference.is_local:
                raise
            config = self._agent.config
            problem = f"on {config.key} {error.message}: loopback is each node's own"
            machine = config.cluster.network.host_address
            hint = f"name the registry by an address that nodes reach ({machine}: this machine)"
            raise Unreachable(f"{problem}, {hint}") from None

    # Going

    async def list_own(self) -> OwnImages:
        """What is here, the one unused for longest first."""
        node, room = self._agent.config.key, self.store.room
        await asyncio.to_thread(self.store.measure)
        images = await asyncio.to_thread(self.store.list_images)
        rows = (ImageRow(node, image, *self._users(image.digest)) for image in images)
        return OwnImages(StoreRow(node, room.used_bytes, room.limit_bytes), tuple(rows))

    def _users(self, digest: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Apps that name an image, and instances of this node that run from it."""
        apps = (app.key for app in self._agent.all_apps() if digest in images_of(app))
        running = self._agent.executor.images()
        return tuple(apps), tuple(one for one, images in running.items() if digest in images)

    async def remove_own(self, digest: str) -> Removed:
        """Remove an image from this node; nothing, when it is not here. Raises `Conflict` with who
        uses it."""
        apps, instances = self._users(digest)
        if users := [*apps, *(f"instance {one}" for one in instances)]:
            what = f"image {digest[:19]} on {self._agent.config.key}"
            raise Conflict(f"{what} is used by {', '.join(users)}: remove or stop that first")
        if digest in self._flights:
            raise Conflict(f"image {digest[:19]} is on its way to {self._agent.config.key}")
        return await self._remove([digest] if self.store.has(digest) else [])

    async def collect_own(self, *, dry: bool = False) -> Removed:
        """Remove what nothing uses; `dry`: only say what that is."""
        images = await asyncio.to_thread(self.store.list_images)
        unused = choose_to_remove(images, in_use := self._in_use())
        if not dry:
            orphans = [tree for tree in self.store.orphans() if tree not in in_use]
            return await self._remove([*unused, *orphans])
        sizes = {image.digest: image.bytes + image.unpacked_bytes for image in images}
        size = sum(sizes[digest] for digest in unused)
        return Removed(tuple(unused), size)

    async def _remove(self, digests: list[str]) -> Removed:
        before = self.store.room.stored_bytes
        for digest in digests:
            await self.store.remove(digest)
        freed = max(0, before - self.store.room.stored_bytes)
        return Removed(tuple(digests), freed)

    def _in_use(self) -> set[str]:
        named = {digest for app in self._agent.all_apps() for digest in images_of(app)}
        running = set().union(*self._agent.executor.images().values())
        return named | running | self._flights.keys() | self.store.used_lately()

    async def _with_room(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do it, and again each time that an image was removed for it."""
        while True:
            try:
                return await work()
            except NoRoom as error:
                if error.is_hopeless or not await self._remove_oldest():
                    raise

    async def _remove_oldest(self) -> bool:
        images = await asyncio.to_thread(self.store.list_images)
        for digest in choose_to_remove(images, self._in_use())[:1]:
            log.info("image %s is removed, since there is no room for another", digest)
            await self.store.remove(digest)
            return True
        return False
