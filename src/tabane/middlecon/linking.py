"""Which other hubs there are, and which of them a hub dials.

All hubs of one data center are linked to each other. One of them, that with the smallest name,
dials those of other data centers that it was told to dial, until one of them can be reached: so the
links between data centers are a tree, if each hub is told to dial those before it in one order of
data centers that all share.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from tabane.errors import Conflict, ProtocolError, UsageError
from tabane.middlecon.addresses import parse_url
from tabane.middlecon.directory import Directory
from tabane.middlecon.frames import Frame, check_given_name
from tabane.middlecon.link import Link
from tabane.middlecon.ports import Port
from tabane.middlecon.session import Hello, Welcome
from tabane.middlecon.wire import Flusher, Wire
from tabane.supervise import Supervisor


class Peer(msgspec.Struct, frozen=True, omit_defaults=True):
    """Another hub. Without a URL it dials us, or is reached through others."""

    name: str
    url: str = ""
    datacenter: str = ""


_parse_peers = msgspec.msgpack.Decoder(list[Peer])


def encode_peers(peers: Sequence[Peer]) -> bytes:
    return msgspec.msgpack.encode(list(peers))


def parse_peers(frame: Frame) -> list[Peer]:
    """The body of HUBS. Raises `ProtocolError`."""
    try:
        return _parse_peers.decode(frame.data)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"this HUBS cannot be read: {error}") from None


class Linking:
    """`adopt` takes a link that was dialed, `close` ends one, maybe for a reason."""

    def __init__(
        self,
        directory: Directory,
        instance: str,
        tasks: Supervisor,
        *,
        adopt: Callable[[Wire, str, Welcome], None],
        close: Callable[[Port, Conflict | None], None],
    ) -> None:
        self._directory = directory
        self._instance = instance
        self._tasks = tasks
        self._adopt = adopt
        self._close = close
        self._links: dict[str, Link] = {}
        self._dialing: dict[str, asyncio.Task[None]] = {}
        self._far: set[str] = set()
        """Those of `_links` that lead to other data centers."""
        self._over: set[str] = set()
        """Hubs that are said to be gone, and still have a link."""
        self._far_turn = asyncio.Lock()
        self._flusher: Flusher | None = None

    def start(self, flusher: Flusher) -> None:
        self._flusher = flusher

    @property
    def troubles(self) -> dict[str, str]:
        """Why the last attempt to dial a hub failed, for those where it did."""
        return {link.peer: link.trouble for link in self._links.values() if link.trouble}

    def expect(self, name: str) -> None:
        """There is such a hub."""
        self._over.discard(name)
        self._directory.add_hub(check_given_name(name, "hub name"))

    def link(self, peer: Peer, token: str | None) -> None:
        """Dial it whenever there is no link to it, and there should be. Raises `UsageError`."""
        assert self._flusher is not None
        address = parse_url(peer.url)
        name = check_given_name(peer.name, "hub name")
        if name == self._directory.hub:
            raise UsageError(f"hub {name} is this one: each has a name of its own")
        self._stop(name)
        if peer.datacenter != self._directory.datacenter:
            self._far.add(name)
        directory = self._directory
        hello = Hello(
            directory.hub,
            self._instance,
            role="hub",
            datacenter=directory.datacenter,
            token=token or "",
        )
        link = self._links[name] = Link(
            name,
            address,
            hello,
            lambda wire, welcome: self._adopt(wire, name, welcome),
            lambda: name in directory.links or not self.wants(name),
            self._flusher,
            queue_bytes=directory.limits.queue_bytes,
            turn=self._far_turn if name in self._far else None,
        )
        self.expect(name)
        self._dialing[name] = self._tasks.start(f"link {name}", link.run())

    def unlink(self, name: str) -> None:
        """It will not come back: stop dialing, close its link, take its members as left."""
        self._stop(name)
        self._over.discard(name)
        if (port := self._directory.links.get(name)) is not None:
            self._close(port, None)
        self._directory.forget_hub(name)

    def set_peers(self, peers: Sequence[Peer], token: str | None) -> None:
        """These are all the hubs there are. One that is linked now is not gone, whatever is said
        of it, before its link is."""
        told = {peer.name: peer for peer in peers if peer.name != self._directory.hub}
        for name in self._directory.hubs.keys() - told.keys():
            if self._directory.hubs[name]:
                self._over.add(name)
                self._stop(name)
            else:
                self.unlink(name)
        for name, peer in told.items():
            if not peer.url:
                self.expect(name)
            elif name not in self._links:
                self.link(peer, token)

    def is_dialing(self, name: str) -> bool:
        link = self._links.get(name)
        return link is not None and link.dialing

    def wants(self, name: str) -> bool:
        """Whether a link that is not there should be."""
        if name not in self._far:
            return True
        directory = self._directory
        if any(directory.hubs.get(other) for other in self._far):
            return False
        near = (p.name for p in directory.links.values() if p.datacenter == directory.datacenter)
        return all(directory.hub < other for other in near)

    def on_changed(self) -> None:
        """Hubs can be reached that could not, or the other way round: links that were not wanted
        may be now, and some must go."""
        cuts, self._directory.cuts = self._directory.cuts, []
        for port, why in cuts:
            self._close(port, Conflict(why))
        for name in self._far:
            self._links[name].down.set()
        for name in [name for name in self._over if not self._directory.hubs.get(name)]:
            self.unlink(name)

    def on_lost(self, name: str, trouble: str) -> None:
        """A link is over."""
        if (link := self._links.get(name)) is not None:
            link.trouble = trouble
            link.down.set()
        self.on_changed()

    def _stop(self, name: str) -> None:
        self._links.pop(name, None)
        self._far.discard(name)
        if (task := self._dialing.pop(name, None)) is not None:
            task.cancel()
